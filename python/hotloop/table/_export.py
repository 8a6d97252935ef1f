# SPDX-License-Identifier: Apache-2.0
"""Rows of a table as NumPy columns, and as the arrays that files hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..front import arrays as _arrays
from . import _device
from ._convert import NUMPY, from_bfloat16
from ._store import Store
from .files import container
from .results import Evicted, Rows

BLOCK = 1 << 14  # rows read at a time: a few MB


def evicted(raw: Any, keys: Any, table: Store) -> Evicted:
    if table.device != "cpu":
        return Evicted(*_device.evicted(table._native, raw, keys, table.dim, table.dtype))
    gone = np.frombuffer(raw[0], np.int64)
    width = table.dim * _storage(table).itemsize
    values = shown(np.frombuffer(raw[1], np.uint8).reshape(len(gone), width), table)
    kept = (gone, values, np.frombuffer(raw[2], np.int64))
    return Evicted(*(_arrays.from_numpy(x.copy(), keys) for x in kept))


def shown(raw: np.ndarray, table: Store) -> np.ndarray:
    """Stored bytes (m, dim * itemsize) as NumPy numbers."""
    m = raw.shape[0]
    if table.dtype == "bfloat16":
        return from_bfloat16(raw.view(np.uint16)).reshape(m, table.dim)
    if table.dtype == "int8":
        codes: np.ndarray = raw.view(np.int8).reshape(m, table.dim).astype(np.float32)
        codes *= np.float32(table._scale)
        return codes
    return raw.view(NUMPY[table.dtype]).reshape(m, table.dim)


def _storage(table: Store) -> np.dtype[Any]:
    return np.dtype({"float32": "f4", "float16": "f2", "bfloat16": "f2", "int8": "u1"}[table.dtype])


def room(table: Store, n: int) -> tuple[np.ndarray, ...]:
    """Room for (keys, stored values, state, scores, last use) of n rows."""
    return (
        np.empty(n, np.int64),
        np.empty((n, table.dim), _storage(table)),
        np.empty((n, table.state_width), np.float32),
        np.empty(n, np.int64),
        np.empty(n, np.int32),
    )


def _stretches(table: Store, rows: int) -> Iterator[tuple[int, int]]:
    """Where consecutive stretches of memory begin and end, as far as it goes by then."""
    begin = 0
    while begin < table._native.end:
        end = min(begin + rows, table._native.end)
        yield begin, end
        begin = end


def blocks(table: Store, rows: int, since: int) -> Iterator[tuple[np.ndarray, ...]]:
    """The columns of consecutive stretches of memory, as in ``room``."""
    for begin, end in _stretches(table, rows):
        columns = room(table, end - begin)
        if m := table._native.export(begin, end, since, columns):
            yield tuple(c[:m] for c in columns)


def shown_rows(table: Store, block: tuple[np.ndarray, ...]) -> Rows:
    keys, values, state, score, use = block
    return Rows(keys, shown(values.view(np.uint8), table), state, score, use.view(np.uint32))


def newest(keys: np.ndarray) -> np.ndarray:
    """Where the last of each distinct key stands, by key: of one that was erased and entered again meanwhile."""
    _, at = np.unique(keys[::-1], return_index=True)
    return np.asarray(len(keys) - 1 - at)


def filed(values: np.ndarray, table: Store) -> Any:
    """Stored values as an array of the file format."""
    if table.dtype == "bfloat16":
        return container.RawArray("bfloat16", values.view(np.uint16))
    return values.view(np.int8) if table.dtype == "int8" else values


def unfiled(values: Any, table: Store) -> np.ndarray:
    if isinstance(values, container.RawArray):
        return values.bits.view(np.float16)
    raw: np.ndarray = values.view(np.uint8) if table.dtype == "int8" else values
    return raw


def arrays_of(table: Store, block: tuple[np.ndarray, ...]) -> dict[str, Any]:
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
    op: str, table: Store, block: Any, error: type[ValueError] = container.FormatError
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
        found = None if column is None else container.tag(op, name, column)
        if found not in tags or column.shape != shape:
            got = "none" if column is None else f"{found} {column.shape}"
            raise error(
                f"[{op}] {name}: expected {tags[0]} {shape}, got {got}. Write the rows with a table of these settings."
            )
        if name == "values":
            column = unfiled(column, table)
        column = np.ascontiguousarray(column, column.dtype.newbyteorder("="))
        views = {"keys": np.int64, "scores": np.int64, "last_use": np.int32}
        columns.append(column.view(views[name]) if name in views else column)
    return n, tuple(columns)


def all_keys(table: Store) -> np.ndarray:
    """The keys of all rows, (m,); one that was erased and entered again meanwhile may stand there twice."""
    found = [np.empty(0, np.int64)]
    for begin, end in _stretches(table, 1 << 20):
        keys = np.empty(end - begin, np.int64)
        m = table._native.export(begin, end, 0, (keys, None, None, None, None))
        found.append(keys[:m])
    return np.concatenate(found)
