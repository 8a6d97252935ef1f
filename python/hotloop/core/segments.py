# SPDX-License-Identifier: Apache-2.0
"""Reductions over ragged groups, and the stable counting sort that makes groups of ids.

The groups of an op are named in one of three ways: ``cu_seqlens``, offsets of groups that lie side by side;
``segment_ids``, the group of every value, in any order; or a ``mask`` over (B, T), whose rows are the groups. Torch
tensors go through ``_segment_operator``, which knows autograd and torch.compile; NumPy arrays come straight here.
"""

from __future__ import annotations

from typing import Any

from ..front import arrays, check
from ..front import impl as _impl
from ..front.arrays import Array
from ..front.impl import Impl
from ..vocabulary import like
from . import segment_reference
from .segment_loops import Groups, forward, look_at_groups, look_at_keys, sort
from .segment_loops import SortedKeys as SortedKeys

CANDIDATES = {"cuda": _impl.on_cuda, "cpu": _impl.on_cpu, "reference": _impl.everywhere}
MASKS = ("bool", "uint8", "int32", "int64")


def segment_sum(
    values: Array,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: int | None = None,
    mask: Any = None,
    impl: Impl = "auto",
) -> Array:
    """Sum of every group of values; 0 for a group without values.

    out_s = sum of the values i of group s, added in an order that depends on the shape alone, in float32 over blocks of
    a few hundred values and in float64 over blocks. The same bits for any number of threads.

    Args:
        values: (n,) or (n, d); (B, T) or (B, T, d) where only a mask is given. float32, float64, float16 or bfloat16,
            any strides. torch tensors are differentiable.
        cu_seqlens: (segments + 1,) int32 or int64 offsets that rise from 0 to n: group s is the values cu_seqlens[s] to
            cu_seqlens[s + 1] - 1. Default None.
        segment_ids: (n,) int32 or int64, in any order: the group of each value, 0 to num_segments - 1. Costs a
            counting sort. Default None.
        num_segments: number of groups, >= 0; needed beside segment_ids.
        mask: (n,), or (B, T) in place of the two above: values where it is 0 or False are left out, NaN among them.
            bool, uint8, int32 or int64. Default None.
        impl: "auto", "cpu", "cuda" or "reference".

    Returns:
        (segments,) or (segments, d), float32 (float64 for float64 values), of the kind of ``values``.

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device; none or two of cu_seqlens and
            segment_ids; offsets that do not rise from 0 to n; an id out of range. Numbers on a GPU are looked at with
            HOTLOOP_CHECK=1 only, as are NaN and infinity among the values.
        NotImplementedError: a forced ``impl`` that cannot run; torch.func transforms.

    Examples:
        >>> import numpy as np
        >>> x = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
        >>> segment_sum(x, np.array([0, 1, 1, 4])).tolist()
        [1.0, 0.0, 9.0]
        >>> segment_sum(x, segment_ids=np.array([1, 0, 1, 0]), num_segments=2).tolist()
        [6.0, 4.0]

    Reference:
        Definition.
    """
    return _reduce("sum", values, cu_seqlens, segment_ids, num_segments, mask, impl)


@like(segment_sum)
def segment_mean(
    values: Array,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: int | None = None,
    mask: Any = None,
    impl: Impl = "auto",
) -> Array:
    """Mean of every group of values; 0 for a group without values, with no gradient.

    out_s = segment_sum_s / number of values that count. torch.segment_reduce gives NaN for an empty group; the masked
    means of verl and TRL and torch_scatter give 0, which does not spoil a batch by a group that nothing fell into.

    Examples:
        >>> segment_mean(np.array([1.0, 3.0, 9.0], np.float32), np.array([0, 2, 2, 3])).tolist()
        [2.0, 0.0, 9.0]
        >>> segment_mean(np.array([[1.0, 3.0, 9.0]], np.float32), mask=np.array([[1, 1, 0]])).tolist()
        [2.0]

    Reference:
        Definition.
    """
    return _reduce("mean", values, cu_seqlens, segment_ids, num_segments, mask, impl)


