"""Values, scores and masks of rows: from what a caller has to what a table stores, and back."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _arrays, _native
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
    return _arrays.exported(found.view(torch.uint8))


def mask(op: str, name: str, value: Any, keys: Any) -> Any:
    _arrays.checked(op, name, value, ("bool",), 1)
    _like_keys(op, name, value, keys)
    return value


def scores(op: str, value: Any, keys: Any) -> Any:
    _arrays.checked(op, "scores", value, ("int64", "uint64"), 1)
    _like_keys(op, "scores", value, keys)
    return _keys.as_int64(value)


def _like_keys(op: str, name: str, value: Any, keys: Any) -> None:
    _arrays.same_place(op, name, value, "keys", keys)
    if value.shape[0] != keys.shape[0]:
        raise ValueError(
            f"[{op}] {name}: expected shape ({keys.shape[0]},) like keys, got {tuple(value.shape)}."
        )


def _matrix(
    op: str, name: str, value: Any, keys: Any, shape: tuple[int, int], dtypes: tuple[str, ...]
) -> Any:
    _arrays.checked(op, name, value, dtypes, 2)
    _arrays.same_place(op, name, value, "keys", keys)
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
    _native.core().table_quantize(
        _arrays.exported(values), _arrays.exported(bits), value_range, True
    )
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


def _finite(grads: Any) -> bool:
    """Waits for the device where ``grads`` is on one."""
    if _arrays.device(grads) == "cpu":
        return bool(_native.core().table_all_finite(_arrays.exported(grads)))
    library = sys.modules[_arrays.kind("finite", "grads", grads)]
    return bool(library.isfinite(grads).all())


def check_finite(op: str, grads: Any) -> None:
    if grads.shape[0] and not _finite(grads):
        numbers = _arrays.to_numpy(grads)
        row, column = np.argwhere(~np.isfinite(numbers))[0]
        raise ValueError(
            f"[{op}] grads: expected finite numbers, got {numbers[row, column]} at [{row}, {column}]. "
            "Nothing was written; clip or skip this batch."
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
