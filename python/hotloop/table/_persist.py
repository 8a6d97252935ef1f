"""Snapshots and deltas of a table: what its rows become in the files of ``_snapshot`` and ``_delta``."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _numbers
from . import _columns, _delta, _snapshot, hashing, initializers, optimizers
from ._parts import FormatError

if TYPE_CHECKING:
    from .table import Table

_BLOCK = 1 << 14  # rows read at a time: a few MB


def _named(kind: Any) -> dict[str, Any] | None:
    return None if kind is None else {"name": type(kind).__name__, **dataclasses.asdict(kind)}


def _made(module: Any, stored: dict[str, Any] | None) -> Any:
    if stored is None:
        return None
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k != "name"}
    return getattr(module, stored["name"])(**fields)


def _config(table: Table, position: int) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    def jsonable(kind: Any) -> Any:
        named = _named(kind)
        return None if named is None else {k: plain(v) for k, v in named.items()}

    return {
        "dim": table.dim,
        "dtype": table.dtype,
        "max_capacity": table.max_capacity,
        "evict_strategy": table.evict_strategy,
        "optimizer": jsonable(table.optimizer),
        "initializer": jsonable(table.initializer),
        "track": list(table.track),
        "value_range": table.value_range,
        "table_id": table.table_id,
        "position": position,
        "tick": int(table._native.tick),
        "shard": None if table._shard is None else list(table._shard),
    }


def _arrays_of(table: Table, block: tuple[np.ndarray, ...]) -> dict[str, Any]:
    keys, values, state, scores, use = block
    arrays = {"keys": keys, "values": _columns.filed(values, table)}
    if table.state_width:
        arrays["state"] = state
    if table.evict_strategy != "none":
        arrays["scores"] = scores
    if "use" in table.track:
        arrays["last_use"] = use.view(np.uint32)
    return arrays


def _position(table: Table) -> int:
    """A replica that was only brought forward stands where it stands; other tables take a new mark."""
    at = table._position
    if at:
        try:
            if not table._native.erased_since(at) and not any(_columns.blocks(table, _BLOCK, at)):
                return at
        except IndexError:
            pass  # it was cleared
    return int(table._native.mark())


def save(table: Table, directory: str | os.PathLike[str]) -> Any:
    # Rows that change from here on are in the next delta as well.
    position = _position(table) if "changes" in table.track else table._position
    blocks = (_arrays_of(table, block) for block in _columns.blocks(table, _BLOCK, 0))
    return _snapshot.save(directory, _config(table, position), blocks)


def load(
    cls: type[Table],
    directory: str | os.PathLike[str],
    capacity: int | None,
    shard: tuple[int, int] | None,
    max_capacity: int | None,
    device: Any,
) -> Table:
    op = "Table.load"
    config, blocks = _snapshot.load(directory, op=op)
    with blocks:
        bound = config["max_capacity"] if max_capacity is None else max_capacity
        rows = blocks.summary.rows
        if shard is not None:
            if not isinstance(shard, tuple) or len(shard) != 2:
                raise TypeError(f"[{op}] shard: expected (index, of), got {shard!r}.")
            index, of = shard
            of = _numbers.integer(op, "shard", of, at_least=1)
            index = _numbers.integer(op, "shard", index, at_least=0, at_most=of - 1)
            rows = -(-rows // of)
        wanted = max(rows, 1) if capacity is None else capacity
        table = cls(
            config["dim"],
            capacity=wanted if bound is None else min(wanted, bound),
            max_capacity=bound,
            evict_strategy=config["evict_strategy"],
            dtype=config["dtype"],
            optimizer=_made(optimizers, config["optimizer"]),
            initializer=_made(initializers, config["initializer"]),
            track=tuple(config["track"]),
            device=device,
        )
        table.value_range = config["value_range"]
        table.table_id = config["table_id"]
        kept = config.get("shard")
        if shard is not None and kept is not None:
            raise ValueError(
                f"[{op}] shard: expected None for a snapshot of shard {tuple(kept)}, got {shard!r}."
            )
        table._shard = (index, of) if shard is not None else None if kept is None else tuple(kept)
        for block in blocks:
            if shard is not None:
                block = _part_of(block, index, of)
            _import(op, table, block)
        table._native.tick = config["tick"]
        _stand(table, config["position"])
    return table


def reduced(table: Table) -> tuple[Any, ...]:
    """What pickle and copy make a table of: everything but who it is to its replicas."""
    settings = {
        "dim": table.dim,
        "capacity": max(table.size, 1),
        "max_capacity": table.max_capacity,
        "evict_strategy": table.evict_strategy,
        "admission": table.admission,
        "dtype": table.dtype,
        "optimizer": table.optimizer,
        "initializer": table.initializer,
        "track": table.track,
        "device": table.device,
    }
    blocks = [_arrays_of(table, block) for block in _columns.blocks(table, _BLOCK, 0)]
    numbers = (table.value_range, table._step, int(table._native.tick))
    return restored, (type(table), settings, blocks, numbers)


def restored(
    cls: type[Table], settings: dict[str, Any], blocks: list[dict[str, Any]], numbers: Any
) -> Table:
    table = cls(**settings)
    for block in blocks:
        _import("Table.copy", table, block)
    table.value_range, table._step, table._native.tick = numbers
    return table


def _part_of(block: dict[str, Any], index: int, of: int) -> dict[str, Any]:
    mine = hashing.salted_hash_bucket(np.asarray(block["keys"]), of) == index
    return {name: array[mine] for name, array in block.items()}


def _stand(table: Table, position: int) -> None:
    """Put a replica at a position: it holds everything up to it, and what it changes itself comes after."""
    table._position = position
    if "changes" in table.track:
        table._native.generation = position + 1
        table._native.forget_erased(position)


def _import(op: str, table: Table, block: Any) -> None:
    _put(op, table, *_fitting(op, table, block))


def _fitting(op: str, table: Table, block: Any) -> tuple[int, tuple[Any, ...]]:
    """Number of rows, and their columns as the table takes them; refuses what does not fit."""
    keys = np.ascontiguousarray(block["keys"])
    values = _columns.unfiled(block["values"], table)
    n = len(keys)
    if values.shape != (n, table.dim):
        raise FormatError(f"[{op}] values: expected shape ({n}, {table.dim}), got {values.shape}.")
    columns: list[Any] = [keys.view(np.int64), values]
    for name, width in (("state", table.state_width), ("scores", 0), ("last_use", 0)):
        column = block.get(name)
        if column is not None and name == "state" and column.shape != (n, width):
            raise FormatError(f"[{op}] state: expected shape ({n}, {width}), got {column.shape}.")
        column = None if column is None or (name == "state" and not width) else column
        columns.append(
            column.view(np.int32) if name == "last_use" and column is not None else column
        )
    return n, tuple(columns)


def _put(op: str, table: Table, n: int, columns: tuple[Any, ...]) -> None:
    try:
        table._native.import_rows(n, columns)
    except table._full:
        from .table import TableFullError

        raise TableFullError(
            f"[{op}] max_capacity: expected room for {n} more rows, got {table.max_capacity} with {table.size} in "
            "use. Pass a larger one to Table.load."
        ) from None


def delta(table: Table, since: int) -> _delta.Delta:
    op = "Table.delta"
    since = _numbers.integer(op, "since", since, at_least=0)
    until = int(table._native.mark())
    if since >= until:
        raise ValueError(
            f"[{op}] since: expected a mark of this table, below {until}, got {since}."
        )
    try:
        gone = np.frombuffer(table._native.erased_since(since), np.int64)
    except IndexError:
        raise _delta.DeltaError(
            f"[{op}] since: expected a mark whose erasures are still known, got {since}. "
            "Start the replica again from a snapshot."
        ) from None
    blocks = [_arrays_of(table, b) for b in _columns.blocks(table, _BLOCK, since)]
    if not blocks:
        empty = np.empty((0, table.dim), _columns._storage(table))
        state = np.empty((0, table.state_width), np.float32)
        nil = np.empty(0, np.int64)
        blocks = [_arrays_of(table, (nil, empty, state, nil, np.empty(0, np.int32)))]
    rows = {name: _joined([b[name] for b in blocks]) for name in blocks[0]}
    # A key that came back between the two looks is in rows.
    gone = np.setdiff1d(gone, rows["keys"])
    return _delta.Delta(table.table_id, since, until, rows, gone)


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return type(parts[0])(parts[0].dtype, np.concatenate([p.bits for p in parts]))


def apply(table: Table, delta: Any) -> bool:
    op = "Table.apply"
    if isinstance(delta, (bytes, bytearray, memoryview)):
        delta = _delta.decode_delta(delta, op=op)
    if not isinstance(delta, _delta.Delta):
        raise TypeError(f"[{op}] delta: expected a Delta or its bytes, got {type(delta).__name__}.")
    if not _delta.admit(table._position, table.table_id, delta, op=op):
        return False
    rows = dict(delta.rows) if table._shard is None else _part_of(dict(delta.rows), *table._shard)
    n, columns = _fitting(op, table, rows)
    if len(delta.erased):
        gone = np.ascontiguousarray(delta.erased).view(np.int64)
        table._native.erase(len(gone), gone, np.empty(len(gone), np.uint8))
    if n:
        _put(op, table, n, columns)
    _stand(table, delta.until)
    return True
