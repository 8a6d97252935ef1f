# SPDX-License-Identifier: Apache-2.0
"""The segment loops for torch: autograd in eager mode, the operators ``hotloop::segment_reduce``, ``segment_spread``
and ``counting_sort`` under torch.compile.

The gradient of a reduction is one number per segment, spread over its rows, so nothing of the size of the values is
kept but for ``segment_logsumexp``. Asked for a graph (``create_graph=True``), backward writes the same in torch ops.
"""

from __future__ import annotations

from collections.abc import Sequence
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


_Kept = tuple[Tensor | None, ...]
"""What a gradient needs of its reduction, else None: offsets, ids, mask, values, out, counts, rows."""
_Call = tuple[str, int, int, torch.dtype]
"""Reduction, number of segments, number of rows, dtype of the values."""


def _keep(
    reduction: str, values: Tensor, groups: Groups, out: Tensor, counts: Any, rows: Any
) -> tuple[_Kept, _Call]:
    segments, offsets, ids, mask = groups
    exponents = (values, out) if reduction == "logsumexp" else (None, None)
    counts = counts if reduction == "mean" else None
    rows = rows if reduction in ("max", "min") else None
    call = (reduction, segments, values.shape[0], values.dtype)
    return (offsets, ids, mask, *exponents, counts, rows), call


def _spread(grad: Tensor, kept: _Kept, call: _Call) -> Tensor:
    """The gradient of the values, (n,) or (n, d), from that of the result."""
    reduction, segments, n, dtype = call
    result = torch.empty((n, *grad.shape[1:]), dtype=dtype, device=grad.device)
    offsets, ids, mask, values, out, counts, rows = kept
    groups = (segments, offsets, ids, mask)
    arguments = (reduction, grad.contiguous(), *groups, counts, rows, values, out, result)
    if grad.is_cpu:
        native.core.segments.spread(*arguments)
    else:
        native.cuda.segments.spread(*arguments, *native.stream_of(grad))
    return result


def _spread_graph(grad: Tensor, kept: _Kept, call: _Call) -> Tensor:
    """The same in torch ops, to be differentiated again."""
    _, segments, n, dtype = call
    offsets, ids, mask, values, out, counts, rows = kept
    if rows is not None:
        flat, columns = rows.reshape(segments, -1), grad.reshape(segments, -1)
        # A row more takes what belongs to none.
        zeros = torch.zeros((n + 1, flat.shape[1]), dtype=grad.dtype, device=grad.device)
        spread = zeros.scatter(0, torch.where(flat < 0, n, flat), columns)[:n]
        return spread.reshape(n, *grad.shape[1:]).to(dtype)
    if offsets is not None:
        each = torch.arange(segments, device=grad.device)
        ids = torch.repeat_interleave(each, offsets.diff(), output_size=n)
    assert ids is not None
    if counts is not None:
        divisor = counts.clamp(min=1).to(grad.dtype)
        grad = grad / (divisor if grad.ndim == 1 else divisor[:, None])
    result = grad.index_select(0, ids)
    if out is not None and values is not None:
        lse = out.index_select(0, ids)
        weight = (values.to(grad.dtype) - lse).exp()
        result = result * torch.where(lse == -torch.inf, 0.0, weight)
    if mask is not None:
        keep = mask.bool()
        result = torch.where(keep if grad.ndim == 1 else keep[:, None], result, 0.0)
    return result.to(dtype)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, groups: Groups, reduction: str) -> Tensor:
        out, counts, rows = forward(reduction, values, groups, True)
        kept, ctx.call = _keep(reduction, values, groups, out, counts, rows)
        ctx.save_for_backward(*kept)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = _spread_graph if torch.is_grad_enabled() else _spread
        return run(grad, ctx.saved_tensors, ctx.call), None, None


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
def _(values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_groups, count, reduction = rest
    shape = (count, *values.shape[1:])
    return (
        values.new_empty(shape, dtype=_maths(values.dtype)),
        values.new_empty((count,) if reduction == "mean" else (0,), dtype=torch.int64),
        values.new_empty(shape if reduction in ("max", "min") else (0,), dtype=torch.int64),
    )


@torch.library.custom_op("hotloop::segment_spread", mutates_args=())
def _spread_op(
    grad: Tensor,
    kept: Sequence[Tensor | None],
    reduction: str,
    segments: int,
    n: int,
    dtype: torch.dtype,
) -> Tensor:
    return _spread(grad, tuple(kept), (reduction, segments, n, dtype))


@_spread_op.register_fake
def _(grad: Tensor, _kept: Any, *call: Any) -> Tensor:
    *_, n, dtype = call
    return grad.new_empty((n, *grad.shape[1:]), dtype=dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    values, offsets, ids, mask, count, reduction = inputs
    kept, ctx.call = _keep(reduction, values, Groups(count, offsets, ids, mask), *output)
    ctx.save_for_backward(*kept)


def _backward(ctx: Any, grad: Tensor, _counts: Tensor, _rows: Tensor) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors
    if torch.is_grad_enabled():
        found = _spread_graph(grad, kept, ctx.call)
    else:
        found = torch.ops.hotloop.segment_spread(grad, list(kept), *ctx.call)
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