@like(segment_sum)
def segment_max(
    values: Array,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: int | None = None,
    mask: Any = None,
    impl: Impl = "auto",
) -> Array:
    """Largest value of every group; -inf for a group without values, NaN for one that holds NaN.

    The gradient goes to the first of the largest values, or to the first NaN, as in torch.max over a dimension.
    torch.segment_reduce divides it among equal values.

    Examples:
        >>> segment_max(np.array([1.0, 5.0, 3.0], np.float32), np.array([0, 2, 2, 3])).tolist()
        [5.0, -inf, 3.0]

    Reference:
        Definition.
    """
    return _reduce("max", values, cu_seqlens, segment_ids, num_segments, mask, impl)


@like(segment_sum)
def segment_min(
    values: Array,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: int | None = None,
    mask: Any = None,
    impl: Impl = "auto",
) -> Array:
    """Smallest value of every group; inf for a group without values, NaN for one that holds NaN.

    The gradient goes to the first of the smallest values, or to the first NaN.

    Examples:
        >>> segment_min(np.array([1.0, 5.0, 3.0], np.float32), np.array([0, 2, 2, 3])).tolist()
        [1.0, inf, 3.0]

    Reference:
        Definition.
    """
    return _reduce("min", values, cu_seqlens, segment_ids, num_segments, mask, impl)


