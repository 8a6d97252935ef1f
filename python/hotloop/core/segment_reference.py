"""Segment reductions and the counting sort in plain torch or NumPy: what ``hotloop.reference.core`` names."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..front import arrays
from ..front.needs import missing_torch


def counting_sort(keys: Any, num_keys: int, *, order_only: bool = False) -> Any:
    numbers = arrays.to_numpy(keys)
    order = arrays.from_numpy(np.argsort(numbers, kind="stable"), keys)
    if order_only:
        return order, None, None
    counts = np.bincount(numbers, minlength=num_keys)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
    return order, arrays.from_numpy(counts, keys), arrays.from_numpy(offsets, keys)


def segment_sum(
    values: Any,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: Any = None,
    mask: Any = None,
) -> Any:
    return _reduce("sum", values, cu_seqlens, segment_ids, num_segments, mask)


def segment_mean(
    values: Any,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: Any = None,
    mask: Any = None,
) -> Any:
    return _reduce("mean", values, cu_seqlens, segment_ids, num_segments, mask)


def segment_max(
    values: Any,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: Any = None,
    mask: Any = None,
) -> Any:
    return _reduce("max", values, cu_seqlens, segment_ids, num_segments, mask)


def segment_min(
    values: Any,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: Any = None,
    mask: Any = None,
) -> Any:
    return _reduce("min", values, cu_seqlens, segment_ids, num_segments, mask)


def segment_logsumexp(
    values: Any,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: Any = None,
    mask: Any = None,
) -> Any:
    return _reduce("logsumexp", values, cu_seqlens, segment_ids, num_segments, mask)


def _reduce(reduction: str, values: Any, cu_seqlens: Any, ids: Any, count: Any, mask: Any) -> Any:
    """One group after the other where no front door has looked: offsets are those of (B, T) without any."""
    if cu_seqlens is None and ids is None:
        batch, length = values.shape[:2]
        cu_seqlens = arrays.arange(values, batch + 1) * length
        values, mask = values.reshape(batch * length, *values.shape[2:]), mask.reshape(-1)
    if ids is None:
        count = cu_seqlens.shape[0] - 1
    return reduce_rows(reduction, values, count, cu_seqlens, ids, mask)


def reduce_rows(reduction: str, values: Any, count: int, offsets: Any, ids: Any, mask: Any) -> Any:
    """The reductions of (n,) or (n, d) values in plain torch, NumPy arrays too."""
    if isinstance(values, np.ndarray):
        torch = _torch()
        given = [
            None if x is None else torch.from_numpy(np.ascontiguousarray(x))
            for x in (values, offsets, ids, mask)
        ]
        return reduce_rows(reduction, given[0], count, *given[1:]).numpy()
    torch = _torch()
    x = values if values.dtype == torch.float64 else values.float()
    n = x.shape[0]
    if ids is None:
        ids = torch.repeat_interleave(
            torch.arange(count, device=x.device), offsets.diff().long(), output_size=n
        )
    ids, at = ids.long(), torch.arange(n, device=x.device)
    if mask is not None:
        at = mask.bool().nonzero().squeeze(1)
        x, ids = x[at], ids[at]
    flat = (
        x.reshape(x.shape[0], -1) if x.numel() else x.reshape(x.shape[0], int(np.prod(x.shape[1:])))
    )
    zeros = flat.new_zeros((count, flat.shape[1]))
    if reduction in ("sum", "mean"):
        out = zeros.index_add(0, ids, flat)
        if reduction == "mean":
            out = out / torch.bincount(ids, minlength=count).clamp(min=1)[:, None]
    else:
        sign = -1.0 if reduction == "min" else 1.0
        largest, first = _largest(sign * flat.detach(), ids, count)
        if reduction == "logsumexp":
            shift = torch.where(largest.isfinite(), largest, 0.0)
            total = zeros.index_add(0, ids, (flat - shift[ids]).exp())
            none = total == 0
            out = torch.where(none, -torch.inf, shift + torch.where(none, 1.0, total).log())
        else:
            padded = torch.cat((flat, flat.new_full((1, flat.shape[1]), -torch.inf * sign)))
            out = padded.gather(0, first)
    return out.reshape(count, *x.shape[1:])


def _largest(x: Any, ids: Any, count: int) -> tuple[Any, Any]:
    """The largest of each group and column, NaN if there is one, and the first row that has it; else len(x)."""
    torch = _torch()
    index = ids[:, None].expand_as(x)
    largest = x.new_full((count, x.shape[1]), -torch.inf).scatter_reduce(0, index, x, "amax")
    reached = largest[ids]
    has = (x == reached) | (x.isnan() & reached.isnan())
    rows = torch.where(has, torch.arange(len(x), device=x.device)[:, None], len(x))
    first = torch.full((count, x.shape[1]), len(x), dtype=torch.int64, device=x.device)
    return largest, first.scatter_reduce(0, index, rows, "amin")


def _torch() -> Any:
    try:
        import torch
    except ImportError:
        raise missing_torch("segment reductions by impl='reference'") from None
    return torch
