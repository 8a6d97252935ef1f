# SPDX-License-Identifier: Apache-2.0
"""The products of experts for torch: autograd in eager mode, the operators ``hotloop::moe_experts``,
``hotloop::moe_grouped_linear`` and their backwards under torch.compile.

An operator takes the activation as its numbers, and which gradients are wanted as one flag per input.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..front import check
from ..reference.moe.experts import Activation
from . import _experts_cpu, _experts_triton
from ._experts_cpu import Call, Weights
from ._row_pass import refuse_second
from .results import Dispatch

PLACE = Call._fields.index("expert_offsets")
"""Where the tensors of a call begin."""


def loops_of(x: Tensor) -> ModuleType:
    """The compiled loops for the device of x: ``forward``, ``backward``, ``linear``, ``linear_backward``."""
    return _experts_triton if x.is_cuda else _experts_cpu


def experts(
    op: str, given: Weights, dispatch: Dispatch, activation: Activation, transposed: bool, budget: int | None
) -> Tensor:  # fmt: skip
    """``expert_mlp`` and, without weights of choices, ``expert_rows``, on checked arguments."""
    graph = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.hotloop.moe_experts(
            *given, *dispatch, op, *activation, transposed, graph, -1 if budget is None else budget
        )[0]
        return out
    check.untransformed(op, *given)
    call = _call(op, activation, transposed, dispatch)
    keep = _rows_kept(given, call, budget)
    if graph:
        result: Tensor = _Experts.apply(call, keep, *given)
        return result
    found: Tensor = loops_of(given.x).forward(call, given, 0)[0]
    return found


def grouped_linear(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, dispatch: Dispatch | Tensor, transposed: bool
) -> Tensor:  # fmt: skip
    if isinstance(dispatch, Tensor):
        order: tuple[Tensor | None, ...] = (None, None, dispatch, None)
    else:
        order = dispatch
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.hotloop.moe_grouped_linear(x, weight, bias, *order, op, transposed)
        return out
    check.untransformed(op, x, weight, bias)
    call = _linear_call(op, transposed, x, order)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        result: Tensor = _Linear.apply(call, x, weight, bias)
        return result
    found: Tensor = loops_of(x).linear(call, x, weight, bias)
    return found


def _call(op: str, activation: Activation, transposed: bool, dispatch: Sequence[Tensor]) -> Call:
    slot_of_row, row_of_slot, offsets, counts = (t.detach().contiguous() for t in dispatch)
    rows = slot_of_row.shape[0]
    return Call(op, activation, transposed, rows, offsets, counts, slot_of_row, row_of_slot)


def _linear_call(op: str, transposed: bool, x: Tensor, order: Sequence[Tensor | None]) -> Call:
    slot_of_row, row_of_slot, offsets, counts = (
        None if t is None else t.detach().contiguous() for t in order
    )
    assert offsets is not None
    return Call(op, Activation(), transposed, x.shape[0], offsets, counts, slot_of_row, row_of_slot)


def _rows_kept(given: Weights, call: Call, budget: int | None) -> int:
    width = given.gate_up.shape[2 if call.transposed else 1]
    return _kept(call.rows, width * given.x.element_size(), -1 if budget is None else budget)


def _kept(rows: int, bytes_of_row: int, budget: int) -> int:
    """How many rows of the first product a budget keeps; -1 is no limit."""
    if budget < 0 or bytes_of_row == 0:
        return rows
    return torch.sym_min(rows, budget // bytes_of_row)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, keep: int, *given: Tensor | None) -> Tensor:
        weights = Weights._make(given)
        out, kept = loops_of(weights.x).forward(call, weights, keep)
        _save(ctx, call, weights, kept)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call, given, kept = _saved(ctx)
        refuse_second(call.op)
        *needs, of_shared = ctx.needs_input_grad[2:]
        found = loops_of(grad).backward(call, given, kept, grad, needs)
        return (None, None, *found, grad if of_shared else None)


def _save(ctx: Any, call: Call, given: Weights, kept: Tensor) -> None:
    ctx.save_for_backward(*given[:-1], kept, *call[PLACE:])
    ctx.options = call[:PLACE]


def _saved(ctx: Any) -> tuple[Call, Weights, Tensor]:
    *given, kept, offsets, counts, slot_of_row, row_of_slot = ctx.saved_tensors
    call = Call._make((*ctx.options, offsets, counts, slot_of_row, row_of_slot))
    return call, Weights._make((*given, None)), kept


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        found: Tensor = loops_of(x).linear(call, x, weight, bias)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second(ctx.call.op)
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        return (None, *loops_of(x).linear_backward(ctx.call, x, weight, grad, needs))


# -- registered forms, for torch.compile ------------------------------------------------------------------


@torch.library.custom_op("hotloop::moe_experts", mutates_args=())
def _experts_op(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    shared: Tensor | None,
    slot_of_row: Tensor,
    row_of_slot: Tensor,
    expert_offsets: Tensor,
    expert_counts: Tensor,
    op: str,
    kind: str,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    shift: float,
    transposed: bool,
    graph: bool,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """The result, and what is kept of the first product. A budget below 0 is none."""
    given = Weights(x, gate_up, down, topk_weights, gate_up_bias, down_bias, shared)
    activation = Activation(kind, interleaved, limit, alpha, shift)
    dispatch = (slot_of_row, row_of_slot, expert_offsets, expert_counts)
    call = _call(op, activation, transposed, dispatch)
    keep = _rows_kept(given, call, None if budget < 0 else budget) if graph else 0
    found: tuple[Tensor, Tensor] = loops_of(x).forward(call, given, keep)
    return found


@_experts_op.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, topk_weights: Any, *rest: Any) -> Any:
    slot_of_row, (transposed, graph, budget) = rest[3], rest[-3:]
    rows, width = slot_of_row.shape[0], gate_up.shape[2 if transposed else 1]
    keep = _kept(rows, width * x.element_size(), budget) if graph else 0
    tokens = rows if topk_weights is None else x.shape[0]
    return x.new_empty((tokens, x.shape[1])), x.new_empty((keep, width))


@torch.library.custom_op("hotloop::moe_experts_backward", mutates_args=())
def _experts_backward_op(
    grad: Tensor,
    kept: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    slot_of_row: Tensor,
    row_of_slot: Tensor,
    expert_offsets: Tensor,
    expert_counts: Tensor,
    op: str,
    kind: str,
    interleaved: bool,
    limit: float | None,
    alpha: float,
    shift: float,
    transposed: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, but for that of ``shared``, which is that of the result."""
    given = Weights(x, gate_up, down, topk_weights, gate_up_bias, down_bias, None)
    activation = Activation(kind, interleaved, limit, alpha, shift)
    dispatch = (slot_of_row, row_of_slot, expert_offsets, expert_counts)
    call = _call(op, activation, transposed, dispatch)
    found = loops_of(x).backward(call, given, kept, grad, needs)
    return [t for t in found if t is not None]