@like(segment_sum)
def segment_logsumexp(
    values: Array,
    cu_seqlens: Any = None,
    *,
    segment_ids: Any = None,
    num_segments: int | None = None,
    mask: Any = None,
    impl: Impl = "auto",
) -> Array:
    """log of the sum of exp(value) of every group; -inf for a group without values.

    out_s = m_s + log(sum exp(value_i - m_s)), m_s the largest value of group s: no overflow. Its gradient is the
    softmax of the group. A group of -inf only gives -inf with gradient 0; in torch.logsumexp the gradient is NaN.

    Examples:
        >>> segment_logsumexp(np.zeros(3, np.float32), np.array([0, 2, 3])).round(4).tolist()
        [0.6930999755859375, 0.0]

    Reference:
        Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    return _reduce("logsumexp", values, cu_seqlens, segment_ids, num_segments, mask, impl)


def counting_sort(
    keys: Any, num_keys: int, *, order_only: bool = False, impl: Impl = "auto"
) -> SortedKeys:
    """Stable order of small integer keys: equal keys stay as they came.

    Counts of ranges of the keys, their sums, and one write per key: O(n + num_keys). ``keys[order]`` rises, and the run
    of key k is ``order[offsets[k]:offsets[k + 1]]``. Above 65536 keys least significant digits are sorted first, 11
    bits (on a GPU 8) a pass, so that working memory is O(n) whatever num_keys is; the results alone, unless
    ``order_only``, have num_keys numbers.

    Args:
        keys: (n,), int32 or int64, 0 to num_keys - 1.
        num_keys: >= 0.
        order_only: leave counts and offsets out, for keys of a large range. Default False.
        impl: "auto", "cpu", "cuda" or "reference".

    Returns:
        ``SortedKeys``: order (n,), counts (num_keys,) and offsets (num_keys + 1,), int64, of the kind of ``keys``.

    Raises:
        TypeError, ValueError: keys of another dtype or shape, or out of range (on a GPU with HOTLOOP_CHECK=1 only).
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import numpy as np
        >>> order, counts, offsets = counting_sort(np.array([2, 0, 2, 1]), 4)
        >>> order.tolist(), counts.tolist(), offsets.tolist()
        ([1, 3, 0, 2], [1, 1, 2, 0], [0, 1, 2, 4, 4])

    Reference:
        Seward 1954; Knuth, The Art of Computer Programming 3, section 5.2.
    """
    op = "counting_sort"
    check.array(op, "keys", keys, arrays.INTEGERS, 1)
    check.integer(op, "num_keys", num_keys, at_least=0, at_most=2**62)
    order_only = check.flag(op, "order_only", order_only)
    if _impl.choose(op, impl, "keys", keys, CANDIDATES) == "reference":
        if not arrays.compiling():
            look_at_keys(op, "keys", keys, num_keys)
        return SortedKeys(*segment_reference.counting_sort(keys, num_keys, order_only))
    if arrays.compiling():
        from . import _segment_operator

        return _segment_operator.compiled_sort(keys, num_keys, order_only)
    return sort(op, "keys", keys, num_keys, order_only)


def _reduce(
    reduction: str,
    values: Any,
    cu_seqlens: Any,
    segment_ids: Any,
    num_segments: int | None,
    mask: Any,
    impl: Impl,
) -> Any:
    op = f"segment_{reduction}"
    check.array(op, "values", values, arrays.FLOATS, 1, 2, 3)
    rows, groups = _groups(op, values, cu_seqlens, segment_ids, num_segments, mask)
    if mask is None and reduction in ("sum", "mean"):
        check.finite(op, values=values)
    if _impl.choose(op, impl, "values", values, CANDIDATES) == "reference":
        if not arrays.compiling():
            look_at_groups(op, int(rows.shape[0]), groups)
        return segment_reference.reduce_rows(reduction, rows, *groups)
    if arrays.kind(values) == "torch":
        from . import _segment_operator

        return _segment_operator.reduce(op, reduction, rows, groups)
    return forward(reduction, rows, groups, False)[0]


def _groups(
    op: str, values: Any, cu_seqlens: Any, segment_ids: Any, num_segments: Any, mask: Any
) -> tuple[Any, Groups]:
    """The values as (n,) or (n, d), and their groups."""
    if cu_seqlens is not None and segment_ids is not None:
        raise ValueError(
            f"[{op}] segment_ids: expected None beside cu_seqlens, got an array. Name the groups one way."
        )
    if num_segments is not None and segment_ids is None:
        raise ValueError(
            f"[{op}] num_segments: expected None without segment_ids, got {num_segments!r}. Leave it out."
        )
    if mask is not None:
        check.array(op, "mask", mask, MASKS)
        check.same_place(op, "mask", mask, "values", values)
    if cu_seqlens is None and segment_ids is None:
        if mask is None:
            raise ValueError(
                f"[{op}] cu_seqlens: expected offsets, or segment_ids, or a mask over (B, T), got None. "
                "Name the groups."
            )
        return _rows_as_groups(op, values, mask)
    if values.ndim == 3:
        raise ValueError(
            f"[{op}] values: expected 1 or 2 dimension(s) beside cu_seqlens or segment_ids, got shape "
            f"{tuple(values.shape)}. Reshape to (n, d)."
        )
    n = values.shape[0]
    if mask is not None:
        check.shape(op, "mask", mask, (n,), "like the rows of values")
        mask = _as_mask(mask)
    if cu_seqlens is not None:
        check.array(op, "cu_seqlens", cu_seqlens, arrays.INTEGERS, 1)
        check.same_place(op, "cu_seqlens", cu_seqlens, "values", values)
        if cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"[{op}] cu_seqlens: expected shape (segments + 1,), got (0,). No segment is [0]."
            )
        return values, Groups(
            cu_seqlens.shape[0] - 1, arrays.dense(cu_seqlens, "int64"), None, mask
        )
    check.alike(op, "segment_ids", segment_ids, arrays.INTEGERS, (n,), "values", values)
    if num_segments is None:
        raise ValueError(
            f"[{op}] num_segments: expected the number of groups beside segment_ids, got None. "
            "It is one more than the largest id."
        )
    check.integer(op, "num_segments", num_segments, at_least=0, at_most=2**62)
    return values, Groups(num_segments, None, arrays.dense(segment_ids), mask)


def _rows_as_groups(op: str, values: Any, mask: Any) -> tuple[Any, Groups]:
    if values.ndim < 2 or tuple(mask.shape) != tuple(values.shape[:2]):
        raise ValueError(
            f"[{op}] mask: expected values (B, T) or (B, T, d) and a mask (B, T), got values {tuple(values.shape)} and "
            f"mask {tuple(mask.shape)}. Pass cu_seqlens or segment_ids for packed values."
        )
    batch, length = values.shape[:2]
    offsets = arrays.arange(values, batch + 1) * length
    rows = values.reshape(batch * length, *values.shape[2:])
    return rows, Groups(batch, offsets, None, _as_mask(mask.reshape(-1)))


def _as_mask(mask: Any) -> Any:
    return arrays.dense(mask if arrays.dtype(mask) in ("bool", "uint8") else mask != 0)
