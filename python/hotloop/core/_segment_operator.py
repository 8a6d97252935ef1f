"""The segment loops for torch: autograd in eager mode, the operators ``hotloop::segment_reduce``, ``segment_spread``
and ``counting_sort`` under torch.compile.

The gradient of a reduction is one number per segment, spread over its rows, so nothing of the size of the values is
kept but for ``segment_logsumexp``. Asked for a graph (``create_graph=True``), backward writes the same in torch ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..front import arrays, check, native
from .segment_loops import Groups, SortedKeys, forward, sort


def reduce(op: str, reduction: str, values: Tensor, groups: Groups) -> Tensor:
    """``values`` (n,) or (n, d), checked."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.hotloop.segment_reduce(
            values, groups.offsets, groups.ids, groups.mask, groups.segments, reduction
        )[0]
        return out
    check.untransformed(op, values)
    if not (values.requires_grad and torch.is_grad_enabled()):
        result: Tensor = forward(reduction, values, groups, False)[0]
        return result
    reduced: Tensor = _Reduce.apply(values, groups, reduction)
    return reduced


def spread(
    reduction: str,
    grad: Tensor,
    groups: Groups,
    values: Tensor | None,
    out: Tensor | None,
    counts: Tensor | None,
    rows: Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the values, (n,) or (n, d), from that of the result."""
    result = torch.empty((n, *grad.shape[1:]), dtype=dtype, device=grad.device)
    arguments = (reduction, grad.contiguous(), *groups, counts, rows, values, out, result)
    if grad.is_cpu:
        native.core.segments.spread(*arguments)
    else:
        native.cuda.segments.spread(*arguments, *native.stream_of(grad))
    return result


def _spread_graph(
    reduction: str,
    grad: Tensor,
    groups: Groups,
    values: Tensor | None,
    out: Tensor | None,
    counts: Tensor | None,
    rows: Tensor | None,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    """The same in torch ops, to be differentiated again."""
    if rows is not None:
        flat, columns = rows.reshape(groups.segments, -1), grad.reshape(groups.segments, -1)
        # A row more takes what belongs to none.
        zeros = torch.zeros((n + 1, flat.shape[1]), dtype=grad.dtype, device=grad.device)
        spread = zeros.scatter(0, torch.where(flat < 0, n, flat), columns)[:n]
        return spread.reshape(n, *grad.shape[1:]).to(dtype)
    owner = groups.ids
    if owner is None:
        owner = torch.repeat_interleave(
            torch.arange(groups.segments, device=grad.device), groups.offsets.diff(), output_size=n
        )
    if counts is not None:
        divisor = counts.clamp(min=1).to(grad.dtype)
        grad = grad / (divisor if grad.ndim == 1 else divisor[:, None])
    result = grad.index_select(0, owner)
    if out is not None and values is not None:
        lse = out.index_select(0, owner)
        weight = (values.to(grad.dtype) - lse).exp()
        result = result * torch.where(lse == -torch.inf, 0.0, weight)
    if groups.mask is not None:
        keep = groups.mask.bool()
        result = torch.where(keep if grad.ndim == 1 else keep[:, None], result, 0.0)
    return result.to(dtype)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, groups: Groups, reduction: str) -> Tensor:
        out, counts, rows = forward(reduction, values, groups, True)
        softmax = reduction == "logsumexp"
        ctx.save_for_backward(
            groups.offsets, groups.ids, groups.mask,
            values if softmax else None, out if softmax else None, counts, rows,
        )  # fmt: skip
        ctx.rest = reduction, groups.segments, values.shape[0], values.dtype
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        offsets, ids, mask, values, out, counts, rows = ctx.saved_tensors
        reduction, count, n, dtype = ctx.rest
        run = _spread_graph if torch.is_grad_enabled() else spread
        groups = Groups(count, offsets, ids, mask)
        return run(reduction, grad, groups, values, out, counts, rows, n, dtype), None, None


# -- registered forms, for torch.compile ------------------------------------------------------------------


def _maths(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.custom_op("hotloop::segment_reduce", mutates_args=())
def _reduce_op(
    values: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    count: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and counts and rows for its gradient, of no element where it needs none."""
    out, counts, rows = forward(reduction, values, Groups(count, offsets, ids, mask), True)
    nothing = [
        torch.empty(0, dtype=torch.int64, device=values.device) if x is None else x
        for x in (counts, rows)
    ]
    return out, nothing[0], nothing[1]


@_reduce_op.register_fake
def _(
    values: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    count: int,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (count, *values.shape[1:])
    return (
        values.new_empty(shape, dtype=_maths(values.dtype)),
        values.new_empty((count,) if reduction == "mean" else (0,), dtype=torch.int64),
        values.new_empty(shape if reduction in ("max", "min") else (0,), dtype=torch.int64),
    )


@torch.library.custom_op("hotloop::segment_spread", mutates_args=())
def _spread_op(
    grad: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    values: Tensor | None,
    out: Tensor | None,
    counts: Tensor | None,
    rows: Tensor | None,
    n: int,
    count: int,
    dtype: torch.dtype,
    reduction: str,
) -> Tensor:
    groups = Groups(count, offsets, ids, mask)
    return spread(reduction, grad, groups, values, out, counts, rows, n, dtype)


@_spread_op.register_fake
def _(
    grad: Tensor,
    offsets: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    values: Tensor | None,
    out: Tensor | None,
    counts: Tensor | None,
    rows: Tensor | None,
    n: int,
    count: int,
    dtype: torch.dtype,
    reduction: str,
) -> Tensor:
    return grad.new_empty((n, *grad.shape[1:]), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    values, offsets, ids, mask, count, reduction = inputs
    softmax = reduction == "logsumexp"
    ctx.save_for_backward(
        offsets, ids, mask,
        values if softmax else None, output[0] if softmax else None,
        output[1] if reduction == "mean" else None, output[2] if reduction in ("max", "min") else None,
    )  # fmt: skip
    ctx.rest = reduction, count, values.shape[0], values.dtype


def _backward(ctx: Any, grad: Tensor, _counts: Tensor, _rows: Tensor) -> tuple[Tensor | None, ...]:
    offsets, ids, mask, values, out, counts, rows = ctx.saved_tensors
    reduction, count, n, dtype = ctx.rest
    if torch.is_grad_enabled():
        groups = Groups(count, offsets, ids, mask)
        found = _spread_graph(reduction, grad, groups, values, out, counts, rows, n, dtype)
    else:
        found = torch.ops.hotloop.segment_spread(
            grad, offsets, ids, mask, values, out, counts, rows, n, count, dtype, reduction
        )
    return found, None, None, None, None, None


_reduce_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("hotloop::counting_sort", mutates_args=())
def _sort_op(keys: Tensor, num_keys: int, order_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return order, counts and offsets; the last two of no element with ``order_only``."""
    order, counts, offsets = sort("counting_sort", "keys", keys, num_keys, order_only)
    if order_only:
        counts, offsets = (arrays.empty(keys, (0,), "int64") for _ in range(2))
    return order, counts, offsets


@_sort_op.register_fake
def _(keys: Tensor, num_keys: int, order_only: bool) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (keys.shape[0], 0 if order_only else num_keys, 0 if order_only else num_keys + 1)
    order, counts, offsets = (keys.new_empty((size,), dtype=torch.int64) for size in sizes)
    return order, counts, offsets


def compiled_sort(keys: Tensor, num_keys: int, order_only: bool) -> SortedKeys:
    order, counts, offsets = torch.ops.hotloop.counting_sort(keys, num_keys, order_only)
    return SortedKeys(order, None if order_only else counts, None if order_only else offsets)
