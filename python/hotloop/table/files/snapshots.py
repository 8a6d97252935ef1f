# SPDX-License-Identifier: Apache-2.0
"""A table on disk: a directory of parts that are written first, and a manifest whose rename is the commit.

Every save names its parts by a token of its own, so it never touches the snapshot in place. Savers do not wait for each
other: the snapshot in place is that of the save that finished last, whole. Part 0 is created first, deleted last and
carries the lock of its snapshot: the writer holds it until the commit, readers while they read. A process that tidies
up deletes a snapshot only if no process holds it and the manifest, read after the lock was taken, names another one.
"""

from __future__ import annotations

import errno
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeAlias

import numpy as np

from ...front import check
from . import container, disk, manifests
from .container import DAMAGED, Array, FormatError
from .disk import PathLike
from .manifests import MANIFEST, PART, PREFIX, AdmissionParts, Manifest, Part, Summary

PART_BYTES = 64 << 20
KIND = "part"
ADMISSION = "admission"


Block: TypeAlias = "dict[str, Array]"
Admission: TypeAlias = "Callable[[], tuple[dict[str, Any], Iterable[Mapping[str, Array]]]]"


def save(
    directory: PathLike,
    config: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    blocks: Iterable[Mapping[str, Array]],
    *,
    admission: Admission | None = None,
    part_bytes: int = PART_BYTES,
) -> Summary:
    """Replace the snapshot in a directory by one of these rows, or leave it as it was.

    Holds one part and the block in hand in memory. A crash, a kill, a full disk or a loss of power at any instant
    leaves the previous snapshot or the new one. Of two saves at once, the one that finishes last stays.

    Args:
        directory: created if missing; other files in it are left alone.
        config: what JSON gives back unchanged: strings as names, no tuples, no NaN; or what returns it: called first,
            and again when the rows are written, which is what stays.
        blocks: rows as arrays with one first extent, the same names, types and row shapes in every block.
        admission: called when the rows are written; gives the state of the filter, a dict like ``config`` and arrays
            in blocks like those of the rows, which it is filed beside. Default None.
        part_bytes: bytes of arrays in one part, >= 1; a row that is larger has a part of its own. Default 64 MiB.
    Raises:
        OSError: nothing was replaced, unless the text says that only the sync of the directory failed.
        ValueError, TypeError: a block does not fit the first one, or ``config`` does not fit JSON.
    """
    op = "save"
    part_bytes = check.integer(op, "part_bytes", part_bytes, at_least=1)
    given = config if callable(config) else lambda: config
    _checked_config(op, given())
    disk.make_directory(directory)
    _refuse_foreign(op, directory)
    _tidy(directory)  # a disk that killed saves have filled must not stay full
    writer = _Writer(op, directory, part_bytes)
    try:
        for block in blocks:
            writer.add(block)
            del block  # before the next one is made
        writer.flush()
        state = None
        if admission is not None:
            state, blocks = admission()
            state = _checked_config(op, state)
            writer.turn_to_admission()
            for block in blocks:
                writer.add(block)
            writer.flush()
        disk.sync_directory(directory)
        manifest = writer.manifest(_checked_config(op, given()), state)
        previous = _current(directory)
        disk.write_atomic(
            os.path.join(directory, MANIFEST), [manifests.manifest_bytes(manifest)], op=op
        )
        if previous is not None and not writer.locked:
            _delete(directory, [part.file for part in previous.files])
    except BaseException:
        writer.discard()
        raise
    finally:
        writer.release()
    with suppress(OSError):  # the new snapshot is in place: the rest waits for the next save
        _tidy(directory)
    return manifest.summary


def load(directory: PathLike, *, op: str = "load") -> tuple[dict[str, Any], Blocks]:
    """Return the table's configuration and an iterator over its rows, one block (dict of arrays) per part.

    The snapshot that is in place now is the one that is read, even if another is saved meanwhile. All parts are
    looked for before the call returns; each is checked, byte by byte, before any of its rows is given out.

    Raises:
        FileNotFoundError: no snapshot is there.
        FormatError: a file is damaged or missing, here or while iterating. NewerFormatError: upgrade hotloop.
    """
    manifest, held = _pin(op, directory)
    return manifest.config, Blocks(op, directory, manifest, held)


