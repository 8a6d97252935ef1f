# SPDX-License-Identifier: Apache-2.0
"""``Table``: 64-bit keys to rows of values and optimizer state, grown, filtered, evicted, saving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..core.rules import RowOptimizer
from ..front import arrays, check
from . import _convert, _export
from ._store import DTYPES, MAX_ROWS, Store
from .files import pickled, replicas, saving
from .results import NO_ROW, Evicted, Found, Rows
from .results import TableFullError as TableFullError


class Table(Store):
    """Map 64-bit keys to rows of ``dim`` numbers; no two keys share a row and no key is reserved.

    Values and optimizer state lie in one row. Batches run on torch's or OpenMP's threads, and calls from many threads
    may overlap: a reader sees each row whole and never waits, not even for growth. Of a batch, repeated keys take
    effect in order. Arrays are NumPy or torch, on the CPU; results are of the kind of ``keys``.

    With ``device="cuda"`` the rows lie in the memory of that device, arrays are torch or CuPy ones on it, and one
    thread calls at a time. A key then has one bucket of 128 slots, and a full bucket evicts its own lowest row,
    whatever others hold: eviction is not exact over the table. Of a batch, uses of known keys count before unknown
    keys enter, and these enter in the order of their hashes. Not inside CUDA graphs. See docs/table.md.

    A row costs 15 bytes beyond values and state at a load of 0.85, 8 more with an eviction strategy and 4 more for each
    of ``track``. Shapes: keys (n,) int64, uint64 or int32; values (n, dim).

    Args:
        dim: numbers per row, 1 to 65536.
        capacity: rows to make room for at first, >= 1; grows by itself. Default 1024, or less under a
            max_capacity.
        max_capacity: rows at most; then rows are evicted, or TableFullError is raised. Default None: 2^32 - 16.
        evict_strategy: what leaves a full table: the row with the lowest score, ties by the lower key (as unsigned).
            "lru": number of the call that last used it; "lfu": uses, or the sum of ``scores``; "custom": ``scores``;
            "epoch_lru", "epoch_lfu": the caller's ``epoch`` first. A new key whose score is lower than every row's is
            refused ("lfu" lets everything in). Default "none".
        admission: a ``CountFilter`` or ``ProbabilisticFilter`` that unknown keys must pass in ``find_or_insert``,
            ``update`` and the modules; asked once per key and batch, with how often the batch holds it. Default None.
        dtype: how values are stored. "int8" is for serving: see ``quantized``. Default "float32".
        optimizer: the rule of ``update``, e.g. ``RowwiseAdagrad(lr=0.02)``. Default None.
        initializer: ``Uniform``, ``Normal`` or ``Constant``: first values from (seed, key). Default
            ``Uniform(-0.05, 0.05)``.
        track: "use" keeps the second of the last write or training lookup, for ``expire``; "changes" keeps what
            ``delta`` needs. Default ().
        device: "cpu", "cuda" or "cuda:<index>". Default "cpu".
        hash_seed: of the places of keys, 0 to 2^64 - 1; kept by snapshots, pickles and copies. Keys that share a bucket
            cannot be chosen without knowing it. On the CPU no result depends on it; on a device it decides which
            keys share a bucket, so give it there to see the same rows evicted again. Default None: drawn at random.

    Raises:
        TypeError, ValueError: a setting is not as stated.
        NotImplementedError: the device cannot hold such a table, or hotloop was built without CUDA.
        RuntimeError: there is no such device, or it has no memory for the rows.

    Examples:
        >>> import numpy as np
        >>> from hotloop.table import Constant
        >>> table = Table(2, initializer=Constant(1.0))
        >>> keys = np.array([7, -1, 7])
        >>> table.find_or_insert(keys).values.tolist()
        [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
        >>> len(table)
        2

    Reference:
        Liu et al. 2022, "Monolith", arXiv:2209.07663; the verbs are those of NVIDIA HierarchicalKV. Differs from both:
        buckets of twelve one-byte tags probed in order instead of cuckoo moves, exact instead of per-bucket eviction.
    """

    def __len__(self) -> int:
        return int(self._native.size)

    @property
    def capacity(self) -> int:
        """Rows before the index grows, or is full; on a device a bucket may be full before."""
        return int(self._native.capacity)

    @property
    def load_factor(self) -> float:
        """Rows per slot of the index."""
        return float(self._native.size / self._native.slots)

    @property
    def nbytes(self) -> int:
        """Bytes of address space in use: index, rows in whole chunks of about 4 MiB, candidates for eviction, erasures.

        An admission filter has its own ``nbytes``.
        """
        return int(self._native.bytes)

    def __repr__(self) -> str:
        return (
            f"Table(dim={self.dim}, size={self.size}, capacity={self.capacity}, dtype={self.dtype!r}, "
            f"optimizer={self.optimizer!r}, evict_strategy={self.evict_strategy!r})"
        )

    def find(self, keys: Any) -> Found:
        """Return the rows of keys, zeros where there is none, and which were there; changes nothing."""
        op = "Table.find"
        keys = self._keys(op, keys)
        values, (found, bits) = self._empty_rows(keys), _convert.flags(keys)
        self._native.find(int(keys.shape[0]), keys, values, bits, self._scale)
        return Found(values, found)

    def scores(self, keys: Any) -> Any:
        """Return the scores that decide which rows are evicted, (n,) int64; 0 where there is no row.

        Scores are compared as unsigned: those of epochs from 2^31 on are negative numbers here.
        """
        op = "Table.scores"
        if self.evict_strategy == "none":
            raise ValueError(f"[{op}] keys: expected a table with an evict_strategy, got 'none'.")
        keys = self._keys(op, keys)
        n = int(keys.shape[0])
        scores = arrays.empty(keys, (n,), "int64")
        self._native.contains(n, keys, _convert.flags(keys)[1], scores)
        return scores

    def find_or_insert(
        self, keys: Any, *, scores: Any = None, epoch: int | None = None, time: int | None = None
    ) -> Found:
        """Return the rows of keys, those of unknown keys initialised; ``found`` says which were known.

        Keys that are not let in (by ``admission``, or refused by a full table) get zeros.

        Args:
            keys: (n,).
            scores: (n,) int64 >= 0: the score ("custom", required) or how much it grows ("lfu", default 1). Sums
                stay at 2^63 - 1.
            epoch: upper half of the score of the epoch strategies, 0 to 2^32 - 1. Default None: the last one given
                to this table, which ``update`` and the modules take as well; 0 before the first.
            time: second of this use, for ``expire``; default: now.
        """
        op = "Table.find_or_insert"
        keys = self._keys(op, keys)
        moment = self._moment(op, keys, scores, epoch, time)
        values, (found, bits) = self._empty_rows(keys), _convert.flags(keys)
        n, admits = int(keys.shape[0]), self._admits()
        with self._room(op):
            self._native.find_or_insert(n, keys, values, bits, self._scale, moment, admits)
        return Found(values, found)

    def insert_or_assign(
        self,
        keys: Any,
        values: Any,
        *,
        scores: Any = None,
        epoch: int | None = None,
        time: int | None = None,
    ) -> Any:
        """Give keys these values; unknown ones get a row. The last of repeated keys stays.

        Optimizer state of known keys is kept. Arguments as in ``find_or_insert``; admission is not asked. Values are
        finite, and stay so in the table's dtype.

        Returns:
            (n,) bool: the key has a row now (False: refused by a full table).
        Raises:
            ValueError, TableFullError: nothing was written.
        """
        op = "Table.insert_or_assign"
        keys = self._keys(op, keys)
        return self._upsert(op, keys, values, (scores, epoch, time))[0] != NO_ROW

    def insert_and_evict(
        self,
        keys: Any,
        values: Any,
        *,
        scores: Any = None,
        epoch: int | None = None,
        time: int | None = None,
    ) -> Evicted:
        """``insert_or_assign`` that returns every pair that is not in the table for it, as HierarchicalKV does.

        Those are rows that had to leave, and pairs of the batch that a full table refused, with the score that they
        would have had: written to a second store in this order, nothing is lost.
        """
        op = "Table.insert_and_evict"
        keys = self._keys(op, keys)
        _, evicted = self._upsert(op, keys, values, (scores, epoch, time), keep=True)
        return _export.evicted(evicted, keys, self)

    def assign(
        self,
        keys: Any,
        values: Any,
        *,
        scores: Any = None,
        epoch: int | None = None,
        time: int | None = None,
    ) -> Any:
        """Give known keys these values; returns which were known, (n,) bool."""
        return self._assign("Table.assign", keys, values, (scores, epoch, time))

    def accum_or_assign(
        self,
        keys: Any,
        values: Any,
        accum: Any,
        *,
        scores: Any = None,
        epoch: int | None = None,
        time: int | None = None,
    ) -> Any:
        """Add to rows that the caller found, insert those it did not; returns which were applied, (n,) bool.

        HierarchicalKV's rule: where ``accum`` (n,) bool is set and the key is there, values are added; where it is not
        set and the key is not there, they are inserted; a mismatch (another call inserted or evicted it meanwhile) is
        left alone.

        Raises:
            ValueError: a value, or a sum, is not finite in the table's dtype. Nothing was written.
        """
        op = "Table.accum_or_assign"
        keys = self._keys(op, keys)
        accum = _convert.mask(op, "accum", accum, keys)
        # All is checked before anything is written.
        if self.dtype == "int8":
            raise ValueError(
                f"[{op}] values: expected a table of floats to add to, got dtype int8."
            )
        values = _convert.given_values(op, values, keys, self)
        _convert.check_fits(op, values, self.dtype)
        self._moment(op, keys, scores, epoch, time)
        there = self.contains(keys)
        if bool((accum & there).any()):
            part = keys[accum & there]
            _convert.check_added(op, self, part, values[accum & there], self.find(part).values)
        done = _convert.flags(keys)[0]
        add, insert = accum & there, ~accum & ~there
        if bool(add.any()):
            use = (None if scores is None else scores[add], epoch, time)
            done[add] = self._assign(op, keys[add], values[add], use, add=True)
        if bool(insert.any()):
            use = (None if scores is None else scores[insert], epoch, time)
            done[insert] = self._upsert(op, keys[insert], values[insert], use)[0] != NO_ROW
        return done

    def erase(self, keys: Any) -> Any:
        """Remove keys; returns which were there, (n,) bool."""
        keys = self._keys("Table.erase", keys)
        found, bits = _convert.flags(keys)
        self._native.erase(int(keys.shape[0]), keys, bits)
        return found

    def clear(self) -> None:
        """Remove all rows. The next delta then lists the keys that are there, and a replica drops all others."""
        self._native.clear()

    def reserve(self, capacity: int) -> None:
        """Make room for this many rows at once."""
        op = "Table.reserve"
        capacity = check.integer(op, "capacity", capacity, at_least=1, at_most=MAX_ROWS)
        self._native.reserve(capacity)

    def expire(self, before: int) -> int:
        """Erase rows last used before this second; returns how many. Needs ``track="use"``.

        A use is a write or a training lookup (``find_or_insert``, ``update``), not ``find``. Let ``before`` come from
        the data's own clock, and a replay of old data expires nothing.
        """
        op = "Table.expire"
        self._tracks(op, "use")
        before = check.integer(op, "before", before, at_least=0, at_most=2**32 - 1)
        return int(self._native.expire(before))

    def update(
        self,
        keys: Any,
        grads: Any,
        *,
        optimizer: RowOptimizer | None = None,
        time: int | None = None,
    ) -> int:
        """Apply the row optimizer: gradients of repeated keys are summed first, in order, then every row moves once.

        Unknown keys are inserted first (if ``admission`` lets them), as Monolith does. Threads do not change
        the bits.

        Args:
            keys: (n,). grads: (n, dim) float32, finite. time: as in ``find_or_insert``.
            optimizer: another learning rate or decay for this call; the same state. Default: the table's.
        Returns:
            How many gradients found no row (not let in, or evicted by this very batch).
        Raises:
            ValueError: a gradient is NaN or infinite, or those of one key sum up to more than 1e15 in size (nothing was
                written; on a device only with HOTLOOP_CHECK=1), or the table has no optimizer.
        """
        op = "Table.update"
        keys = self._keys(op, keys)
        grads = _convert.gradients(op, grads, keys, (int(keys.shape[0]), self.dim))
        rule = self._rule(op, optimizer)
        _convert.check_gradients(op, grads, keys)
        rows, _ = self._upsert(op, keys, None, (None, None, time), ask=True)
        out = int((rows == NO_ROW).sum())
        return out + self._update(rule, keys, rows, grads, time)

    def export_batches(self, rows: int = 1 << 16, *, since: int = 0) -> Iterator[Rows]:
        """Yield all rows as NumPy arrays, about ``rows`` at a time, each whole, in the order of memory.

        Rows written meanwhile appear as before or after; a key that is erased and inserted again meanwhile may appear
        twice, the newer one later. bfloat16 and int8 values are given as float32.
        """
        op = "Table.export_batches"
        rows = check.integer(op, "rows", rows, at_least=1)
        since = check.integer(op, "since", since, at_least=0, at_most=2**63 - 1)
        if since:
            self._tracks(op, "changes")
        for block in _export.blocks(self, rows, since):
            yield _export.shown_rows(self, block)

    def export(self) -> Rows:
        """Return all rows at once, sorted by key (as signed)."""
        parts = list(self.export_batches()) or [_export.shown_rows(self, _export.room(self, 0))]
        whole = [np.concatenate(columns) for columns in zip(*parts)]
        order = _export.newest(whole[0])
        return Rows(*(column[order] for column in whole))

    def quantized(self, dtype: str = "int8", *, value_range: float = 1.0) -> Table:
        """Return a copy for serving, without state: "int8", "float16" or "bfloat16".

        int8 is fixed_r8: steps of value_range / 128; values outside [-value_range, value_range) are clipped, and
        lookups give float32. An int8 copy is on the CPU, others are where this table is.
        """
        op = "Table.quantized"
        check.choice(op, "dtype", dtype, DTYPES[1:])
        value_range = check.number(op, "value_range", value_range, above=0, below=float("inf"))
        copy = Table(
            self.dim,
            capacity=max(self.size, 1),
            dtype=dtype,
            initializer=self.initializer,
            device=None if dtype == "int8" else self.device,
        )
        copy.value_range = value_range
        for part in self.export_batches():
            values = _convert.stored(op, part.values, part.keys, copy)
            copy._native.import_rows(len(part.keys), (part.keys, values, None, None, None))
        return copy

    def save(self, directory: str | os.PathLike[str]) -> Any:
        """Write a snapshot, all of it or none, streaming about 64 MiB at a time; see docs/table-format.md."""
        return saving.save(self, directory)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        capacity: int | None = None,
        shard: tuple[int, int] | None = None,
        max_capacity: int | None = None,
        device: Any = None,
    ) -> Table:
        """Read a snapshot into a table of any capacity, or one shard (i, of): ``salted_hash_bucket(keys, of) == i``.

        ``device`` may be another than that of the table that was saved.

        The table goes on where the one saved stood: the admission filter with its sightings, the clock of "lru", the
        last epoch. A shard stays one: it takes its part of every delta; its filter is the whole one.

        ``max_capacity`` may be another than that of the table saved. With less room than rows the ones with the highest
        scores are kept, and the table is no replica any more; without a strategy that is a ``TableFullError``. A
        snapshot of a table at work may hold more rows than its bound: they are all taken, since deltas say which left.
        """
        return saving.load(cls, directory, capacity, shard, max_capacity, device)

    def mark(self) -> int:
        """Return a position: ``delta(since=...)`` tells what changed after it."""
        self._tracks("Table.mark", "changes")
        return replicas.marked(self)

    def delta(self, since: int) -> Any:
        """Return what changed since a mark, as a ``Delta`` (arrays; ``to_bytes``); ``DeltaLog`` carries them.

        Rows that were written, rows whose score or second of last use changed, keys that went; the clock of "lru", the
        last epoch, the draws of a ``ProbabilisticFilter`` and what a ``CountFilter`` saw. After ``clear``, or more than
        2^21 erasures, it lists the keys that are there, 8 bytes each, instead of those that went.

        Raises:
            ValueError: ``since`` is after the table's position.
            DeltaError: ``since`` is before the position where this table was loaded, or a delta brought it.
        """
        self._tracks("Table.delta", "changes")
        return replicas.delta(self, since)

    def apply(self, delta: Any) -> bool:
        """Bring a replica forward by a delta; False if it holds it already, as does the table that made it.

        The replica is then what its source was. It takes more rows than ``max_capacity`` where the delta of a table at
        work holds them, and evicts nothing by itself. All is checked before anything is written.

        Raises:
            DeltaError: the delta is another table's, does not join this position, or has other columns; or this table
                changed since by itself, or has not all rows of its source.
            TableFullError: this table was loaded with a smaller ``max_capacity`` than its source's, and has no room.
            NotImplementedError: with an ``evict_strategy`` on a device, whose buckets evict by themselves.
        """
        return replicas.apply(self, delta)

    def __reduce__(self) -> Any:
        """Pickled and copied with rows, state and filter, as a table of its own: with another ``table_id``."""
        return pickled.reduced(self)
