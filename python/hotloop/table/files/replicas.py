# SPDX-License-Identifier: Apache-2.0
"""Deltas made and applied, and the counters that go with the rows: how replicas follow a table.

A table stands at one position. Up to ``Table._position`` its history is its source's: the table was loaded there, or a
delta brought it there. Later marks are its own, and only a delta of its own ends at such a mark.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...front import check
from .. import _export, filters, hashing
from .._store import Store
from ..results import TableFullError
from . import deltas
from .deltas import Delta, DeltaError, FilterChange


def marked(table: Store) -> int:
    """Take a mark of the table, and of its filter."""
    position = int(table._native.mark())
    table._note(position)
    return position


def stand(table: Store, position: int) -> None:
    """Put a replica at a position: it holds everything up to it, and what it changes itself comes after."""
    table._position = position
    if "changes" in table.track:
        table._native.generation = position + 1
        table._native.forget_erased(position)
        table._history.seen.clear()
        table._note(position)


def _filter_mark(table: Store, position: int) -> int | None:
    """The mark of the filter at a position, or one before; None if that filter was not the table's yet."""
    history, counter = table._history, table.admission
    if counter is None or history.seen_by is None or history.seen_by() is not counter:
        return None
    at = bisect.bisect_right(history.seen, position, key=lambda pair: pair[0])
    return history.seen[at - 1][1] if at else None


def clock(table: Store) -> dict[str, int]:
    return {"tick": int(table._native.tick), "epoch": table._epoch, "step": table._step}


def newest_tick(table: Store, scores: np.ndarray | None) -> int:
    """The clock of "lru" as far as scores tell it; 0 if they do not. Old files may have it behind their scores."""
    if scores is None or not len(scores) or table.evict_strategy not in ("lru", "epoch_lru"):
        return 0
    ticks = scores.view(np.uint64)
    return int((ticks if table.evict_strategy == "lru" else ticks & np.uint64(2**32 - 1)).max())


def filter_change(table: Store, since: int) -> FilterChange | None:
    counter = table.admission
    if not isinstance(counter, filters.CountFilter):
        return None
    mark = _filter_mark(table, since)
    (head, advances, failures, elements), lines, cells = counter._native.changed_since(mark)
    state = {
        "name": "CountFilter",
        "version": filters.STATE_VERSION,
        "capacity": counter.capacity,
        "splits": counter.splits,
        "threshold": counter.threshold,
        "head": head,
        "advances": advances,
        "failures": failures,
        "elements": elements,
        "whole": mark is None,
    }
    return FilterChange(
        state,
        np.frombuffer(lines, np.int64),
        np.frombuffer(cells, np.uint16).reshape(-1, deltas.LINE),
    )


def _fitting_filter(op: str, table: Store, change: FilterChange | None) -> tuple[Any, ...] | None:
    """What the table's filter takes of a delta, checked; None where there is nothing to take, or no filter."""
    counter = table.admission
    if change is None or counter is None:
        return None
    state = change.state
    name, wanted = state.get("name"), type(counter).__name__

    def refuse(got: str) -> DeltaError:
        return DeltaError(
            f"[{op}] admission: expected what {counter!r} saw, got {got}. "
            "Load a snapshot of the table: the filter comes with it."
        )

    if name != wanted or not isinstance(counter, filters.CountFilter):
        raise refuse(f"that of a {name}")
    try:
        own = (filters.STATE_VERSION, counter.capacity, counter.splits)
        theirs = tuple(state[part] for part in ("version", "capacity", "splits"))
        if own != theirs:
            raise ValueError(f"version, capacity and splits {theirs}, not {own}")
        head = check.integer(op, "head", state["head"], at_least=0, at_most=counter.splits - 1)
        advances, failures = (
            check.integer(op, part, state[part], at_least=0, at_most=2**63 - 1)
            for part in ("advances", "failures")
        )
        elements = [
            check.integer(op, "elements", n, at_least=0, at_most=counter._native.cells_per_split)
            for n in state["elements"]
        ]
        count = counter.splits * counter._native.cells_per_split // deltas.LINE
        lines = np.ascontiguousarray(change.lines, np.int64)
        if len(elements) != counter.splits:
            raise ValueError(f"{len(elements)} numbers of elements for {counter.splits} splits")
        if len(lines) and not 0 <= lines.min() <= lines.max() < count:
            raise ValueError(f"lines {lines.min()} to {lines.max()} of {count}")
        cells = np.ascontiguousarray(change.cells, np.uint16).view(np.uint8)
        whole = bool(state["whole"])
    except (LookupError, TypeError, ValueError) as error:
        raise refuse(repr(error)) from error
    return (head, advances, failures, elements), len(lines), lines, cells, whole


