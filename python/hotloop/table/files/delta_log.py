# SPDX-License-Identifier: Apache-2.0
"""``DeltaLog``: a directory through which the changes of a table reach its replicas."""

from __future__ import annotations

import os
import re
from contextlib import suppress

from ...front import check
from ..table import Table
from . import container, deltas, disk, replicas
from .deltas import Delta, DeltaError
from .disk import PathLike

KIND = "follower"

_FOLLOWER = re.compile(r"follower-([A-Za-z0-9_][A-Za-z0-9._-]{0,99})\.safetensors")


class DeltaLog:
    """Carry a table's changes to its replicas through a directory that they share.

    A table counts marks; a delta leads from the position ``since`` to ``until`` and holds whole rows, as they are at
    ``until``: with T(p) the table at position p, T(until) = (T(since) without the erased keys) overwritten by the rows.
    The files of a log form one chain, ``until`` of each being ``since`` of the next. A replica at p takes the delta
    with since = p. One with until <= p it holds already, repeated or late. Whatever else would leave a hole or
    a fork is a ``DeltaError``, and the replica stays as it is: since > p (a delta is missing, or came too early), since
    < p < until (an overlap), another table's id, a file that is truncated or has any other bit changed. The one
    exception: a snapshot of a table that was being written to stands at a mark of its own, inside a delta's span; what
    is loaded from it takes that delta first.

    Files appear by a rename, so a reader meets whole ones, whatever happens to the publisher. One process publishes,
    any number follow. On a file system that several machines share, renames have to be atomic; locks are for publishers
    among themselves, and for ``prune`` beside a follower that gives its name.

    A publisher that was killed is restored like a replica: load the snapshot, ``follow``, go on. For this ``publish``
    just before ``save``, with nothing written in between.

    Args:
        directory: of one table's deltas; made by the first delta that is published.

    Examples:
        >>> import tempfile, numpy as np
        >>> there = tempfile.mkdtemp()
        >>> table = Table(2, track="changes")
        >>> _ = table.save(f"{there}/snapshot")
        >>> replica = Table.load(f"{there}/snapshot")  # anywhere else
        >>> _ = table.insert_or_assign(np.array([7, 8]), np.ones((2, 2), np.float32))
        >>> delta = DeltaLog(f"{there}/deltas").publish(table)
        >>> (delta.since, delta.until), DeltaLog(f"{there}/deltas").follow(replica)
        ((0, 1), 1)
        >>> len(replica)
        2

    Reference:
        Liu et al. 2022, "Monolith", arXiv:2209.07663, section 2.2, parameter synchronisation. Differs: positions say
        what is missing, a deletion travels too, and a row is sent whole.
    """

    def __init__(self, directory: PathLike) -> None:
        self.directory = os.path.realpath(directory)

    def __repr__(self) -> str:
        return f"DeltaLog({self.directory!r})"

    @property
    def position(self) -> int | None:
        """Where the log ends and the next delta has to start; None before the first."""
        if not os.path.isdir(self.directory):
            return None
        return max((until for _, until in deltas.chain(self.directory)), default=None)

    def publish(self, table: Table) -> Delta:
        """Add what changed in a table since the end of the log, and return it; the first delta starts where it stands.

        The delta is built in memory, and may be empty. If it cannot be written, the next call takes its changes too.

        Args:
            table: with ``track="changes"``; the one that published the end of the log, or was brought there by
                ``follow``. After ``clear``, or more than 2^21 erasures, the delta lists the keys that are there.
        Raises:
            DeltaError: the log is another table's, or goes beyond this one: it was set back to an older snapshot.
            OSError: nothing was added.
        """
        op = "DeltaLog.publish"
        check.instance(op, "table", table, Table)
        table._tracks(op, "changes")
        end = self.position
        ends = table._published.get(self.directory, (table._position,) * 2)
        if end is not None and end not in ends:
            newest = max(deltas.chain(self.directory), key=lambda span: span[1])
            path = os.path.join(self.directory, deltas.delta_name(*newest))
            there = deltas.decode_delta(disk.read(path), path, op=op)
            if there.table_id != table.table_id:
                raise DeltaError(
                    f"[{op}] table: expected table {there.table_id} as in {self.directory}, got {table.table_id}. "
                    "Use one directory per table."
                )
            raise DeltaError(
                f"[{op}] table: expected one at position {end}, where {self.directory} ends, got one that was loaded "
                f"at {table._position}. Call follow(table) before it is trained; a table that is to leave this history "
                "behind needs another table_id, a snapshot and a directory."
            )
        delta: Delta = table.delta(table.position if end is None else end)
        # Both, since a write that raises may have put the file in place.
        table._published[self.directory] = (delta.since if end is None else end, delta.until)
        deltas.publish(self.directory, delta.to_bytes(), op=op, what="table")
        return delta

    def add(self, delta: Delta | bytes) -> bool:
        """Add a delta made elsewhere (``Table.delta``, another log); False if the log holds the identical one.

        Raises:
            DeltaError: it is damaged, another table's, or leaves a gap, an overlap or a fork.
            OSError: nothing was added.
        """
        op = "DeltaLog.add"
        if isinstance(delta, Delta):
            delta = delta.to_bytes()
        hint = "publish(table) takes a table."
        check.instance(op, "delta", delta, bytes, bytearray, memoryview, hint=hint)
        return deltas.publish(self.directory, delta, op=op, what="delta")

    def pending(
        self, table_id: str, position: int, *, max_bytes: int = deltas.PENDING_BYTES
    ) -> list[Delta]:
        """Return the deltas that lead on from a position, for a replica that is no ``Table``: see ``follow``.

        Args:
            table_id: ``table.table_id`` of the source.
            position: where the replica stands.
            max_bytes: stop before the files exceed this many bytes together, but return at least one delta. Default
                1 GiB.
        Raises:
            DeltaError: a gap, an overlap, a fork, a damaged file or one of another table, at or after the position.
            FileNotFoundError: there is no such directory.
        """
        op = "DeltaLog.pending"
        return deltas.pending(self.directory, table_id, position, max_bytes=max_bytes, op=op)

    def follow(
        self, replica: Table, *, name: str | None = None, max_bytes: int = deltas.PENDING_BYTES
    ) -> int:
        """Apply every delta that the replica lacks, in order; return how many. Call it again for what comes later.

        All deltas of a round are checked before the first of them is applied.

        Args:
            replica: a table that was loaded from a snapshot of the source. It may be read meanwhile.
            name: of this follower in the log, letters, digits, ".", "_", "-"; its position is kept there, and ``prune``
                leaves what it lacks. Default None: ``prune`` does not know of it.
            max_bytes: of the files read in one round, at least one. Default 1 GiB.
        Raises:
            DeltaError: as above, or one of ``Table.apply``. The replica stands where the last delta that was applied
                ends.
            TableFullError, NotImplementedError: as ``Table.apply``.
            FileNotFoundError: nothing was published yet, or the directory is not that of a publisher.
        """
        op = "DeltaLog.follow"
        check.instance(op, "replica", replica, Table)
        self._not_beside(op, replica)
        if name is not None:  # first: what it is about to read must not be pruned
            self._keep(op, name, replica)
        applied = 0
        while found := deltas.pending(
            self.directory,
            replica.table_id,
            replica.position,
            own_mark=replica._own_mark and replica.position == replica._position,
            max_bytes=max_bytes,
            op=op,
        ):
            for delta in found:
                replicas.fitted(op, replica, delta)
            for delta in found:
                applied += replicas.apply(replica, delta, op=op, alone=applied > 0)
            if name is not None:
                self._keep(op, name, replica)
        return applied

    def _not_beside(self, op: str, table: Table) -> None:
        """Refuse a table whose own marks lie beside deltas that another one published."""
        joined, position = table._position, table.position
        if joined == position or not os.path.isdir(self.directory):
            return
        beside = [span for span in deltas.chain(self.directory) if joined < span[1] <= position]
        if beside:
            newest = max(beside, key=lambda span: span[1])
            path = os.path.join(self.directory, deltas.delta_name(*newest))
            with suppress(FileNotFoundError):  # pruned since it was listed
                replicas.awaits(op, table, deltas.decode_delta(disk.read(path), path, op=op))

    @property
    def followers(self) -> dict[str, int]:
        """Name and position of every follower that gave its name."""
        return self._followers("DeltaLog.followers")

    def forget(self, name: str) -> bool:
        """Let ``prune`` take what a follower still lacks; False if there is none of this name."""
        path = self._path("DeltaLog.forget", name)
        with disk.only_one(self.directory):
            return disk.remove(path)

    def prune(self, upto: int | None = None) -> int:
        """Delete deltas that no follower needs any more, and return how many.

        A delta goes if it ends at or before ``upto`` and at or before the position of every named follower. The newest
        delta stays: it says where the next one starts. A replica that starts from a snapshot needs what comes
        after it: after ``table.save(...)``, ``prune(table.position)``.

        Args:
            upto: position. Default None: the named followers alone decide; without any, nothing is deleted.
        Raises:
            DeltaError: the entry of a follower is damaged; nothing was deleted.
        """
        op = "DeltaLog.prune"
        if upto is not None:
            upto = check.integer(op, "upto", upto, at_least=0)
        with disk.only_one(self.directory):
            needed = [*self._followers(op).values(), *([] if upto is None else [upto])]
            return deltas.prune(self.directory, min(needed)) if needed else 0

    def _path(self, op: str, name: str) -> str:
        file = f"follower-{name}.safetensors"
        if not isinstance(name, str) or not _FOLLOWER.fullmatch(file):
            raise ValueError(
                f"[{op}] name: expected 1 to 100 letters, digits, '.', '_' or '-', the first no '.' or '-', "
                f"got {name!r}."
            )
        return os.path.join(self.directory, file)

    def _keep(self, op: str, name: str, replica: Table) -> None:
        path = self._path(op, name)
        metadata = {"kind": KIND, "table_id": replica.table_id, "position": str(replica.position)}
        disk.make_directory(self.directory)
        with disk.only_one(self.directory):
            disk.write_atomic(path, container.encode({}, metadata, op=op), op=op)

    def _followers(self, op: str) -> dict[str, int]:
        found = {}
        for file in sorted(os.listdir(self.directory)):
            match = _FOLLOWER.fullmatch(file)
            if not match:
                continue
            path = os.path.join(self.directory, file)
            try:
                _, metadata = container.decode(disk.read(path), path, op=op)
                if metadata["kind"] != KIND:
                    raise ValueError(f"kind {metadata['kind']!r}")
                found[match[1]] = deltas.position_of(metadata["position"])
            except FileNotFoundError:
                continue  # forgotten since it was listed
            except (KeyError, ValueError) as error:
                raise DeltaError(
                    f"[{op}] {path}: expected the position of a follower, got {error}. Call forget({match[1]!r}), and "
                    "follow with that replica again."
                ) from error
        return found
