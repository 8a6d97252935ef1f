# SPDX-License-Identifier: Apache-2.0
"""What changed in a table between two positions: one container per delta, and a directory that carries them.

A position counts the marks of a table; a delta leads from ``since`` to ``until``. A replica applies the delta
that starts where it stands, and ``admit`` is the one place that decides it.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...front import check
from . import container, disk
from .container import Array, FormatError
from .disk import PathLike

KIND = "delta"
ERASED = "erased"
PRESENT = "present"
LINES, CELLS = "filter_lines", "filter_cells"
VERSION = 2  # of deltas that say more than rows and erased keys; the others stay files of version 1
CLOCK = {"tick": 2**64 - 1, "epoch": 2**32 - 1, "step": 2**64 - 1}
"""The counters of a table, and how far they go."""
LINE = 32  # cells of a line of the filter
MAX_POSITION = (1 << 63) - 1
PENDING_BYTES = 1 << 30

_FILE = re.compile(r"delta-(0|[1-9][0-9]{0,18})-([1-9][0-9]{0,18})\.safetensors")
TABLE_ID = re.compile(r"[0-9a-f]{32}")
_WRITER = re.compile(r"[0-9a-f]{16}")


class DeltaError(ValueError):
    """A delta that is damaged, of another table, or does not join what is there."""


@dataclass(frozen=True, eq=False)
class FilterChange:
    """What a ``CountFilter`` saw between two positions: its numbers, and the lines of cells that changed, as they are.

    Args:
        state: numbers of the filter as in a snapshot; ``whole``: lines that are not here are empty.
        lines: (k,) int64, numbers of lines of 32 cells, counted as a snapshot files the cells.
        cells: (k, 32) uint16.
    """

    state: Mapping[str, Any] = field(repr=False)
    lines: Array = field(repr=False)
    cells: Array = field(repr=False)

    def __post_init__(self) -> None:
        op = "FilterChange"
        tags = (container.tag(op, LINES, self.lines), container.tag(op, CELLS, self.cells))
        count = self.lines.shape[0] if len(self.lines.shape) == 1 else -1
        if tags != ("I64", "U16") or self.cells.shape != (count, LINE):
            raise ValueError(
                f"[{op}] lines: expected I64 (k,) and U16 (k, {LINE}), got {tags[0]} {self.lines.shape} and "
                f"{tags[1]} {self.cells.shape}. Take what Table.delta gave."
            )
        check.instance(op, "state", self.state, Mapping)


@dataclass(frozen=True, eq=False)
class Delta:
    """Rows written or used and keys erased between two positions of a table, and its counters at the second.

    Erased keys go, then rows are written. With ``present``, all keys go that it does not hold: so a table says it that
    no longer knows which were erased.

    Args:
        table_id: the table's uuid, 32 lower-case hexadecimal digits.
        since: position before, 0 <= since < until.
        until: position after, < 2**63.
        rows: arrays with one entry per row: ``keys`` (int64 or uint64, (n,)), ``values`` (n, ...), and whatever
            else a row has, such as ``state``, ``score`` and ``last_use``.
        erased: keys that are gone, (m,), of the type of ``keys``.
        present: all keys of the table, (m,); ``erased`` is empty then. Default None: ``erased`` says what went.
        clock: ``tick``, ``epoch`` and ``step`` of the table, which scores and draws are counted in. Default None:
            unknown, as in deltas of format version 1.
        admission: what the table's ``CountFilter`` saw. Default None.
        writer: 16 hexadecimal digits of the process's table that the delta is of. Default None: unknown.
    """

    table_id: str
    since: int
    until: int
    rows: Mapping[str, Array] = field(repr=False)
    erased: Array = field(repr=False)
    present: Array | None = field(default=None, repr=False)
    clock: Mapping[str, int] | None = field(default=None, repr=False)
    admission: FilterChange | None = field(default=None, repr=False)
    writer: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        op = "Delta"
        if not isinstance(self.table_id, str) or not TABLE_ID.fullmatch(self.table_id):
            raise ValueError(
                f"[{op}] table_id: expected 32 lower-case hexadecimal digits, got {self.table_id!r}. "
                "Use uuid.uuid4().hex."
            )
        since = check.integer(op, "since", self.since, at_least=0)
        until = check.integer(op, "until", self.until, at_most=MAX_POSITION)
        if until <= since:
            raise ValueError(
                f"[{op}] until: expected a position after since = {since}, got {until}. "
                "Count every change of the table."
            )
        object.__setattr__(self, "since", since)
        object.__setattr__(self, "until", until)
        for name in ("keys", "values"):
            if name not in self.rows:
                raise ValueError(
                    f"[{op}] rows: expected keys and values, got {', '.join(self.rows) or 'nothing'}. Add {name!r}."
                )
        for name in (ERASED, PRESENT, LINES, CELLS):
            if name in self.rows:
                raise ValueError(f"[{op}] rows: expected no array {name!r}, got one. Rename it.")
        keys = self.rows["keys"]
        tag = container.tag(op, "rows['keys']", keys)
        if tag not in ("I64", "U64"):
            raise TypeError(
                f"[{op}] rows['keys']: expected int64 or uint64, got {tag}. Convert it."
            )
        if len(keys.shape) != 1:
            raise ValueError(f"[{op}] rows['keys']: expected shape (n,), got {keys.shape}.")
        for name, array in self.rows.items():
            container.tag(op, f"rows[{name!r}]", array)
            if not array.shape or array.shape[0] != keys.shape[0]:
                raise ValueError(
                    f"[{op}] rows[{name!r}]: expected {keys.shape[0]} entries like keys, got shape {array.shape}. "
                    "Give each row to every array."
                )
        for name, part in ((ERASED, self.erased), (PRESENT, self.present)):
            if part is None and name == PRESENT:
                continue
            if container.tag(op, name, part) != tag or len(part.shape) != 1:  # type: ignore[union-attr]
                got = f"{container.tag(op, name, part)} {part.shape}"  # type: ignore[union-attr]
                raise ValueError(
                    f"[{op}] {name}: expected {tag} (m,) like keys, got {got}. Convert it."
                )
        if self.present is not None and len(self.erased):
            raise ValueError(
                f"[{op}] erased: expected no key beside present, got {len(self.erased)}. Leave one of them out."
            )
        if self.clock is not None:
            clock = {
                name: check.integer(op, name, self.clock.get(name), at_least=0, at_most=most)
                for name, most in CLOCK.items()
            }
            object.__setattr__(self, "clock", clock)
        if self.writer is not None and not (
            isinstance(self.writer, str) and _WRITER.fullmatch(self.writer)
        ):
            raise ValueError(
                f"[{op}] writer: expected 16 lower-case hexadecimal digits or None, got {self.writer!r}. Leave it out."
            )

    @property
    def keys(self) -> Array:
        return self.rows["keys"]

    @property
    def values(self) -> Array:
        return self.rows["values"]

    @property
    def state(self) -> Array | None:
        return self.rows.get("state")

    def to_bytes(self) -> bytes:
        """Return what ``Table.apply`` takes on another machine."""
        return encode_delta(self)


def encode_delta(delta: Delta) -> bytes:
    """Return a delta's bytes, for ``publish`` or any other transport."""
    metadata = {
        "kind": KIND,
        "table_id": delta.table_id,
        "since": str(delta.since),
        "until": str(delta.until),
    }
    arrays = {**delta.rows, ERASED: delta.erased}
    plain = len(metadata)
    if delta.present is not None:
        arrays[PRESENT] = delta.present
    if delta.clock is not None:
        metadata.update((name, str(delta.clock[name])) for name in CLOCK)
    if delta.writer is not None:
        metadata["writer"] = delta.writer
    if delta.admission is not None:
        arrays[LINES], arrays[CELLS] = delta.admission.lines, delta.admission.cells
        metadata["filter"] = json.dumps(dict(delta.admission.state))
    new = len(metadata) > plain or delta.present is not None
    version = VERSION if new else container.VERSION
    return b"".join(container.encode(arrays, metadata, op="encode_delta", version=version))