def part_of(block: dict[str, Any], index: int, of: int) -> dict[str, Any]:
    mine = hashing.salted_hash_bucket(np.asarray(block["keys"]), of) == index
    return {name: array[mine] for name, array in block.items()}


def put(op: str, table: Store, n: int, columns: tuple[Any, ...], beyond: bool) -> None:
    try:
        table._native.import_rows(n, columns, beyond)
    except table._full:
        raise _no_room(op, table, n) from None


def _no_room(op: str, table: Store, n: int) -> Exception:
    return TableFullError(
        f"[{op}] max_capacity: expected room for {n} more rows, got {table.max_capacity} with {table.size} in "
        "use. Pass a larger one to Table.load."
    )


def take_rows(op: str, table: Store, blocks: Iterable[dict[str, Any]]) -> int:
    """Read the rows of a snapshot; return the newest tick among their scores.

    Of a table that was being written to a snapshot may hold more rows than fit there at once. All of them belong to it:
    the deltas that follow say which left. A table with less room than that one keeps the highest.
    """
    history, tick = table._history, 0
    for block in blocks:
        if table._shard is not None:
            block = part_of(block, *table._shard)
        n, columns = _export.fitting(op, table, block)
        # The rows of a block, and of those before it, compete by the scores they were saved with.
        put(op, table, n, columns, not history.smaller or table.evict_strategy != "none")
        if history.smaller and table._native.trim():
            history.left_out = True
        tick = max(tick, newest_tick(table, columns[3]))
    return tick


