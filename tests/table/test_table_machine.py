# SPDX-License-Identifier: Apache-2.0
"""A table against a dict through any sequence of verbs, growth, snapshots and deltas to a replica, a shard and a
publisher that is restored.

``HOTLOOP_TEST_STEPS=1000000 pytest tests/table/test_table_machine.py -m slow`` takes that many steps; without the
variable the slow test takes 10^6.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hotloop.table import (
    SGD,
    Constant,
    Delta,
    DeltaError,
    Table,
    TableFullError,
    _export,
    salted_hash_bucket,
)
from hotloop.table.files import replicas
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from table_model import Model

DIM = 2
LR = 0.5
EXTREMES = (0, -1, 2**63 - 1, -(2**63))
KEYS = st.one_of(st.integers(-12, 12), st.sampled_from(EXTREMES), st.integers(0, 200))
BATCH = st.lists(KEYS, max_size=24)
NUMBERS = st.integers(-64, 64)  # sums of them and their halves are exact in float32
TIMES = st.integers(0, 50)
STRATEGIES = ("none", "lru", "lfu", "custom")


def rows_of(table):
    rows = table.export()
    return {
        key: (tuple(value), use)
        for key, value, use in zip(
            rows.keys.tolist(), rows.values.tolist(), rows.last_use.tolist(), strict=True
        )
    }


class TableMachine(RuleBasedStateMachine):
    """``model`` is what the table holds, ``replica_model`` what the replica held when it was last brought forward."""

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()

    def teardown(self):
        self.directory.cleanup()

    @initialize(
        strategy=st.sampled_from(STRATEGIES),
        bound=st.sampled_from([3, 20, 100]),
        capacity=st.sampled_from([1, 3]),
        threads=st.sampled_from([1, 2]),
    )
    def start(self, strategy, bound, capacity, threads):
        torch.set_num_threads(threads)
        self.strategy = strategy
        self.bound = None if strategy == "none" and bound == 100 else bound
        self.table = Table(
            DIM,
            capacity=capacity,
            max_capacity=self.bound,
            evict_strategy=strategy,
            optimizer=SGD(lr=LR),
            initializer=Constant(1.0),
            track=("use", "changes"),
        )
        self.rows = Model(strategy, self.bound)  # of (value, last use)
        self.model, self.scores = self.rows.rows, self.rows.score
        self.position: int | None = None  # of the replica
        self.replica: Table | None = None
        self.shard: Table | None = None  # (0, 2) of the same
        self.replica_model: dict = {}
        self.replica_scores: dict = {}
        self.applied: list[Delta] = []

    # --- the model

    def upsert(self, keys, values, time, scores=None):
        """values: one per key, or None (new rows are ones). Returns who was evicted or refused."""

        def row(i, before):
            value, use = before or ((1.0,) * DIM, 0)
            return (value if values is None else tuple(values[i]), max(time, use))

        return self.rows.upsert(keys, row, scores)

    def full(self, keys, call):
        """Whether nobody says who leaves, and the batch does not fit; it then changes nothing."""
        new = set(keys) - self.model.keys()
        if (
            self.strategy != "none"
            or self.bound is None
            or len(self.model) + len(new) <= self.bound
        ):
            return False
        self.rows.tick += 1
        with pytest.raises(TableFullError):
            call()
        return True

    def batch(self, keys, number):
        numbers = np.float32(number) + np.arange(len(keys), dtype=np.float32)[:, None]
        given = None
        if self.strategy == "custom":
            given = np.array([(k * 7 + number) % 32 for k in keys], np.int64)
        return np.array(keys, np.int64), np.repeat(numbers, DIM, 1), given

    # --- verbs

    @rule(keys=BATCH)
    def find(self, keys):
        found = self.table.find(np.array(keys, np.int64))
        assert found.found.tolist() == [k in self.model for k in keys]
        wanted = [list(self.model[k][0]) if k in self.model else [0.0] * DIM for k in keys]
        assert found.values.tolist() == wanted

    @rule(keys=BATCH, number=NUMBERS, time=TIMES)
    def insert(self, keys, number, time):
        k, v, s = self.batch(keys, number)
        if self.full(keys, lambda: self.table.insert_or_assign(k, v, time=time)):
            return
        self.upsert(keys, v.tolist(), time, None if s is None else s.tolist())
        done = self.table.insert_or_assign(k, v, time=time, scores=s)
        assert done.tolist() == [key in self.model for key in keys]

    @rule(keys=BATCH, number=NUMBERS, time=TIMES)
    def insert_and_evict(self, keys, number, time):
        k, v, s = self.batch(keys, number)
        if self.full(keys, lambda: self.table.insert_and_evict(k, v, time=time)):
            return
        gone = self.upsert(keys, v.tolist(), time, None if s is None else s.tolist())
        out = self.table.insert_and_evict(k, v, time=time, scores=s)
        assert out.keys.tolist() == [g[0] for g in gone]
        assert out.values.tolist() == [list(g[1][0]) for g in gone]
        assert out.scores.tolist() == [g[2] for g in gone]

    @rule(keys=BATCH, number=NUMBERS, time=TIMES)
    def find_or_insert(self, keys, number, time):
        k, _, s = self.batch(keys, number)
        if self.full(keys, lambda: self.table.find_or_insert(k, time=time)):
            return
        self.upsert(keys, None, time, None if s is None else s.tolist())
        found = self.table.find_or_insert(k, time=time, scores=s)
        wanted = [list(self.model[key][0]) if key in self.model else [0.0] * DIM for key in keys]
        assert found.values.tolist() == wanted

    @rule(keys=BATCH, number=NUMBERS, time=TIMES)
    def assign(self, keys, number, time):
        k, v, s = self.batch(keys, number)
        self.rows.tick += 1
        for i, key in enumerate(keys):
            if key in self.model:
                self.model[key] = (tuple(v[i].tolist()), max(time, self.model[key][1]))
                self.scores[key] = self.rows.next_score(key, 1 if s is None else int(s[i]))
        known = [key in self.model for key in keys]
        assert self.table.assign(k, v, time=time, scores=s).tolist() == known

    @rule(keys=BATCH, number=NUMBERS, time=TIMES)
    def accumulate(self, keys, number, time):
        """Only keys that are there, so that the model needs no second rule of insertion."""
        k, v, s = self.batch(keys, number)
        known = [key in self.model for key in keys]
        self.rows.tick += any(known)
        for i, key in enumerate(keys):
            if known[i]:
                value = tuple(a + b for a, b in zip(self.model[key][0], v[i].tolist()))
                self.model[key] = (value, max(time, self.model[key][1]))
                self.scores[key] = self.rows.next_score(key, 1 if s is None else int(s[i]))
        done = self.table.accum_or_assign(k, v, np.ones(len(keys), bool), time=time, scores=s)
        assert done.tolist() == known

    @rule(keys=BATCH)
    def erase(self, keys):
        wanted = []
        for key in keys:
            wanted.append(self.model.pop(key, None) is not None)
            self.scores.pop(key, None)
        assert self.table.erase(np.array(keys, np.int64)).tolist() == wanted

    @precondition(lambda self: self.strategy != "custom")
    @rule(keys=BATCH, number=NUMBERS, time=TIMES)
    def update(self, keys, number, time):
        k, g, _ = self.batch(keys, number)
        if self.full(keys, lambda: self.table.update(k, g, time=time)):
            return
        self.upsert(keys, None, time)
        lost = self.table.update(k, g, time=time)
        assert lost == sum(key not in self.model for key in keys)
        self.rows.tick += 1
        for key in set(keys) & set(self.model):
            merged = g[k == key].sum(0).tolist()
            value, use = self.model[key]
            self.model[key] = (tuple(w - LR * m for w, m in zip(value, merged)), max(use, time))
            if self.strategy == "lru":
                self.scores[key] = self.rows.tick

    @rule(before=TIMES)
    def expire(self, before):
        old = [key for key, (_, use) in self.model.items() if use < before]
        assert self.table.expire(before) == len(old)
        for key in old:
            del self.model[key], self.scores[key]

    @rule(rows=st.integers(1, 3000))
    def grow(self, rows):
        self.table.reserve(rows)
        assert self.table.capacity >= min(rows, self.bound or rows)

    @rule()
    def clear(self):
        self.table.clear()
        self.model.clear()
        self.scores.clear()

    # --- files

    @rule(capacity=st.integers(1, 500))
    def save_and_load(self, capacity):
        self.table.save(Path(self.directory.name) / "t")
        loaded = Table.load(Path(self.directory.name) / "t", capacity=capacity)
        assert rows_of(loaded) == self.model
        if self.strategy != "none":
            keys = np.array(list(self.model), np.int64)
            assert loaded.scores(keys).tolist() == [self.scores[k] for k in self.model]
        # From here on it is the table: ticks, times and changes go on in it.
        if self.replica is None or self.position == 0:
            self.table = loaded
            self.replica, self.shard, self.applied = None, None, []

    @rule(of=st.integers(1, 5))
    def save_and_load_by_shards(self, of):
        self.table.save(Path(self.directory.name) / "t")
        seen: dict = {}
        for index in range(of):
            part = rows_of(Table.load(Path(self.directory.name) / "t", shard=(index, of)))
            keys = np.array(list(part), np.int64)
            assert (salted_hash_bucket(keys, of) == index).all()
            seen.update(part)
        assert seen == self.model

    @rule()
    def replicate(self):
        self.table.save(Path(self.directory.name) / "t")
        self.replica = Table.load(Path(self.directory.name) / "t")
        self.shard = Table.load(Path(self.directory.name) / "t", shard=(0, 2))
        self.position = self.replica._position
        self.replica_model, self.replica_scores = dict(self.model), dict(self.scores)
        self.applied = []

    @rule()
    def restart_the_replica(self):
        """A replica that is saved and loaded stands where it stood."""
        if self.replica is not None:
            self.replica.save(Path(self.directory.name) / "r")
            self.replica = Table.load(Path(self.directory.name) / "r")

    @precondition(lambda self: self.replica is not None)
    @rule(as_bytes=st.booleans())
    def bring_forward(self, as_bytes):
        assert self.position is not None
        delta = self.table.delta(self.position)
        changed = {k: v for k, v in self.model.items() if self.replica_model.get(k) != v}
        assert changed.keys() <= set(delta.keys.tolist())
        assert set(delta.keys.tolist()) <= self.model.keys()
        if delta.present is None:
            assert set(delta.erased.tolist()) >= self.replica_model.keys() - self.model.keys()
        else:
            assert set(delta.present.tolist()) == self.model.keys()
        self.apply(delta.to_bytes() if as_bytes else delta)
        self.position = delta.until
        self.replica_model, self.replica_scores = dict(self.model), dict(self.scores)
        self.applied.append(delta)

    def apply(self, delta):
        assert self.replica.apply(delta) is True and self.shard.apply(delta) is True

    @precondition(lambda self: self.replica is not None)
    @rule(gone=BATCH, keys=BATCH, number=NUMBERS, time=TIMES, everything=st.booleans())
    def publish_during_writes(self, gone, keys, number, time, everything):
        """Rows go and come between the two looks of one delta; the next makes it good, whatever the bound."""
        real = _export.blocks

        def blocks(*given):
            _export.blocks = real
            self.clear() if everything else self.erase(gone)
            self.insert(keys, number, time)
            yield from real(*given)

        _export.blocks = blocks
        delta = self.table.delta(self.position)
        assert _export.blocks is real
        self.apply(delta)
        self.position = delta.until
        # What went since is not known to be gone: rows of before are expected to be missed in the next delta.
        self.replica_model = {key: self.model.get(key) for key in rows_of(self.replica)}
        self.bring_forward(False)

    @precondition(lambda self: self.replica is not None)
    @rule()
    def restore_the_publisher(self):
        """After a crash the replica is the table, and goes on as the other would have."""
        self.bring_forward(True)
        assert replicas.clock(self.replica) == replicas.clock(self.table)
        self.table, self.replica, self.shard, self.applied = self.replica, None, None, []

    @precondition(lambda self: self.applied and self.replica is not None)
    @rule(which=st.integers(0, 10))
    def repeat_a_delta(self, which):
        delta = self.applied[which % len(self.applied)]
        for each in (self.replica, self.shard, self.table):
            assert each.apply(delta) is False

    @precondition(lambda self: self.replica is not None)
    @rule(number=NUMBERS)
    def skip_a_delta(self, number):
        between = self.table.mark()
        late = self.table.delta(between)
        with pytest.raises(DeltaError, match="is missing"):
            self.replica.apply(late)

    @precondition(lambda self: self.applied and self.replica is not None)
    @rule()
    def overlap(self):
        delta = self.table.delta(self.applied[-1].since)
        with pytest.raises(DeltaError, match="overlaps what was applied"):
            self.replica.apply(delta)

    @invariant()
    def they_agree(self):
        if not hasattr(self, "table"):
            return
        assert rows_of(self.table) == self.model
        assert len(self.table) == len(self.model) <= self.table.capacity
        if self.strategy != "none" and self.model:
            keys = np.array(list(self.model), np.int64)
            assert self.table.scores(keys).tolist() == [self.scores[k] for k in self.model]
        if self.replica is not None:
            assert rows_of(self.replica) == self.replica_model
            assert self.replica.position == self.shard.position == self.position
            keys = np.array(list(self.replica_model), np.int64)
            mine = keys[salted_hash_bucket(keys, 2) == 0].tolist()
            assert rows_of(self.shard) == {key: self.replica_model[key] for key in mine}
            if self.strategy != "none" and len(keys):
                wanted = [self.replica_scores[key] for key in self.replica_model]
                assert self.replica.scores(keys).tolist() == wanted


QUICK = settings(
    max_examples=30, stateful_step_count=40, deadline=None, database=None, derandomize=True
)


def test_any_sequence_of_verbs():
    run_state_machine_as_test(TableMachine, settings=QUICK)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_a_million_verbs():
    steps = int(os.environ.get("HOTLOOP_TEST_STEPS", 10**6))
    nightly = settings(
        max_examples=max(1, steps // 200),
        stateful_step_count=200,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(TableMachine, settings=nightly)