def decode_delta(data: Any, what: str = "delta", *, op: str = "decode_delta") -> Delta:
    """Check every byte of a delta and return it; its arrays are read-only views of ``data``.

    Raises:
        DeltaError: the bytes are damaged, no delta, or of a newer format.
    """
    try:
        arrays, metadata = container.decode(data, what, op=op, newest=VERSION)
    except FormatError as error:
        raise DeltaError(str(error)) from error
    if metadata.get("kind") != KIND:
        raise DeltaError(
            f"[{op}] {what}: expected a delta, got a file of kind {metadata.get('kind')!r}. "
            "Pass what encode_delta gave."
        )
    try:
        erased = arrays.pop(ERASED)
        present, lines, cells = (arrays.pop(name, None) for name in (PRESENT, LINES, CELLS))
        since, until = (position_of(metadata[name]) for name in ("since", "until"))
        clock = admission = None
        if "tick" in metadata:
            clock = {name: int(metadata[name]) for name in CLOCK}
        if lines is not None or cells is not None or "filter" in metadata:
            admission = FilterChange(json.loads(metadata["filter"]), lines, cells)  # type: ignore[arg-type]
        writer, table_id = metadata.get("writer"), metadata["table_id"]
        return Delta(table_id, since, until, arrays, erased, present, clock, admission, writer)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise DeltaError(
            f"[{op}] {what}: expected the entries of a delta, got {error!r}. Another program wrote it: fetch it again."
        ) from error


