# SPDX-License-Identifier: Apache-2.0
"""Segment reductions and the counting sort on checked arguments, in plain torch or NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..front import arrays
from ..front.needs import missing_torch


def counting_sort(keys: Any, num_keys: int, order_only: bool) -> Any:
    numbers = arrays.to_numpy(keys)
    order = arrays.from_numpy(np.argsort(numbers, kind="stable"), keys)
    if order_only:
        return order, None, None
    counts = np.bincount(numbers, minlength=num_keys)
    offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(counts)))
    return order, arrays.from_numpy(counts, keys), arrays.from_numpy(offsets, keys)


def reduce_rows(reduction: str, values: Any, count: int, offsets: Any, ids: Any, mask: Any) -> Any:
    """The reductions of (n,) or (n, d) values in plain torch, NumPy arrays too."""
    torch = _torch()
    if isinstance(values, np.ndarray):
        given = [
            None if x is None else torch.from_numpy(np.ascontiguousarray(x))
            for x in (values, offsets, ids, mask)
        ]
        return reduce_rows(reduction, given[0], count, *given[1:]).numpy()
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
    flat = x.reshape(x.shape[0], math.prod(x.shape[1:]))
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
