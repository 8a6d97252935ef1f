# SPDX-License-Identifier: Apache-2.0
"""The compiled pass over rows (csrc/moe/row_pass.hpp) for torch, with autograd in eager mode; under torch.compile the
operators of ``_row_operator``.

Forward keeps what its gradient needs and nothing of the size of the expert rows that autograd does not hold anyway: the
new residual stream, mean and scale of each row, and the expert rows where their weights have a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..front import buffers, environment, plain
from . import _arguments as arguments
from . import _device

X, STATE, Z, WEIGHTS, SHARED, NORM_WEIGHT, NORM_BIAS, NUMBERS = 0, 1, 4, 5, 6, 7, 8, 9
"""Places of the differentiable inputs: x, three states, z, ..., and the numbers of a rule that are tensors."""
INPUTS = 10
STATES = {"combine": 0, "residual": 0, "momentum": 1, "adam": 3, "robust": 1, "lookahead": 1}
AHEAD = ("robust", "lookahead")
"""Rules whose norm looks ahead along the first state."""
SLOPES = {"combine": 0, "residual": 0, "momentum": 2, "adam": 2, "robust": 3, "lookahead": 1}
"""How many numbers of a rule may have a gradient: its first."""
MOST_SLOPES = 3

LARGE = 2**20
"""Elements of a result for which large pages are asked for."""

Given = Sequence[Tensor | None]


class Config(NamedTuple):
    """What of a pass is no tensor, and the order of the expert rows."""

    op: str
    rule: str
    numbers: tuple[float, ...]
    """Of the rule (csrc/moe/depth_rules.hpp)."""
    norm: str = ""
    eps: float = 0.0
    post_norm: bool = False
    out_dtype: torch.dtype | None = None
    """Of the result, where it is not that of x."""
    slot_of_row: Tensor | None = None
    row_of_slot: Tensor | None = None


class Found(NamedTuple):
    """Results of a pass, and what its gradient needs."""

    out: Tensor | None
    states: tuple[Tensor | None, ...]
    normed: Tensor | None
    after: Tensor | None
    """What was normalised."""
    statistics: Tensor | None
    """(T, 2): mean and 1 / deviation of its rows."""


def forward(config: Config, given: Given, backward: bool) -> Found:
    """Run the loop."""
    x, z, weights = given[X], given[Z], given[WEIGHTS]
    base = z if x is None else x
    assert base is not None
    tokens, columns = base.shape
    dtype = base.dtype
    wide = dtype is torch.float64
    maths = torch.float64 if wide else torch.float32
    old = given[STATE : STATE + STATES[config.rule]]
    states: tuple[Tensor | None, ...] = ()
    out = normed = raw = statistics = None
    if x is None:
        assert weights is not None
        tokens = weights.shape[0]
        out = torch.empty((tokens, columns), dtype=config.out_dtype or dtype, device=base.device)
    elif config.rule != "lookahead":
        out = _like(x, dtype)
        states = tuple(_like(x, maths if s is None else s.dtype) for s in old)
    if config.norm:
        # In place where the row before the norm is not asked for again.
        normed = out if config.post_norm and not backward else _like(base, dtype)
        if backward:
            statistics = torch.empty((tokens, 2), dtype=maths, device=base.device)
        if config.post_norm:
            out, raw = normed, out
    if tokens * columns >= LARGE:
        for result in (out, raw, normed, *states):
            _in_large_pages(result)
    if tokens:
        look_first(config.op, base, config.slot_of_row, config.row_of_slot)
        loops, numbers, place = _loops(base, config.numbers, given[NUMBERS], memory=False)
        held = loops.step(
            config.rule, numbers, wide, tokens, columns, _rows(x), tuple(map(_rows, old)), _rows(z),
            _rows(weights), config.slot_of_row, config.row_of_slot, _rows(given[SHARED]), config.norm,
            _row(given[NORM_WEIGHT]), _row(given[NORM_BIAS]), config.eps, out if raw is None else raw, states, normed,
            statistics, *place,
        )  # fmt: skip
        if base.is_cpu and not held:
            assert config.slot_of_row is not None
            assert config.row_of_slot is not None
            arguments.look_at_dispatch(config.op, config.slot_of_row, config.row_of_slot)
    after = raw if config.post_norm else (x if config.rule == "lookahead" else out)
    return Found(out, states, None if config.post_norm else normed, after, statistics)


def _like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A new contiguous tensor of the shape of x."""
    if x.is_contiguous():  # half the time of the other way
        return torch.empty_like(x) if dtype is x.dtype else torch.empty_like(x, dtype=dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _in_large_pages(x: Tensor | None) -> None:
    """A fresh buffer of 134 MB takes 8 to 12 instead of 37 ms to write (docs/perf-notes.md)."""
    if x is not None and x.is_cpu and x.numel() >= LARGE:
        buffers.advised(x)


def kept_by(
    config: Config, given: Given, needs: Sequence[bool], found: Found
) -> list[Tensor | None]:
    """What the gradient needs, in the order that ``backward`` takes it."""
    of_numbers = needs[NUMBERS]
    reads = config.rule == "adam" or of_numbers
    old = [s if reads else None for s in given[STATE:Z]]
    z = given[Z] if reads or needs[WEIGHTS] else None
    weights = given[WEIGHTS] if reads or needs[Z] else None
    after = ahead = None
    if config.norm:
        after = found.after
        if config.rule in AHEAD and not config.post_norm:
            ahead = found.states[0] if found.states else given[STATE]
    shared = given[SHARED] if reads else None
    return [
        given[X] if reads else None, *old, z, weights, shared, given[NORM_WEIGHT] if config.norm else None,
        given[NUMBERS], after, ahead, found.statistics, config.slot_of_row, config.row_of_slot,
    ]  # fmt: skip


class Shape(NamedTuple):
    """Sizes and dtypes of the inputs, some of which are not kept."""

    tokens: int
    columns: int
    rows: int
    k: int
    dtypes: list[torch.dtype | None]


def shape_of(config: Config, given: Given) -> Shape:
    z, weights = given[Z], given[WEIGHTS]
    base = given[X]
    if base is None:
        base = weights if weights is not None else z
    assert base is not None
    wide = z if z is not None else base
    dtypes = [None if t is None else t.dtype for t in given]
    rows, k = wide.shape[0], 0 if weights is None else weights.shape[1]
    return Shape(base.shape[0], wide.shape[1], rows, k, dtypes)


def sizes_of(shape: Shape) -> list[tuple[int, ...]]:
    """The shape of every input."""
    rows, flat = (shape.tokens, shape.columns), (shape.columns,)
    z, weights = (shape.rows, shape.columns), (shape.tokens, shape.k)
    return [rows, rows, rows, rows, z, weights, rows, flat, flat, (MOST_SLOPES,)]


def backward(
    config: Config, shape: Shape, kept: Given, needs: Sequence[bool], grads: Given
) -> list[Tensor | None]:
    """The gradients of the inputs that need one, from those of out, states and normed."""
    x, *old, z, weights, shared, norm_weight, numbers, after, ahead, statistics, of_row, of_slot = (
        kept
    )
    states = STATES[config.rule]
    grad, *grad_states, grad_normed = grads
    if config.post_norm:
        grad, grad_normed = None, grad
    norm = config.norm if grad_normed is not None else ""
    some = next(g for g in grads if g is not None)
    slopes: list[Tensor | None] = [
        torch.empty(size, dtype=dtype, device=some.device) if need else None
        for size, dtype, need in zip(sizes_of(shape), shape.dtypes, needs)
    ]
    for s in slopes:
        _in_large_pages(s)
    whole = slopes[NUMBERS]
    if whole is not None:
        slopes[NUMBERS] = whole[: SLOPES[config.rule]]
    if shape.tokens == 0:
        return [None if s is None else s.zero_() for s in slopes]
    if not norm:
        for s in (slopes[NORM_WEIGHT], slopes[NORM_BIAS]):
            if s is not None:
                s.zero_()
    loops, values, place = _loops(some, config.numbers, numbers)
    loops.step_backward(
        config.rule, values, shape.dtypes[X if shape.dtypes[X] else Z] is torch.float64,
        shape.tokens, shape.columns, _rows(x), tuple(map(_rows, old[:states])), _rows(z), _rows(weights), of_row,
        of_slot, _rows(shared), norm, _row(norm_weight), config.eps, _rows(after), _rows(ahead), statistics,
        _rows(grad), tuple(map(_rows, grad_states[:states])), _rows(grad_normed), slopes[X],
        tuple(slopes[STATE : STATE + states]), slopes[Z], slopes[WEIGHTS], slopes[SHARED],
        slopes[NORM_WEIGHT] if norm else None, slopes[NORM_BIAS] if norm else None, whole, *place,
    )  # fmt: skip
    return slopes


class Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, config: Config, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        found = forward(config, given, True)
        needs = ctx.needs_input_grad[1:]
        ctx.save_for_backward(*kept_by(config, given, needs, found))
        ctx.config = config._replace(slot_of_row=None, row_of_slot=None)
        ctx.shape = shape_of(config, given)
        ctx.set_materialize_grads(False)
        return (found.out, *found.states, found.normed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second(ctx.config.op)
        needs = ctx.needs_input_grad[1:]
        if all(g is None for g in grads):
            return (None,) * (INPUTS + 1)
        return (None, *backward(ctx.config, ctx.shape, ctx.saved_tensors, needs, grads))


def refuse_second(op: str) -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"[{op}] impl: expected 'reference' for a gradient that is differentiated again (create_graph=True), which "
            "compiled loops do not know. Pass impl='reference': it is plain torch."
        )


def permute_rows(x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
    out = torch.empty((slot_of_row.shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
    _in_large_pages(out)
    look_first("permute", x, slot_of_row, row_of_slot)
    loops, place = _device.loops(x, memory=False)
    if not loops.permute(_rows(x), slot_of_row, row_of_slot, out, *place) and x.is_cpu:
        arguments.look_at_dispatch("permute", slot_of_row, row_of_slot)
    return out


def sum_of_rows(grad: Tensor, slot_of_row: Tensor, row_of_slot: Tensor, tokens: int) -> Tensor:
    """The gradient of ``permute``: of each token the sum over the rows of its slots."""
    out = torch.empty((tokens, grad.shape[1]), dtype=grad.dtype, device=grad.device)
    _in_large_pages(out)
    if tokens:
        loops, numbers, place = _loops(grad, (), None, memory=False)
        loops.step(
            "combine", numbers, grad.dtype is torch.float64, tokens, grad.shape[1], None, (), _rows(grad), None,
            slot_of_row, row_of_slot, None, "", None, None, 0.0, out, (), None, None, *place,
        )  # fmt: skip
    return out


class Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slot_of_row: Tensor, row_of_slot: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of_row, row_of_slot)
        ctx.tokens = x.shape[0]
        return permute_rows(x, slot_of_row, row_of_slot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second("permute")
        slot_of_row, row_of_slot = ctx.saved_tensors
        return sum_of_rows(grad, slot_of_row, row_of_slot, ctx.tokens), None, None


def look_first(
    op: str, like: Tensor, slot_of_row: Tensor | None, row_of_slot: Tensor | None
) -> None:
    """On a GPU and if asked for: raise for a dispatch that the loops would leave out slots of."""
    if slot_of_row is None or row_of_slot is None or like.is_cpu or not environment.checks_on():
        return
    arguments.look_at_dispatch(op, slot_of_row, row_of_slot)


def _loops(
    like: Tensor, numbers: Sequence[float], tensors: Tensor | None, memory: bool = True
) -> tuple[Any, Sequence[float], tuple[Any, ...]]:
    """The loops, the numbers of a rule, and what stands behind the arguments. A GPU reads numbers that are tensors
    itself, so that nothing waits for them."""
    loops, place = _device.loops(like, memory)
    if not place:
        return loops, _values(numbers, tensors), ()
    return loops, numbers, (tensors, *place)


def _values(numbers: Sequence[float], tensors: Tensor | None) -> Sequence[float]:
    """The numbers of the rule, the first of them replaced by those that are tensors."""
    if tensors is None:
        return numbers
    plain.check("moe", "numbers", tensors)
    values: list[float] = tensors.tolist()
    return [*values, *numbers[len(values) :]]


def _rows(x: Tensor | None) -> Tensor | None:
    """The rows with their columns side by side."""
    if x is None or x.stride(1) == 1:
        return x
    return x.contiguous()


def _row(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
