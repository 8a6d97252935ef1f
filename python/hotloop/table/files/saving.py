# SPDX-License-Identifier: Apache-2.0
"""Snapshots of a table: what its settings and rows become in the files of ``snapshots``, and back."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, TypeVar

from ...front import check
from .. import _export
from .._store import SETTINGS, Store
from . import replicas, settings, snapshots
from .settings import admission_state

_T = TypeVar("_T", bound=Store)


def _config(table: Store, position: int, own_mark: bool) -> dict[str, Any]:
    def jsonable(kind: Any) -> Any:
        fields = {} if kind is None else dataclasses.asdict(kind)
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        return None if kind is None else {"name": type(kind).__name__, **plain}

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


def _filed_admission(table: Store) -> Any:
    def filed() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        state, cells = admission_state(table)
        return state, [] if cells is None else [{"cells": cells.reshape(-1)}]

    return None if table.admission is None else filed


class _Written(Exception):
    """Rows changed while a snapshot was written that was to stand at a mark given before."""


def save(table: Store, directory: str | os.PathLike[str]) -> Any:
    """A table that was not written to since its last mark stands there, where a delta may have ended: a replica and a
    publisher that start from the snapshot then join the deltas. Any other takes a mark of its own."""
    position, own_mark = table.position, table._own_mark
    again = "changes" in table.track
    if again and table._native.changed_since(position):
        # Rows that change from here on are in the next delta as well.
        position, own_mark, again = replicas.marked(table), True, False
    stood = table._position

    def blocks() -> Any:
        for block in _export.blocks(table, _export.BLOCK, 0):
            yield _export.arrays_of(table, block)
        # Not so if a delta was applied meanwhile: the replica applies it again.
        if again and table._position == stood and table._native.changed_since(position):
            raise _Written

    try:
        return snapshots.save(
            directory,
            # Called again when the rows are written: no score among them is ahead of the clock.
            lambda: _config(table, position, own_mark),
            blocks(),
            admission=_filed_admission(table),
        )
    except _Written:
        return save(table, directory)  # which finds them changed and takes a mark


def load(
    cls: Callable[..., _T],
    directory: str | os.PathLike[str],
    capacity: int | None,
    shard: tuple[int, int] | None,
    max_capacity: int | None,
    device: Any,
) -> _T:
    op = "Table.load"
    config, blocks = snapshots.load(directory, op=op)
    with blocks:
        config = settings.checked(op, config)
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
        own = {
            "capacity": wanted if bound is None else min(wanted, bound),
            "max_capacity": bound,
            "admission": settings.admission(op, blocks.admission()),
            "device": device,
        }
        table = cls(**{name: config[name] for name in SETTINGS if name in config} | own)
        table.value_range = config["value_range"]
        table.table_id = config["table_id"]
        kept = config["shard"]
        if shard is not None and kept is not None:
            raise ValueError(
                f"[{op}] shard: expected None for a snapshot of shard {tuple(kept)}, got {shard!r}."
            )
        table._shard = (index, of) if shard is not None else None if kept is None else tuple(kept)
        source = config["max_capacity"]
        less = bound is not None and (source is None or bound < source)
        table._history.smaller = config["smaller"] or less
        table._history.left_out = config["left_out"]
        newest = replicas.take_rows(op, table, blocks)
        table._native.tick = max(config["tick"], newest)
        table._epoch, table._step = config["epoch"], config["step"]
        replicas.stand(table, config["position"])
        table._own_mark = config["own_mark"]
    return table
