# SPDX-License-Identifier: Apache-2.0
"""The compiled segment loops on checked arguments, for torch, NumPy and CuPy arrays alike."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..front import arrays, check, environment, native


class SortedKeys(NamedTuple):
    """What ``counting_sort`` returns; ``counts`` and ``offsets`` are None with ``order_only``."""

    order: Any
    """(n,) int64: positions of the keys in rising order, equal keys as they came."""
    counts: Any
    """(num_keys,) int64: how often each key occurs."""
    offsets: Any
    """(num_keys + 1,) int64: where the run of each key begins in ``order``, the ``cu_seqlens`` of the runs."""


class Groups(NamedTuple):
    """Checked groups of n rows: offsets or ids, the other is None."""

    segments: int
    offsets: Any
    ids: Any
    mask: Any


def sort(op: str, name: str, keys: Any, num_keys: int, order_only: bool = False) -> SortedKeys:
    """Run the compiled loop on checked keys."""
    keys = arrays.dense(keys)
    order = arrays.empty(keys, tuple(keys.shape), "int64")
    counts = offsets = None
    if not order_only:
        counts = arrays.empty(keys, (num_keys,), "int64")
        offsets = arrays.empty(keys, (num_keys + 1,), "int64")
    if arrays.device(keys) == "cpu":
        if native.core.segments.counting_sort(keys, num_keys, order, counts, offsets) >= 0:
            look_at_keys(op, name, keys, num_keys)
        return SortedKeys(order, counts, offsets)
    if environment.checks_on():
        look_at_keys(op, name, keys, num_keys)
    loops = native.cuda.segments
    n = keys.shape[0]
    other = arrays.empty(keys, (n,), "int64") if num_keys > 256 else None
    starts = arrays.empty(keys, (256 * (-(-n // loops.SORT_TILE) + 1),), "int64")
    place = native.stream_of(keys)
    loops.counting_sort(keys, num_keys, order, counts, offsets, other, starts, *place)
    return SortedKeys(order, counts, offsets)


def look_at_keys(op: str, name: str, keys: Any, num_keys: int) -> None:
    """Raise if a key lies outside [0, num_keys)."""
    outside = (keys < 0) | (keys >= num_keys)
    check.refuse(op, name, keys, outside, f"0 to {num_keys - 1}", "Leave such rows out first.")


def look_at_groups(op: str, n: int, groups: Groups) -> None:
    """Raise if an id is out of range or offsets do not rise from 0 to n."""
    if groups.ids is not None:
        return look_at_keys(op, "segment_ids", groups.ids, groups.segments)
    found = groups.offsets
    if int(found[0]) != 0 or int(found[-1]) != n or bool((found[1:] < found[:-1]).any()):
        some = found.tolist()
        text = some if len(some) <= 16 else [*some[:8], "...", *some[-4:]]
        raise ValueError(
            f"[{op}] cu_seqlens: expected offsets that rise from 0 to {n}, the number of values, got {text}."
        )


def maths_dtype(values: Any) -> str:
    """What values are reduced in, and results are."""
    return "float64" if arrays.dtype(values) == "float64" else "float32"


def forward(
    reduction: str, values: Any, groups: Groups, backward: bool
) -> tuple[Any, Any | None, Any | None]:
    """Run the compiled loop: the result, and what its gradient needs, counts (mean) and rows (max and min)."""
    shape = (groups.segments, *values.shape[1:])
    out = arrays.empty(values, shape, maths_dtype(values))
    counts = rows = None
    if backward and reduction == "mean":
        counts = arrays.empty(values, (groups.segments,), "int64")
    elif backward and reduction in ("max", "min"):
        rows = arrays.empty(values, shape, "int64")
    op = f"segment_{reduction}"
    if arrays.device(values) == "cpu":
        if not native.core.segments.reduce(reduction, values, *groups, out, counts, rows):
            look_at_groups(op, values.shape[0], groups)
        return out, counts, rows
    if environment.checks_on():
        look_at_groups(op, values.shape[0], groups)
    loops = native.cuda.segments
    count, offsets, ids, mask = groups
    order = None
    if ids is not None:
        order, _, offsets = sort(op, "segment_ids", ids, count)
    columns = values.shape[1] if values.ndim == 2 else 1
    tiles = -(-values.shape[0] // loops.TILE)
    parts = arrays.empty(values, (6 * tiles * columns,), "float64")
    place = native.stream_of(values)
    loops.reduce(reduction, values, count, offsets, order, mask, out, counts, rows, parts, *place)
    return out, counts, rows
