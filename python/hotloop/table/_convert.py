# SPDX-License-Identifier: Apache-2.0
"""Values, scores, masks and gradients: from what a caller has to what a table stores."""

from __future__ import annotations

import sys
from typing import Any, Protocol

import numpy as np

from ..front import arrays as _arrays
from ..front import check, environment
from ..front import native as _native
from . import _keys


class Layout(Protocol):
    """What a table stores per row."""

    dim: int
    dtype: str
    value_range: float


# What NumPy has no type for is given out as float32.
NUMPY = {"float32": np.float32, "float16": np.float16}


def readable(like: Any, dtype: str) -> bool:
    """Whether rows can be given out as they are stored."""
    return dtype in NUMPY or (dtype == "bfloat16" and not isinstance(like, np.ndarray))


def flags(keys: Any) -> tuple[Any, Any]:
    """(n,) bool, False, and the same memory as the bytes that the loops write."""
    if isinstance(keys, np.ndarray):
        found = np.zeros(len(keys), bool)
        return found, found.view(np.uint8)
    found = _arrays.empty(keys, (int(keys.shape[0]),), "bool")
    found[...] = False
    return found, _arrays.as_bytes(found)


def mask(op: str, name: str, value: Any, keys: Any) -> Any:
    check.array(op, name, value, ("bool",), 1)
    _like_keys(op, name, value, keys)
    return value


def scores(op: str, value: Any, keys: Any) -> Any:
    check.array(op, "scores", value, ("int64", "uint64"), 1)
    unsigned = _arrays.dtype(value) == "uint64"
    _like_keys(op, "scores", value, keys)
    value = _keys.as_int64(value)
    if not value.shape[0]:
        return value
    on_cpu, n = _arrays.device(value) == "cpu", int(value.shape[0])
    if (lowest := _native.core.table.least(n, value) if on_cpu else int(value.min())) < 0:
        raise ValueError(
            f"[{op}] scores: expected 0 to 2^63 - 1, got {lowest % 2**64 if unsigned else lowest}. "
            "The lowest score is evicted first: shift them to be positive."
        )
    return value


def _like_keys(op: str, name: str, value: Any, keys: Any) -> None:
    check.same_place(op, name, value, "keys", keys)
    check.shape(op, name, value, (int(keys.shape[0]),), "like keys")


def _matrix(
    op: str, name: str, value: Any, keys: Any, shape: tuple[int, int], dtypes: tuple[str, ...]
) -> Any:
    check.array(op, name, value, dtypes, 2)
    check.same_place(op, name, value, "keys", keys)
    check.shape(op, name, value, shape)
    if hasattr(value, "detach"):
        value = value.detach()
    return _arrays.unit_stride(value)


def given_values(op: str, values: Any, keys: Any, table: Layout) -> Any:
    """Checked, not converted."""
    dtypes = ("float32",) if table.dtype == "float32" else ("float32", table.dtype)
    return _matrix(op, "values", values, keys, (int(keys.shape[0]), table.dim), dtypes)


def stored(op: str, values: Any, keys: Any, table: Layout) -> Any:
    """Values as the table stores them: the same type, or float32 converted (round to nearest even)."""
    values = given_values(op, values, keys, table)
    check_fits(op, values, table.dtype)
    given = _arrays.dtype(values)
    if table.dtype == "int8":
        if given == "int8":
            return _arrays.as_bytes(values)
        bits = _arrays.empty(values, tuple(values.shape), "uint8")
        _native.core.table.quantize(values, bits, table.value_range, True)
        return bits
    if given == table.dtype:
        return values
    if not isinstance(values, np.ndarray):
        return values.to(getattr(sys.modules["torch"], table.dtype))
    return (
        bfloat16_bits(values).view(np.float16)
        if table.dtype == "bfloat16"
        else values.astype(np.float16)
    )


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    out: np.ndarray = np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)
    return out


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    out: np.ndarray = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return out


def gradients(op: str, grads: Any, keys: Any, shape: tuple[int, int]) -> Any:
    return _matrix(op, "grads", grads, keys, shape, ("float32",))


LIMITS = {
    "float32": float("inf"),
    "float16": 65520.0,
    "bfloat16": (2 - 2**-8) * 2.0**127,
    "int8": float("inf"),
}
"""What is as large as this, or larger, rounds to infinity."""
MOST_SUM = 1e15
"""Of the gradients of one key: float32 holds the sum of a hundred million squares of it, of any width."""