def verify(directory: PathLike) -> Summary:
    """Read every byte of a snapshot; return what it holds, or raise what ``load`` would."""
    _, blocks = load(directory, op="verify")
    with blocks:
        blocks.admission()
        for _ in blocks:
            pass
        return blocks.summary


class Blocks(Iterator[Block]):
    """The rows of a snapshot, which is kept from deletion until the last block, ``close`` or the end of a ``with``."""

    def __init__(self, op: str, directory: PathLike, manifest: Manifest, held: int | None) -> None:
        self._held = held
        self._op = op
        self._directory = directory
        self._manifest = manifest
        self._next = 0

    @property
    def summary(self) -> Summary:
        return self._manifest.summary

    def admission(self) -> tuple[dict[str, Any], list[Block]] | None:
        """State and blocks of the admission filter, None if there is none; to be called before the rows are read."""
        found = self._manifest.admission
        if found is None:
            return None
        first = len(self._manifest.parts)
        return found.state, [self._read(first + i) for i in range(len(found.parts))]

    def __next__(self) -> Block:
        if self._next >= len(self._manifest.parts):
            self.close()
            raise StopIteration
        self._next += 1
        return self._read(self._next - 1)

    def __enter__(self) -> Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        self._next = len(self._manifest.parts)
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def _read(self, index: int) -> Block:
        part = self._manifest.files[index]
        kind, schema = KIND, self._manifest.arrays
        if self._manifest.admission is not None and index >= len(self._manifest.parts):
            kind, schema = ADMISSION, self._manifest.admission.arrays
        path = os.path.join(self._directory, part.file)

        refuse = functools.partial(container.damaged, self._op, path)
        try:
            size = os.stat(path).st_size
            if size != part.bytes:
                raise refuse(f"{part.bytes} bytes", size)
            data = disk.read(path, op=self._op)
        except FileNotFoundError:
            got = "none: it was deleted while it was read"
            raise refuse("a part of the snapshot", got) from None
        arrays, metadata = container.decode(data, path, op=self._op)
        if container.stored_checksum(data) != part.crc32:
            raise refuse(f"checksum {part.crc32} as in {MANIFEST}", container.stored_checksum(data))
        wanted = _part_metadata(self._manifest.snapshot, index, kind)
        if metadata != wanted:
            raise refuse(f"metadata {wanted}", metadata)
        try:
            found = _schema(self._op, arrays)
        except (TypeError, ValueError) as error:
            raise refuse(f"arrays {schema}", error) from None
        if found != schema:
            raise refuse(f"arrays {schema}", found)
        if {len(array) for array in arrays.values()} != {part.rows}:
            raise refuse(f"{part.rows} rows", sorted({len(array) for array in arrays.values()}))
        return arrays


