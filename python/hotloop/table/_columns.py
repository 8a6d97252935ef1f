"""Values, scores and masks of rows: from what a caller has to what a table stores, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ..front import arrays as _arrays
from ..front import check, environment
from ..front import native as _native
from . import _device, _keys, _parts

if TYPE_CHECKING:
    from ._calls import Calls
    from .table import Evicted, Rows, Table

# What NumPy has no type for is given out as float32.
_NUMPY = {"float32": np.float32, "float16": np.float16}


def readable(like: Any, dtype: str) -> bool:
    """Whether rows can be given out as they are stored."""
    return dtype in _NUMPY or (dtype == "bfloat16" and not isinstance(like, np.ndarray))


def flags(like: Any, n: int) -> Any:
    out = _arrays.empty(like, (n,), "bool")
    out[...] = False
    return out


def exported_flags(found: Any) -> Any:
    """A bool array as the bytes the loops write."""
    if isinstance(found, np.ndarray):
        return found.view(np.uint8)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(found, torch.Tensor):  # CuPy
        return found.view("uint8")
    return found.view(torch.uint8)


def mask(op: str, name: str, value: Any, keys: Any) -> Any:
    check.array(op, name, value, ("bool",), 1)
    _like_keys(op, name, value, keys)
    return value


def scores(op: str, value: Any, keys: Any) -> Any:
    check.array(op, "scores", value, ("int64", "uint64"), 1)
    unsigned = _arrays.dtype(value) == "uint64"
    _like_keys(op, "scores", value, keys)
    value = _keys.as_int64(value)
    if value.shape[0] and (lowest := _least(value)) < 0:
        raise ValueError(
            f"[{op}] scores: expected 0 to 2^63 - 1, got {lowest % 2**64 if unsigned else lowest}. "
            "The lowest score is evicted first: shift them to be positive."
        )
    return value


def _least(value: Any) -> int:
    if _arrays.device(value) != "cpu":
        return int(value.min())
    return int(_native.core.table.least(int(value.shape[0]), value))


def _like_keys(op: str, name: str, value: Any, keys: Any) -> None:
    check.same_place(op, name, value, "keys", keys)
    if value.shape[0] != keys.shape[0]:
        raise ValueError(
            f"[{op}] {name}: expected shape ({keys.shape[0]},) like keys, got {tuple(value.shape)}."
        )


def _matrix(
    op: str, name: str, value: Any, keys: Any, shape: tuple[int, int], dtypes: tuple[str, ...]
) -> Any:
    check.array(op, name, value, dtypes, 2)
    check.same_place(op, name, value, "keys", keys)
    if tuple(value.shape) != shape:
        raise ValueError(f"[{op}] {name}: expected shape {shape}, got {tuple(value.shape)}.")
    if hasattr(value, "detach"):
        value = value.detach()
    return _arrays.unit_stride(value)


def given_values(op: str, values: Any, keys: Any, table: Calls) -> Any:
    """Checked, not converted."""
    dtypes = ("float32",) if table.dtype == "float32" else ("float32", table.dtype)
    return _matrix(op, "values", values, keys, (int(keys.shape[0]), table.dim), dtypes)


def stored(op: str, values: Any, keys: Any, table: Calls) -> Any:
    """Values as the table stores them: the same type, or float32 converted (round to nearest even)."""
    values = given_values(op, values, keys, table)
    check_fits(op, values, table.dtype)
    given = _arrays.dtype(values)
    if table.dtype == "int8":
        if given == "float32":
            values = _int8(values, table.value_range)
        return values.view(
            np.uint8 if isinstance(values, np.ndarray) else sys.modules["torch"].uint8
        )
    if given == table.dtype:
        return values
    if not isinstance(values, np.ndarray):
        return values.to(getattr(sys.modules["torch"], table.dtype))
    return (
        bfloat16_bits(values).view(np.float16)
        if table.dtype == "bfloat16"
        else values.astype(np.float16)
    )


def _int8(values: Any, value_range: float) -> Any:
    codes = _arrays.empty(values, tuple(values.shape), "int8")
    bits = codes.view(np.uint8 if isinstance(codes, np.ndarray) else sys.modules["torch"].uint8)
    _native.core.table.quantize(values, bits, value_range, True)
    return codes


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


def _largest(x: Any) -> float:
    """The largest size among the numbers, NaN or infinite where one is; waits for the device where ``x`` is on one."""
    if not (x.shape[0] and x.shape[-1]):
        return 0.0
    if _arrays.device(x) == "cpu" and _arrays.dtype(x) == "float32":
        return float(_native.core.table.largest(x if x.ndim == 2 else x[:, None]))
    return float(abs(x).max())  # NaN in all libraries if there is one


def _finite(x: Any) -> bool:
    return _largest(x) < float("inf")


def check_fits(op: str, values: Any, dtype: str) -> None:
    limit = LIMITS[dtype]
    if not _largest(values) < limit:
        numbers = np.abs(np.asarray(_arrays.to_numpy(values), np.float32))
        below = "" if np.isinf(limit) else f", below {limit:.6g} in size"
        check.refuse(
            op, "values", values, ~(numbers < limit), f"finite numbers of {dtype}{below}",
            "Nothing was written; clip them or leave these rows out.",
        )  # fmt: skip


def check_added(op: str, table: Calls, keys: Any, values: Any, rows: Any) -> None:
    """Refuse values whose sums with the rows that are there, in order, would not be finite."""
    limit = LIMITS[table.dtype]
    bound = limit if np.isfinite(limit) else float(np.finfo(np.float32).max)
    given, n = _largest(values), int(keys.shape[0])
    if _largest(rows) + given * n < bound:
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
    op: str,
    grads: Any,
    keys: Any,
    offsets: Any = None,
    weights: Any = None,
    mode: str = "sum",
    sizes: Any = None,
    largest: Any = None,
) -> None:
    """Refuse what would leave rows or state that are not finite, before anything is written.

    On a device only with HOTLOOP_CHECK=1: the answer would have to be waited for in every step.
    """
    if not grads.shape[0] or (_arrays.device(grads) != "cpu" and not environment.checks_on()):
        return
    weight = 1.0
    if weights is not None and weights.shape[0]:
        weight = _largest(weights)
        if not weight < float("inf"):
            bad = ~np.isfinite(_arrays.to_numpy(weights))
            check.refuse(
                op, "per_sample_weights", weights, bad, "finite numbers", "Nothing was written."
            )
    most = _largest(grads)
    if not most < float("inf"):
        bad = ~np.isfinite(_arrays.to_numpy(grads))
        check.refuse(
            op,
            "grads",
            grads,
            bad,
            "finite numbers",
            "Nothing was written; clip or skip this batch.",
        )
    if most * weight * int(keys.shape[0]) <= MOST_SUM:
        return
    given = (None if x is None else _arrays.to_numpy(x) for x in (offsets, weights, sizes, largest))
    _check_sums(op, _arrays.to_numpy(grads), _arrays.to_numpy(keys), mode, *given)


def _check_sums(
    op: str,
    grads: np.ndarray,
    keys: np.ndarray,
    mode: str,
    offsets: np.ndarray | None,
    weights: np.ndarray | None,
    sizes: np.ndarray | None,
    largest: np.ndarray | None,
) -> None:
    """The sums themselves, in float64: they are near the bound, which no training is."""
    n = len(keys)
    bag = np.arange(n) if offsets is None else np.repeat(np.arange(len(grads)), np.diff(offsets))
    each = grads[bag].astype(np.float64)
    if mode == "max" and largest is not None:
        each = np.where(largest[bag] == np.arange(n)[:, None], each, 0.0)
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


def evicted(raw: Any, keys: Any, table: Table) -> Evicted:
    from .table import Evicted

    if table.device != "cpu":
        return Evicted(*_device.evicted(table._native, raw, keys, table.dim, table.dtype))
    gone = np.frombuffer(raw[0], np.int64)
    width = table.dim * _storage(table).itemsize
    values = shown(np.frombuffer(raw[1], np.uint8).reshape(len(gone), width), table)
    kept = (gone, values, np.frombuffer(raw[2], np.int64))
    return Evicted(*(_arrays.from_numpy(x.copy(), keys) for x in kept))


def shown(raw: np.ndarray, table: Table) -> np.ndarray:
    """Stored bytes (m, dim * itemsize) as NumPy numbers."""
    m = raw.shape[0]
    if table.dtype == "bfloat16":
        return from_bfloat16(raw.view(np.uint16)).reshape(m, table.dim)
    if table.dtype == "int8":
        codes: np.ndarray = raw.view(np.int8).reshape(m, table.dim).astype(np.float32)
        codes *= np.float32(table._scale)
        return codes
    return raw.view(_NUMPY[table.dtype]).reshape(m, table.dim)


def _storage(table: Table) -> np.dtype[Any]:
    return np.dtype({"float32": "f4", "float16": "f2", "bfloat16": "f2", "int8": "u1"}[table.dtype])


def blocks(table: Table, rows: int, since: int) -> Iterator[tuple[np.ndarray, ...]]:
    """(keys, stored values, state, scores, last use) of consecutive stretches of memory."""
    native = table._native
    begin = 0
    while begin < native.end:
        end = min(begin + rows, native.end)
        n = end - begin
        columns = (
            np.empty(n, np.int64),
            np.empty((n, table.dim), _storage(table)),
            np.empty((n, table.state_width), np.float32),
            np.empty(n, np.int64),
            np.empty(n, np.int32),
        )
        m = native.export(begin, end, since, columns)
        begin = end
        if m:
            yield tuple(c[:m] for c in columns)


def export(table: Table, rows: int, since: int) -> Iterator[Rows]:
    from .table import Rows

    for keys, values, state, score, use in blocks(table, rows, since):
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(len(keys), -1)
        yield Rows(keys, shown(raw, table), state, score, use.view(np.uint32))


def nothing(table: Table) -> Rows:
    from .table import Rows

    raw = np.empty((0, table.dim * _storage(table).itemsize), np.uint8)
    return Rows(
        np.empty(0, np.int64),
        shown(raw, table),
        np.empty((0, table.state_width), np.float32),
        np.empty(0, np.int64),
        np.empty(0, np.uint32),
    )


def filed(values: np.ndarray, table: Table) -> Any:
    """Stored values as an array of the file format."""
    if table.dtype == "bfloat16":
        return _parts.RawArray("bfloat16", values.view(np.uint16))
    return values.view(np.int8) if table.dtype == "int8" else values


def unfiled(values: Any, table: Table) -> np.ndarray:
    if isinstance(values, _parts.RawArray):
        return values.bits.view(np.float16)
    raw: np.ndarray = values.view(np.uint8) if table.dtype == "int8" else values
    return raw


def arrays_of(table: Table, block: tuple[np.ndarray, ...]) -> dict[str, Any]:
    """A block of rows as files hold it, by name."""
    keys, values, state, scores, use = block
    arrays = {"keys": keys, "values": filed(values, table)}
    if table.state_width:
        arrays["state"] = state
    if table.evict_strategy != "none":
        arrays["scores"] = scores
    if "use" in table.track:
        arrays["last_use"] = use.view(np.uint32)
    return arrays


def fitting(
    op: str, table: Table, block: Any, error: type[ValueError] = _parts.FormatError
) -> tuple[int, tuple[Any, ...]]:
    """Number of rows of a file, and their columns as the table takes them; refuses what does not fit."""
    n = len(block["keys"])
    tag = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}[table.dtype]
    wanted = {
        "keys": (("I64", "U64"), (n,)),
        "values": ((tag,), (n, table.dim)),
        "state": (("F32",), (n, table.state_width)),
        "scores": (("I64", "U64"), (n,)),
        "last_use": (("U32",), (n,)),
    }
    kept = {
        "state": bool(table.state_width),
        "scores": table.evict_strategy != "none",
        "last_use": "use" in table.track,
    }
    columns: list[Any] = []
    for name, (tags, shape) in wanted.items():
        if not kept.get(name, True):
            columns.append(None)
            continue
        column = block.get(name)
        if column is None:
            raise error(
                f"[{op}] {name}: expected {tags[0]} {shape}, got none. Write the rows with a table of these settings."
            )
        found = _parts.tag(op, name, column)
        if found not in tags or column.shape != shape:
            raise error(
                f"[{op}] {name}: expected {tags[0]} {shape}, got {found} {column.shape}. "
                "Write the rows with a table of these settings."
            )
        if name == "values":
            column = unfiled(column, table)
        column = np.ascontiguousarray(column, column.dtype.newbyteorder("="))
        views = {"keys": np.int64, "scores": np.int64, "last_use": np.int32}
        columns.append(column.view(views[name]) if name in views else column)
    return n, tuple(columns)


def all_keys(table: Table) -> np.ndarray:
    """The keys of all rows, (m,); one that was erased and entered again meanwhile may stand there twice."""
    native, begin, step = table._native, 0, 1 << 20
    found = []
    while begin < native.end:
        end = min(begin + step, native.end)
        keys = np.empty(end - begin, np.int64)
        found.append(keys[: native.export(begin, end, 0, (keys, None, None, None, None))])
        begin = end
    return np.concatenate(found) if found else np.empty(0, np.int64)