def admit(
    position: int, table_id: str, delta: Delta, *, own_mark: bool = False, op: str = "admit"
) -> bool:
    """Whether a replica of a table at a position is to apply a delta; False if it already has.

    Args:
        own_mark: the position is that of a snapshot alone, where no delta ends: a delta that spans it joins it.
    Raises:
        DeltaError: the delta is another table's, starts after the position, or spans it.
    """
    position = check.integer(op, "position", position, at_least=0)
    if delta.table_id != table_id:
        raise DeltaError(
            f"[{op}] delta: expected table {table_id}, got {delta.table_id}. Load a snapshot of that table first."
        )
    return _joins(op, position, delta.since, delta.until, own_mark=own_mark)


def _joins(
    op: str, position: int, since: int, until: int, what: str = "delta", *, own_mark: bool = False
) -> bool:
    if until <= position:
        return False
    if since > position:
        raise DeltaError(
            f"[{op}] {what}: expected a delta that starts at position {position}, got {since} to {until}: "
            f"{position} to {since} is missing. Fetch what is missing, or load a newer snapshot."
        )
    if since < position and not own_mark:
        raise DeltaError(
            f"[{op}] {what}: expected a delta that starts at position {position}, got {since} to {until}, "
            "which overlaps what was applied. Load a newer snapshot."
        )
    return True


def delta_name(since: int, until: int) -> str:
    return f"delta-{since}-{until}.safetensors"


def publish(
    directory: PathLike, delta_bytes: Any, *, op: str = "publish", what: str = "delta_bytes"
) -> bool:
    """Add a delta to a directory; True if it is new there, False if the identical one is there already.

    The directory holds one chain of one table and grows at its end; publishers of one machine wait for each other.
    On a file system without locks let one process publish: what two of them do to the chain there, ``pending`` finds.
    Errors are those of ``DeltaLog.add``.
    """
    delta = decode_delta(delta_bytes, what, op=op)
    disk.make_directory(directory)
    with disk.only_one(directory):
        there = chain(directory)
        path = os.path.join(directory, delta_name(delta.since, delta.until))
        if (delta.since, delta.until) in there:
            if memoryview(disk.read(path)) == memoryview(delta_bytes).cast("B"):
                disk.sync_directory(directory)  # the sync may be what failed the first time
                return False
            raise DeltaError(
                f"[{op}] {what}: expected the content of {path}, got another of the same span, a fork. "
                "Give a table that was set back and trained anew another table_id and directory."
            )
        if there:
            last = max(there, key=lambda span: span[1])
            end, newest = last[1], os.path.join(directory, delta_name(*last))
            before = decode_delta(disk.read(newest), newest, op=op)
            if before.table_id != delta.table_id:
                raise DeltaError(
                    f"[{op}] {what}: expected table {before.table_id} as in {directory}, got {delta.table_id}. "
                    "Use one directory per table."
                )
            if delta.since != end:
                kind = "a gap" if delta.since > end else "an overlap"
                raise DeltaError(
                    f"[{op}] {what}: expected one that starts at position {end}, where {directory} ends, "
                    f"got {delta.since} to {delta.until}, {kind}. Publish the deltas of one table in order."
                )
        disk.write_atomic(path, [delta_bytes], op=op)
    return True