def largest(x: Any) -> float:
    """The largest size among the numbers, NaN or infinite where one is; waits for the device where ``x`` is on one."""
    if not (x.shape[0] and x.shape[-1]):
        return 0.0
    if _arrays.device(x) == "cpu" and _arrays.dtype(x) == "float32":
        return float(_native.core.table.largest(x if x.ndim == 2 else x[:, None]))
    return float(abs(x).max())  # NaN in all libraries if there is one


def _finite_size(op: str, name: str, x: Any, hint: str) -> float:
    """The largest size, or an error where it is not finite."""
    size = largest(x)
    if not size < float("inf"):
        bad = ~np.isfinite(_arrays.to_numpy(x))
        check.refuse(op, name, x, bad, "finite numbers", f"Nothing was written{hint}.")
    return size


def check_fits(op: str, values: Any, dtype: str) -> None:
    limit = LIMITS[dtype]
    if not largest(values) < limit:
        numbers = np.abs(np.asarray(_arrays.to_numpy(values), np.float32))
        below = "" if np.isinf(limit) else f", below {limit:.6g} in size"
        check.refuse(
            op, "values", values, ~(numbers < limit), f"finite numbers of {dtype}{below}",
            "Nothing was written; clip them or leave these rows out.",
        )  # fmt: skip


def check_added(op: str, table: Layout, keys: Any, values: Any, rows: Any) -> None:
    """Refuse values whose sums with the rows that are there, in order, would not be finite."""
    limit = LIMITS[table.dtype]
    bound = limit if np.isfinite(limit) else float(np.finfo(np.float32).max)
    given, n = largest(values), int(keys.shape[0])
    if largest(rows) + given * n < bound:
        return
    k, v, sums = (np.asarray(_arrays.to_numpy(x)) for x in (keys, values, rows))
    distinct, first, inverse = np.unique(k, return_index=True, return_inverse=True)
    sizes = np.abs(sums[first].astype(np.float64))
    np.add.at(sizes, inverse.reshape(-1), np.abs(v.astype(np.float64)))
    bad = ~(sizes < bound)
    if bad.any():
        row = int(np.argwhere(bad)[0][0])
        raise ValueError(
            f"[{op}] values: expected sums that {table.dtype} holds, got up to {sizes[row].max():.6g} for key "
            f"{distinct[row]}. Nothing was written; add less at once, or use a wider dtype."
        )


def check_gradients(
    op: str, grads: Any, keys: Any, mode: str = "sum", bags: tuple[Any, ...] = (None,) * 4
) -> None:
    """Refuse what would leave rows or state that are not finite, before anything is written.

    ``bags``: offsets, weights, sizes and where each maximum came from, of bags of keys with a gradient each.
    On a device only with HOTLOOP_CHECK=1: the answer would have to be waited for in every step.
    """
    if not grads.shape[0] or (_arrays.device(grads) != "cpu" and not environment.checks_on()):
        return
    weights, most = bags[1], 1.0
    if weights is not None and weights.shape[0]:
        most = _finite_size(op, "per_sample_weights", weights, "")
    most *= _finite_size(op, "grads", grads, "; clip or skip this batch")
    if most * int(keys.shape[0]) > MOST_SUM:
        given = (None if x is None else _arrays.to_numpy(x) for x in (grads, keys, *bags))
        _check_sums(op, mode, *given)


def _check_sums(op: str, mode: str, grads: Any, keys: Any, *bags: Any) -> None:
    """The sums themselves, in float64: they are near the bound, which no training is."""
    offsets, weights, sizes, maxima = bags
    n = len(keys)
    bag = np.arange(n) if offsets is None else np.repeat(np.arange(len(grads)), np.diff(offsets))
    each = grads[bag].astype(np.float64)
    if mode == "max" and maxima is not None:
        each = np.where(maxima[bag] == np.arange(n)[:, None], each, 0.0)
    elif weights is not None:
        each *= weights[:, None]
    if mode == "mean" and sizes is not None:
        each /= np.maximum(sizes[bag], 1)[:, None]
    distinct, inverse = np.unique(keys, return_inverse=True)
    sums = np.zeros((len(distinct), grads.shape[1]))
    np.add.at(sums, inverse.reshape(-1), each)
    bad = np.abs(sums) > MOST_SUM
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"[{op}] grads: expected sums per key up to {MOST_SUM:g} in size, got {sums[at]:.6g} for key "
            f"{distinct[at[0]]}. Nothing was written; clip them, or divide them by the loss scale first."
        )