@_experts_backward_op.register_fake
def _(grad: Tensor, kept: Tensor, *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, need in zip(rest, rest[-1]) if need]


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *given, op, kind, interleaved, limit, alpha, shift, transposed, _graph, _budget = inputs
    ctx.save_for_backward(*given[:6], *given[7:], output[1])
    ctx.options = (op, kind, interleaved, limit, alpha, shift, transposed)


def _experts_backward(ctx: Any, grad: Tensor, _kept: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second(ctx.options[0])
    *given, kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:6])
    found: list[Tensor | None] = [None] * 6
    if any(needs):
        made = iter(torch.ops.hotloop.moe_experts_backward(grad, kept, *given, *ctx.options, needs))
        found = [next(made) if need else None for need in needs]
    return (*found, grad if ctx.needs_input_grad[6] else None, *[None] * 13)


_experts_op.register_autograd(_experts_backward, setup_context=_experts_setup)


@torch.library.custom_op("hotloop::moe_grouped_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slot_of_row: Tensor | None,
    row_of_slot: Tensor | None,
    expert_offsets: Tensor,
    expert_counts: Tensor | None,
    op: str,
    transposed: bool,
) -> Tensor:
    order = (slot_of_row, row_of_slot, expert_offsets, expert_counts)
    found: Tensor = loops_of(x).linear(_linear_call(op, transposed, x, order), x, weight, bias)
    return found


@_linear_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[2 if rest[-1] else 1]))


@torch.library.custom_op("hotloop::moe_grouped_linear_backward", mutates_args=())
def _linear_backward_op(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    slot_of_row: Tensor | None,
    row_of_slot: Tensor | None,
    expert_offsets: Tensor,
    expert_counts: Tensor | None,
    op: str,
    transposed: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    call = _linear_call(
        op, transposed, x, (slot_of_row, row_of_slot, expert_offsets, expert_counts)
    )
    found = loops_of(x).linear_backward(call, x, weight, grad, needs)
    return [t for t in found if t is not None]


@_linear_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    shapes = (x.shape, weight.shape, (weight.shape[0], grad.shape[1]))
    return [x.new_empty(shape) for shape, need in zip(shapes, rest[-1]) if need]


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, *order, op, transposed = inputs
    ctx.save_for_backward(x, weight, *order)
    ctx.options = (op, transposed)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second(ctx.options[0])
    needs = list(ctx.needs_input_grad[:3])
    made = iter(
        torch.ops.hotloop.moe_grouped_linear_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    )
    return (*[next(made) if need else None for need in needs], *[None] * 6)


_linear_op.register_autograd(_linear_backward, setup_context=_linear_setup)
