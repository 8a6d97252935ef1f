"""Snapshots and deltas of a table: what its rows become in the files of ``_snapshot`` and ``_delta``."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from ..front import check
from . import _columns, _delta, _replicas, _snapshot, filters
from . import _config as _config_of

if TYPE_CHECKING:
    from .table import Table

_BLOCK = 1 << 14  # rows read at a time: a few MB


def _named(kind: Any) -> dict[str, Any] | None:
    return None if kind is None else {"name": type(kind).__name__, **dataclasses.asdict(kind)}


def _config(table: Table, position: int, own_mark: bool) -> dict[str, Any]:
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
        "hash_seed": table.hash_seed,
        "table_id": table.table_id,
        "position": position,
        "own_mark": own_mark,
        "tick": int(table._native.tick),
        "epoch": table._epoch,
        "step": table._step,
        "shard": None if table._shard is None else list(table._shard),
        "smaller": table._history.smaller,
        "left_out": table._history.left_out,
    }


def admission_state(table: Table) -> tuple[dict[str, Any], np.ndarray | None]:
    """What a filter goes on from: numbers and its cells (splits, cells), None where it has none."""
    state = {"name": type(table.admission).__name__, **table.admission.state_dict()}  # type: ignore[union-attr]
    if isinstance(table.admission, filters.CountFilter):
        state["threshold"] = table.admission.threshold
        state["elements"] = state["elements"].tolist()
    return state, state.pop("cells", None)


def _filed_admission(table: Table) -> Any:
    def filed() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        state, cells = admission_state(table)
        return state, [] if cells is None else [{"cells": cells.reshape(-1)}]

    return None if table.admission is None else filed


def continued(table: Table) -> dict[str, Any]:
    """What a module's ``state_dict`` holds beside rows: whose state it is, and what the next batch goes on from."""
    state: dict[str, Any] = {
        "optimizer": None if table.optimizer is None else type(table.optimizer).__name__,
        "tick": int(table._native.tick),
        "epoch": table._epoch,
        "step": table._step,
        "admission": None,
    }
    if table.admission is not None:
        import torch

        filter_, cells = admission_state(table)
        if cells is not None:  # as int16: not every tool that moves checkpoints knows uint16
            filter_["cells"] = torch.from_numpy(cells.view(np.int16))
        state["admission"] = filter_
    return state


def take_over_admission(op: str, table: Table, state: dict[str, Any]) -> None:
    """Give a table's filter the sightings of a ``state_dict``, or refuse them and change nothing."""
    given = state.get("admission")
    if table.admission is None or given is None:
        return
    name = given.get("name") if isinstance(given, dict) else type(given).__name__
    if name != type(table.admission).__name__:
        raise ValueError(
            f"[{op}] admission: expected the state of {table.admission!r}, got that of a {name}. "
            "Make a module with the filter of the one saved."
        )
    if isinstance(table.admission, filters.CountFilter):
        try:
            cells = given["cells"].cpu().contiguous().numpy().view(np.uint16)
            elements = np.array(given["elements"], np.int64)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"[{op}] admission: expected the state of {table.admission!r}, got one whose parts give {error!r}. "
                "Pass what state_dict() returned."
            ) from error
        table.admission.load_state_dict({**given, "cells": cells, "elements": elements})


def counts_of(op: str, state: dict[str, Any]) -> tuple[int, int, int] | None:
    """Tick, epoch and step of a ``state_dict``; None of one from before there was a filter in it."""
    if not all(name in state for name in _delta.CLOCK):
        return None
    most = (2**64 - 1, 2**32 - 1, 2**64 - 1)
    tick, epoch, step = (
        check.integer(op, name, state[name], at_least=0, at_most=n)
        for name, n in zip(_delta.CLOCK, most)
    )
    return tick, epoch, step


class _Written(Exception):
    """Rows changed while a snapshot was written that was to stand at a mark given before."""


def save(table: Table, directory: str | os.PathLike[str]) -> Any:
    """A table that was not written to since its last mark stands there, where a delta may have ended: a replica and a
    publisher that start from the snapshot then join the deltas. Any other takes a mark of its own."""
    position, own_mark = table.position, table._own_mark
    again = "changes" in table.track
    if again and table._native.changed_since(position):
        # Rows that change from here on are in the next delta as well.
        position, own_mark, again = _replicas.marked(table), True, False
    stood = table._position

    def blocks() -> Any:
        for block in _columns.blocks(table, _BLOCK, 0):
            yield _columns.arrays_of(table, block)
        # Not so if a delta was applied meanwhile: the replica applies it again.
        if again and table._position == stood and table._native.changed_since(position):
            raise _Written

    try:
        return _snapshot.save(
            directory,
            # Called again when the rows are written: no score among them is ahead of the clock.
            lambda: _config(table, position, own_mark),
            blocks(),
            admission=_filed_admission(table),
        )
    except _Written:
        return save(table, directory)  # which finds them changed and takes a mark


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
        config = _config_of.checked(op, config)
        bound = config["max_capacity"] if max_capacity is None else max_capacity
        rows = blocks.summary.rows
        if shard is not None:
            if not isinstance(shard, tuple) or len(shard) != 2:
                raise TypeError(f"[{op}] shard: expected (index, of), got {shard!r}.")
            index, of = shard
            of = check.integer(op, "shard", of, at_least=1)
            index = check.integer(op, "shard", index, at_least=0, at_most=of - 1)
            rows = -(-rows // of)
        wanted = max(rows, 1) if capacity is None else capacity
        table = cls(
            config["dim"],
            capacity=wanted if bound is None else min(wanted, bound),
            max_capacity=bound,
            evict_strategy=config["evict_strategy"],
            admission=_config_of.admission(op, blocks.admission()),
            dtype=config["dtype"],
            optimizer=config["optimizer"],
            initializer=config["initializer"],
            track=tuple(config["track"]),
            device=device,
            hash_seed=config["hash_seed"],
        )
        table.value_range = config["value_range"]
        table.table_id = config["table_id"]
        kept = config["shard"]
        if shard is not None and kept is not None:
            raise ValueError(
                f"[{op}] shard: expected None for a snapshot of shard {tuple(kept)}, got {shard!r}."
            )
        table._shard = (index, of) if shard is not None else None if kept is None else tuple(kept)
        table._history.smaller = config["smaller"] or _replicas.is_smaller(
            bound, config["max_capacity"]
        )
        table._history.left_out = config["left_out"]
        newest = _replicas.take_rows(op, table, blocks)
        table._native.tick = max(config["tick"], newest)
        table._epoch, table._step = config["epoch"], config["step"]
        _replicas.stand(table, config["position"])
        table._own_mark = config["own_mark"]
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
        "hash_seed": table.hash_seed,
    }
    blocks = [_columns.arrays_of(table, block) for block in _columns.blocks(table, _BLOCK, 0)]
    numbers = (table.value_range, table._step, int(table._native.tick), table._epoch)
    return restored, (type(table), settings, blocks, numbers)


def restored(
    cls: type[Table], settings: dict[str, Any], blocks: list[dict[str, Any]], numbers: Any
) -> Table:
    table = cls(**settings)
    for block in blocks:
        n, columns = _columns.fitting("Table.copy", table, block)
        table._native.import_rows(n, columns, True)
    table.value_range, table._step, table._native.tick, table._epoch = numbers
    return table
