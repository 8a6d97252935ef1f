# SPDX-License-Identifier: Apache-2.0
"""Ways into the pass over rows: eager, with autograd if a gradient is wanted, and under torch.compile by the operators
``hotloop::moe_step``, ``hotloop::moe_permute`` and their backwards.

An operator takes a list of tensors: inputs that are absent have no element in it, and ``places`` says which are there.
What it does not return is a tensor of no element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..front import check
from ._row_pass import (
    INPUTS,
    NUMBERS,
    SLOPES,
    STATE,
    STATES,
    WEIGHTS,
    Config,
    Found,
    Given,
    Permute,
    Shape,
    Step,
    X,
    Z,
    backward,
    forward,
    kept_by,
    permute_rows,
    refuse_second,
    shape_of,
    sizes_of,
    sum_of_rows,
)
from .results import Dispatch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def run(config: Config, given: Given) -> tuple[Tensor | None, ...]:
    """The new x, the states, and the norm, on checked arguments."""
    if torch.compiler.is_compiling():
        return _step(config, given)
    check.untransformed(config.op, *given)
    if torch.is_grad_enabled():
        for x in given:
            if x is not None and x.requires_grad:
                results: tuple[Tensor | None, ...] = Step.apply(config, *given)
                return results
    found = forward(config, given, False)
    return (found.out, *found.states, found.normed)


def permuted(op: str, x: Tensor, dispatch: Dispatch) -> Tensor:
    """``permute`` on checked arguments."""
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.hotloop.moe_permute(x, dispatch.slot_of_row, dispatch.row_of_slot)
        return found
    check.untransformed(op, x)
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = Permute.apply(x, dispatch.slot_of_row, dispatch.row_of_slot)
        return result
    return permute_rows(x, dispatch.slot_of_row, dispatch.row_of_slot)


def _step(config: Config, given: Given) -> tuple[Tensor | None, ...]:
    places = [i for i, x in enumerate(given) if x is not None]
    tensors = [x for x in given if x is not None]
    needs = [int(torch.is_grad_enabled() and x.requires_grad) for x in tensors]
    found = torch.ops.hotloop.moe_step(
        tensors, places, needs, config.slot_of_row, config.row_of_slot, config.op, config.rule, list(config.numbers),
        config.norm, config.eps, config.post_norm, config.out_dtype,
    )  # fmt: skip
    states = STATES[config.rule] if config.rule != "lookahead" else 0
    out = found[0] if config.rule != "lookahead" else None
    normed = found[4] if config.norm and not config.post_norm else None
    return (out, *found[1 : 1 + states], normed)


def _spread(tensors: Sequence[Any], places: Sequence[int], otherwise: Any = None) -> list[Any]:
    """The elements at their places among all inputs."""
    found = [otherwise] * INPUTS
    for i, x in zip(places, tensors):
        found[i] = x
    return found


def _filled(found: Found) -> list[Tensor | None]:
    """out, three states, normed, what was normalised if it is none of the others, and statistics."""
    states = [*found.states, None, None, None][:3]
    return [found.out, *states, found.normed, None, found.statistics]


@torch.library.custom_op("hotloop::moe_step", mutates_args=())
def _step_op(
    tensors: Sequence[Tensor],
    places: Sequence[int],
    needs: Sequence[int],
    slot_of_row: Tensor | None,
    row_of_slot: Tensor | None,
    op: str,
    rule: str,
    numbers: Sequence[float],
    norm: str,
    eps: float,
    post_norm: bool,
    out_dtype: torch.dtype | None,
) -> list[Tensor]:
    config = Config(
        op, rule, tuple(numbers), norm, eps, post_norm, out_dtype, slot_of_row, row_of_slot
    )
    found = forward(config, _spread(tensors, places), any(needs))
    filled = _filled(found)
    if post_norm and any(needs):
        filled[5] = found.after
    return [tensors[0].new_empty(0) if x is None else x for x in filled]


@_step_op.register_fake
def _(tensors: Sequence[Tensor], places: Sequence[int], needs: Sequence[int], *rest: Any) -> Any:
    *_slots, _op, rule, _numbers, norm, _eps, post_norm, out_dtype = rest
    given = _spread(tensors, places)
    base = given[Z] if given[X] is None else given[X]
    x = given[X]
    tokens = (given[WEIGHTS] if x is None and given[WEIGHTS] is not None else base).shape[0]
    maths = torch.float64 if base.dtype is torch.float64 else torch.float32
    shape = (tokens, base.shape[1])
    found: list[Any] = [None] * 7
    if rule != "lookahead":
        found[0] = base.new_empty(shape, dtype=out_dtype or base.dtype)
        for i, s in enumerate(given[STATE : STATE + STATES[rule]]):
            found[1 + i] = base.new_empty(shape, dtype=maths if s is None else s.dtype)
    if norm and not post_norm:
        found[4] = base.new_empty(shape)
    if norm and any(needs):
        found[5] = base.new_empty(shape) if post_norm else None
        found[6] = base.new_empty((tokens, 2), dtype=maths)
    return [tensors[0].new_empty(0) if x is None else x for x in found]


@torch.library.custom_op("hotloop::moe_step_backward", mutates_args=())
def _backward_op(
    kept: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[int],
    sizes: Sequence[int],
    dtypes: Sequence[int],
    op: str,
    rule: str,
    numbers: Sequence[float],
    norm: str,
    eps: float,
    post_norm: bool,
) -> list[Tensor]:
    config = Config(op, rule, tuple(numbers), norm, eps, post_norm)
    shape = _shape(sizes, dtypes)
    found = backward(config, shape, kept, list(map(bool, needs)), grads)
    return [x if x is None or x._base is None else x.clone() for x in found if x is not None]


@_backward_op.register_fake
def _(
    kept: Any, grads: Sequence[Tensor | None], needs: Sequence[int], sizes: Any, dtypes: Any, *rest: Any
) -> Any:  # fmt: skip
    some = next(g for g in grads if g is not None)
    shape = _shape(sizes, dtypes)
    all_sizes = sizes_of(shape)
    all_sizes[NUMBERS] = (SLOPES[rest[1]],)
    return [
        some.new_empty(size, dtype=dtype)
        for size, dtype, need in zip(all_sizes, shape.dtypes, needs)
        if need
    ]


def _shape(sizes: Sequence[int], dtypes: Sequence[int]) -> Shape:
    tokens, columns, rows, k = sizes
    return Shape(tokens, columns, rows, k, [None if i < 0 else DTYPES[i] for i in dtypes])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, places, needs, slot_of_row, row_of_slot, op, rule, numbers, norm, eps, post_norm, _ = inputs  # fmt: skip
    given, ctx.needs = _spread(tensors, places), _spread(needs, places, 0)
    ctx.config = Config(op, rule, tuple(numbers), norm, eps, post_norm, None, slot_of_row, row_of_slot)  # fmt: skip
    states = tuple(output[1 : 1 + STATES[rule]]) if rule != "lookahead" else ()
    after = output[5] if post_norm else (given[X] if rule == "lookahead" else output[0])
    found = Found(output[0], states, output[4], after if norm else None, output[6] if norm else None)  # fmt: skip
    ctx.save_for_backward(*kept_by(ctx.config, given, list(map(bool, ctx.needs)), found))
    ctx.shape, ctx.places = shape_of(ctx.config, given), list(places)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    config, shape = ctx.config, ctx.shape
    refuse_second(config.op)
    of_inputs: list[Tensor | None] = [None] * len(ctx.places)
    # Of what has no element there is a gradient too.
    of_norm = grads[4] if config.norm and not config.post_norm else None
    given = [*grads[: 1 + STATES[config.rule]], of_norm]
    if config.rule == "lookahead":
        given = [None, None, of_norm]
    if any(g is not None for g in given):
        sizes = [shape.tokens, shape.columns, shape.rows, shape.k]
        dtypes = [-1 if d is None else DTYPES.index(d) for d in shape.dtypes]
        found = torch.ops.hotloop.moe_step_backward(
            list(ctx.saved_tensors), given, ctx.needs, sizes, dtypes, config.op, config.rule, list(config.numbers),
            config.norm, config.eps, config.post_norm,
        )  # fmt: skip
        order = iter(found)
        of_inputs = [next(order) if ctx.needs[place] else None for place in ctx.places]
    # torch takes an empty list for a list of tensors.
    no_numbers: list[Any] | None = None if config.numbers else []
    return (of_inputs, *[None] * 6, no_numbers, *[None] * 4)


_step_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("hotloop::moe_permute", mutates_args=())
def _permute_op(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return permute_rows(x, slot_of_row, row_of_slot)


@_permute_op.register_fake
def _(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    return x.new_empty((slot_of_row.shape[0], x.shape[1]))


@torch.library.custom_op("hotloop::moe_sum_of_rows", mutates_args=())
def _sum_op(grad: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, tokens: int) -> Tensor:
    return sum_of_rows(grad, slot_of_row, row_of_slot, tokens)


@_sum_op.register_fake
def _(grad: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, tokens: int) -> Tensor:
    return grad.new_empty((tokens, grad.shape[1]))


def _permute_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])
    ctx.tokens = inputs[0].shape[0]


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second("permute")
    return torch.ops.hotloop.moe_sum_of_rows(grad, *ctx.saved_tensors, ctx.tokens), None, None


_permute_op.register_autograd(_permute_backward, setup_context=_permute_setup)