def last_of_each(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows without those whose key comes again: it was erased and entered anew while they were read."""
    at = _export.newest(np.asarray(rows["keys"]))
    if len(at) == len(rows["keys"]):
        return rows
    at.sort()
    return {name: array[at] for name, array in rows.items()}


def delta(table: Store, since: int) -> Delta:
    op = "Table.delta"
    since = check.integer(op, "since", since, at_least=0)
    if since > table.position:
        raise ValueError(
            f"[{op}] since: expected a mark of this table, below {table.position + 1}, got {since}."
        )
    if since < table._position:
        raise DeltaError(
            f"[{op}] since: expected a position from {table._position} on, where this table was loaded or brought by a "
            f"delta, got {since}: what changed before is not known here. Start that replica from a snapshot of this "
            "table."
        )
    until = marked(table)
    present = None
    try:
        gone = np.frombuffer(table._native.erased_since(since), np.int64)
    except IndexError:  # a clear, or more than are kept
        gone = None
    blocks = [_export.arrays_of(table, b) for b in _export.blocks(table, _export.BLOCK, since)]
    blocks = blocks or [_export.arrays_of(table, _export.room(table, 0))]
    rows = {name: _joined([b[name] for b in blocks]) for name in blocks[0]}
    rows = last_of_each(rows)
    if gone is None:
        # After the rows: what is erased from here on is known to the next delta, and what enters is in it.
        present, gone = _export.all_keys(table), np.empty(0, np.int64)
    else:
        # A key that came back between the two looks is in rows.
        gone = np.setdiff1d(gone, rows["keys"])
    # Last: no score and no sighting is ahead of them.
    change, now = filter_change(table, since), clock(table)
    return Delta(
        table.table_id, since, until, rows, gone, present, now, change, table._history.writer
    )


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return type(parts[0])(parts[0].dtype, np.concatenate([p.bits for p in parts]))


def awaits(op: str, table: Store, delta: Delta, *, alone: bool = False) -> bool:
    """Whether a table is to apply a delta; False if it holds what the delta says already.

    Args:
        alone: only the caller has changed the table since it applied a delta.
    Raises:
        DeltaError: the delta does not join, or the table has gone on by itself.
    """
    joined, position = table._position, table.position
    if delta.table_id == table.table_id and joined < delta.until <= position:
        if delta.writer == table._history.writer:
            return False  # this table made it
        raise _by_itself(op, table, f"marks {joined + 1} to {position} of its own")
    own_mark = table._own_mark and position == joined
    if not deltas.admit(position, table.table_id, delta, own_mark=own_mark, op=op):
        return False
    if table._history.left_out:
        raise DeltaError(
            f"[{op}] delta: expected a replica with all rows of its source, got one whose max_capacity = "
            f"{table.max_capacity} left some out when it was loaded. Load it with a larger max_capacity."
        )
    if table.device != "cpu" and table.evict_strategy != "none":
        raise NotImplementedError(
            f"[{op}] device: expected a replica on the CPU with evict_strategy {table.evict_strategy!r}, got "
            f'{table.device}, where a full bucket evicts by itself. Pass device="cpu" to Table.load.'
        )
    again = (delta.since, delta.until) == table._history.applying  # it was broken off
    if not alone and not again and _changed(table, position):
        raise _by_itself(op, table, f"rows or sightings that changed since position {position}")
    return True


def _by_itself(op: str, table: Store, what: str) -> DeltaError:
    return DeltaError(
        f"[{op}] delta: expected a replica that only reads, got a table with {what}, which a delta of another table "
        "would undo. Load a snapshot of the source, and train and publish on one side only."
    )


def _changed(table: Store, position: int) -> bool:
    if "changes" not in table.track:
        return False
    if table._native.changed_since(position):
        return True
    mark = _filter_mark(table, position)
    return mark is not None and bool(table.admission._native.has_changed_since(mark))  # type: ignore[union-attr]


@dataclass(frozen=True)
class Fitted:
    """A delta as a table takes it: checked, and nothing written."""

    n: int
    columns: tuple[Any, ...]
    gone: np.ndarray | None
    present: np.ndarray | None
    seen: tuple[Any, ...] | None


def fitted(op: str, table: Store, delta: Delta) -> Fitted:
    rows: dict[str, Any] = last_of_each(dict(delta.rows))
    if table._shard is not None:
        rows = part_of(rows, *table._shard)
    n, columns = _export.fitting(op, table, rows, DeltaError)
    plain = [
        None if keys is None else np.ascontiguousarray(keys, _native(keys)).view(np.int64)
        for keys in (delta.erased, delta.present)
    ]
    gone = None if delta.present is not None else np.setdiff1d(plain[0], columns[0])  # type: ignore[arg-type]
    return Fitted(n, columns, gone, plain[1], _fitting_filter(op, table, delta.admission))


def _native(array: Any) -> Any:
    return array.dtype.newbyteorder("=")


def apply(table: Store, delta: Any, *, op: str = "Table.apply", alone: bool = False) -> bool:
    if isinstance(delta, (bytes, bytearray, memoryview)):
        delta = deltas.decode_delta(delta, op=op)
    check.instance(op, "delta", delta, Delta, bytes)
    if not awaits(op, table, delta, alone=alone):
        return False
    parts = fitted(op, table, delta)
    gone = parts.gone
    if gone is None:
        kept = np.concatenate([parts.present, parts.columns[0]])
        gone = np.setdiff1d(_export.all_keys(table), kept)
    if table._history.smaller:
        more = parts.n - int(table.contains(parts.columns[0]).sum())
        less = int(table.contains(gone).sum())
        if table.size + more - less > (table.max_capacity or 0):
            raise _no_room(op, table, more - less)
    table._history.applying, tick = (delta.since, delta.until), table._native.tick
    # Rows first: they may find no memory, and then nothing has gone.
    if parts.n:
        put(op, table, parts.n, parts.columns, True)
    if len(gone):
        table._native.erase(len(gone), gone, np.empty(len(gone), np.uint8))
    if parts.seen is not None:
        table.admission._native.put(*parts.seen)  # type: ignore[union-attr]
    if delta.clock is not None:
        table._native.tick = delta.clock["tick"]
        table._epoch, table._step = delta.clock["epoch"], delta.clock["step"]
    else:  # of a version that had none
        table._native.tick = max(int(tick), newest_tick(table, parts.columns[3]))
    stand(table, delta.until)
    table._own_mark = False
    table._history.applying = None
    return True