class _Writer:
    """Rows gathered into parts of one size."""

    def __init__(self, op: str, directory: PathLike, part_bytes: int) -> None:
        self._op = op
        self._directory = directory
        self._part_bytes = part_bytes
        self._token = disk.new_token()
        self._schema: dict[str, Any] | None = None
        self._kind = KIND
        self._rows: tuple[dict[str, Any], int] | None = None  # schema and parts, once they are done
        self._gathered: dict[str, np.ndarray] = {}
        self._capacity = 0
        self._count = 0
        self._parts: list[Part] = []
        self._held: int | None = None  # part 0, until the commit
        self.locked = True

    def add(self, block: Mapping[str, Array]) -> None:
        schema = _schema(self._op, block)
        if self._schema is None:
            self._schema = schema
            self._allocate(block)
        if schema != self._schema:
            raise ValueError(
                f"[{self._op}] blocks: expected arrays {self._schema} like the first block, got {schema}. "
                "Give every block the same names, types and row shapes."
            )
        lengths = {len(array) for array in block.values()}
        if len(lengths) != 1:
            got = {name: len(array) for name, array in block.items()}
            raise ValueError(
                f"[{self._op}] blocks: expected arrays of one number of rows, got {got}. Give each row to every array."
            )
        rows, done = lengths.pop(), 0
        while done < rows:
            step = min(rows - done, self._capacity - self._count)
            for name, array in block.items():
                part = container.numbers(array)[done : done + step]
                self._gathered[name][self._count : self._count + step] = part
            self._count += step
            done += step
            if self._count == self._capacity:
                self.flush()

    def turn_to_admission(self) -> None:
        """What is added from here on is the filter's, in parts of their own."""
        self._rows = self._schema or {}, len(self._parts)
        self._kind, self._schema = ADMISSION, None

    def flush(self) -> None:
        """Write the rows gathered so far as one part."""
        if not self._count:
            return
        index = len(self._parts)
        arrays: Block = {
            name: container.shown(self._schema[name]["dtype"], bits[: self._count])
            for name, bits in self._gathered.items()
            if self._schema is not None
        }
        while True:
            buffers = container.encode(
                arrays, _part_metadata(self._token, index, self._kind), op=self._op
            )
            name = manifests.part_name(self._token, index)
            fd = disk.write_new(os.path.join(self._directory, name), buffers, op=self._op)
            if fd is not None:
                break
            assert index == 0
            self._token = disk.new_token()  # only part 0, which nothing guards yet, can be swept
        if index == 0:
            self._held = fd
            self.locked = disk.locks(fd)
        else:
            os.close(fd)
        size = sum(len(buffer) for buffer in buffers)
        digits = bytes(buffers[0][container.DIGITS : container.BODY]).decode()
        self._parts.append(Part(name, size, self._count, digits))
        self._count = 0

    def manifest(self, config: dict[str, Any], state: dict[str, Any] | None) -> Manifest:
        schema, count = self._rows or (self._schema or {}, len(self._parts))
        parts, rest = tuple(self._parts[:count]), tuple(self._parts[count:])
        admission = None if state is None else AdmissionParts(state, self._schema or {}, rest)
        rows = sum(part.rows for part in parts)
        return Manifest(self._token, config, rows, schema, parts, admission)

    def release(self) -> None:
        if self._held is not None:
            os.close(self._held)
            self._held = None

    def discard(self) -> None:
        """Delete the parts again, unless the manifest that names them is already in place."""
        with suppress(OSError, FormatError):
            manifest = manifests.read_manifest(self._op, self._directory)
            if manifest is not None and manifest.snapshot == self._token:
                return
            _delete(self._directory, [part.file for part in self._parts])

    def _allocate(self, block: Mapping[str, Array]) -> None:
        bits = {name: container.numbers(array) for name, array in block.items()}
        row_bytes = sum(
            a.itemsize * int(np.prod(a.shape[1:], dtype=np.int64)) for a in bits.values()
        )
        self._capacity = max(1, self._part_bytes // max(1, row_bytes))
        self._gathered = {
            name: np.empty((self._capacity, *a.shape[1:]), a.dtype.newbyteorder("="))
            for name, a in bits.items()
        }


def _part_metadata(token: str, index: int, kind: str) -> dict[str, str]:
    return {"kind": kind, "snapshot": token, "part": str(index)}


def _schema(op: str, block: Mapping[str, Array]) -> dict[str, Any]:
    """Types and row shapes, as the manifest holds them."""
    if not isinstance(block, Mapping) or not block:
        got = "none" if isinstance(block, Mapping) else type(block).__name__
        raise TypeError(f"[{op}] blocks: expected dicts of arrays, got {got}. Name the arrays.")
    schema = {}
    for name in sorted(block):
        array = block[name]
        tag = container.tag(op, f"blocks[{name!r}]", array)
        if not array.shape:
            raise ValueError(
                f"[{op}] blocks[{name!r}]: expected one entry per row, got shape (). Reshape it to (rows, ...)."
            )
        schema[name] = {"dtype": tag, "shape": list(array.shape[1:])}
    return schema


def _checked_config(op: str, config: Any) -> dict[str, Any]:
    try:
        copy = json.loads(json.dumps(config, allow_nan=False))
        json.dumps(config, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"[{op}] config: expected what JSON can hold, got {error}. Use numbers, strings, lists and dicts."
        ) from None
    if not isinstance(copy, dict) or copy != config:
        raise ValueError(
            f"[{op}] config: expected a dict that JSON gives back unchanged, got {config!r} and back {copy!r}. "
            "Use strings as names and lists instead of tuples."
        )
    return copy


def _current(directory: PathLike) -> Manifest | None:
    """The manifest in place, if it can be read."""
    try:
        return manifests.read_manifest("save", directory)
    except FormatError:
        return None


def _refuse_foreign(op: str, directory: PathLike) -> None:
    path = os.path.join(directory, MANIFEST)
    try:
        fd = disk.open_regular(path, op=op)
    except FileNotFoundError:
        return
    try:
        start = os.pread(fd, len(PREFIX), 0)
    finally:
        os.close(fd)
    if start != PREFIX:
        raise FileExistsError(
            errno.EEXIST,
            f"[{op}] directory: expected a snapshot's {MANIFEST} or none, got another file that starts with "
            f"{start!r}. Choose another directory, or remove the file",
            path,
        )


def _pin(op: str, directory: PathLike) -> tuple[Manifest, int | None]:
    """The manifest in place and a descriptor that keeps its parts from deletion; all parts are there."""
    while True:
        manifest = manifests.read_manifest(op, directory)
        if manifest is None:
            raise FileNotFoundError(
                errno.ENOENT,
                f"[{op}] directory: expected a snapshot ({MANIFEST}), got none. Save one, or correct the path",
                os.fspath(directory),
            )
        if not manifest.files:
            return manifest, None
        held, problem = _hold(directory, manifest)
        if problem is None:
            return manifest, held
        if held is not None:
            os.close(held)
        again = manifests.read_manifest(op, directory)
        if again is not None and again.snapshot == manifest.snapshot:
            raise FormatError(f"[{op}] {problem}. {DAMAGED}")


def _hold(directory: PathLike, manifest: Manifest) -> tuple[int | None, str | None]:
    held = None
    for part in manifest.files:
        path = os.path.join(directory, part.file)
        try:
            if held is None:
                held = disk.open_regular(path, op="load")
                if not disk.share(held):
                    return held, f"{path}: expected a part of the snapshot, got none"
            size = os.stat(path).st_size
        except FileNotFoundError:
            return held, f"{path}: expected a part of the snapshot, got none"
        if size != part.bytes:
            return held, f"{path}: expected {part.bytes} bytes, got {size}"
    return held, None


def _tidy(directory: PathLike) -> None:
    """Delete the parts of every snapshot that is neither in place, nor being written, nor being read."""
    groups: dict[str, list[str]] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            match = PART.fullmatch(entry.name)
            if match and entry.is_file(follow_symlinks=False):
                groups.setdefault(match[1], []).append(entry.name)
    for token, names in groups.items():
        try:
            manifest = manifests.read_manifest("save", directory)
        except FormatError:
            return  # what a damaged manifest names is for a human to decide
        if manifest is not None and manifest.snapshot == token:
            continue
        try:
            fd = disk.claim(os.path.join(directory, manifests.part_name(token, 0)))
        except FileNotFoundError:  # part 0 goes last, so the others of this snapshot are left-overs
            _delete(directory, names)
            continue
        if fd is None:
            continue
        try:
            # again: it may have been committed before the lock was ours, and after that it cannot be
            manifest = manifests.read_manifest("save", directory)
            if manifest is None or manifest.snapshot != token:
                _delete(directory, names)
        except FormatError:
            return
        finally:
            os.close(fd)


def _delete(directory: PathLike, names: Iterable[str]) -> None:
    for name in sorted(names, key=lambda name: (len(name), name), reverse=True):  # part 0 last
        disk.remove(os.path.join(directory, name))