def pending(
    directory: PathLike,
    table_id: str,
    position: int,
    *,
    own_mark: bool = False,
    max_bytes: int = PENDING_BYTES,
    op: str = "pending",
) -> list[Delta]:
    """``DeltaLog.pending``, in order, each delta checked; empty when there are none.

    ``own_mark``: as in ``admit``, of the first of them.
    """
    position = check.integer(op, "position", position, at_least=0)
    max_bytes = check.integer(op, "max_bytes", max_bytes, at_least=0)
    if not os.path.isdir(directory):
        raise FileNotFoundError(
            errno.ENOENT,
            f"[{op}] directory: expected the directory of a publisher, got none. Correct the path",
            os.fspath(directory),
        )
    while True:
        there = chain(directory)
        spans = [span for span in there if span[1] > position]
        try:
            return _read_chain(op, directory, table_id, position, own_mark, spans, max_bytes)
        except FileNotFoundError:
            if there == chain(directory):
                raise  # otherwise a file was pruned since it was listed


def prune(directory: PathLike, upto: int) -> int:
    """Delete the deltas that end at or before a position; return how many. The caller holds ``disk.only_one``.

    The newest delta stays whatever its position: it says where the next one has to start.
    """
    old = [span for span in chain(directory)[:-1] if span[1] <= upto]
    for span in old:  # oldest first: a kill in between leaves a chain without a gap
        os.unlink(os.path.join(directory, delta_name(*span)))
    return len(old)


def position_of(text: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,18}", text):
        raise ValueError(f"position {text!r}")
    return int(text)


def chain(directory: PathLike) -> list[tuple[int, int]]:
    """The spans of the files in a directory, in order."""
    matches = (_FILE.fullmatch(name) for name in os.listdir(directory))
    return sorted((int(match[1]), int(match[2])) for match in matches if match)


def _read_chain(
    op: str,
    directory: PathLike,
    table_id: str,
    position: int,
    own_mark: bool,
    spans: list[tuple[int, int]],
    max_bytes: int,
) -> list[Delta]:
    end = position
    for index, (since, until) in enumerate(spans):
        if index and since == spans[index - 1][0]:
            raise DeltaError(
                f"[{op}] {directory}: expected one delta that starts at position {since}, got two, to "
                f"{spans[index - 1][1]} and to {until}, a fork. Load a snapshot of the table that is right."
            )
        if until <= end:
            raise DeltaError(
                f"[{op}] {directory}: expected a delta that starts at position {end}, got {since} to {until}, which "
                "overlaps the one before. Load a snapshot of the table that is right."
            )
        _joins(op, end, since, until, os.fspath(directory), own_mark=own_mark and not index)
        end = until
    deltas: list[Delta] = []
    size = 0
    for since, until in spans:
        path = os.path.join(directory, delta_name(since, until))
        size += os.stat(path).st_size
        if deltas and size > max_bytes:
            break
        delta = decode_delta(disk.read(path), path, op=op)
        if (delta.since, delta.until) != (since, until):
            raise DeltaError(
                f"[{op}] {path}: expected the span of its name, got {delta.since} to {delta.until}. "
                "The file was renamed: fetch it again."
            )
        admit(since, table_id, delta, op=op)
        deltas.append(delta)
    return deltas
