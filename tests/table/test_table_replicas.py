# SPDX-License-Identifier: Apache-2.0
"""Counters, sightings and uses go with the rows of a table; a clear, and any number of erasures, reach its replicas."""

from __future__ import annotations

import numpy as np
import pytest
from hotloop.table import (
    SGD,
    CountFilter,
    Delta,
    DeltaError,
    DeltaLog,
    ProbabilisticFilter,
    Table,
)
from hotloop.table.files import container, deltas, replicas
from replica_cases import ONES, assert_same, at_work, insert, keys_of, replica_of, with_
from table_checks import grouped, refused

# --- counters travel


def test_the_clock_goes_with_the_rows(tmp_path):
    """Scores of "lru" are numbers of calls: with a clock that stayed behind, every new row is older than all others."""
    table = Table(1, max_capacity=3, evict_strategy="lru", track="changes", optimizer=SGD(lr=0.1))
    table.find_or_insert(np.array([1, 2, 3]))
    restored = replica_of(table, tmp_path)
    for _ in range(200):
        table.update(np.array([1, 2, 3]), ONES[:3])
    log = DeltaLog(tmp_path / "deltas")
    log.publish(table)
    assert log.follow(restored) == 1
    assert_same(restored, table)
    for each in (table, restored):
        each.find_or_insert(np.array([77]))
        assert keys_of(each) == [2, 3, 77]


@pytest.mark.parametrize("strategy", ["epoch_lru", "epoch_lfu"])
def test_the_epoch_goes_with_the_rows(tmp_path, strategy):
    table = Table(1, max_capacity=3, evict_strategy=strategy, track="changes")
    insert(table, 1, 2, 3)
    restored = replica_of(table, tmp_path)
    table.find_or_insert(np.array([1, 2, 3]), epoch=9)
    assert restored.apply(table.delta(restored.position))
    for each in (table, restored):
        each.find_or_insert(np.array([77]))  # of epoch 9, as was the last
    assert_same(restored, table)


def test_the_draws_of_a_probabilistic_filter_go_on(tmp_path):
    table = Table(1, admission=ProbabilisticFilter(3.0, seed=5), track="changes")
    restored = replica_of(table, tmp_path)
    for first in range(0, 300, 30):
        table.find_or_insert(np.arange(first, first + 30))
    assert restored.apply(table.delta(restored.position))
    for each in (table, restored):
        each.find_or_insert(np.arange(1000, 1300))
    assert_same(restored, table)


@pytest.mark.parametrize("splits", [1, 5])
def test_sightings_go_with_the_rows(tmp_path, splits):
    """A restored publisher lets in whom the one before would have let in; the ring moves on and forgets in between."""
    table = Table(1, admission=CountFilter(200, 2, splits=splits), track="changes")
    rng = np.random.default_rng(splits)
    table.find_or_insert(rng.integers(0, 400, 100))
    restored, log = replica_of(table, tmp_path), DeltaLog(tmp_path / "deltas")
    for _ in range(12):
        table.find_or_insert(rng.integers(0, 400, 40))
        log.publish(table)
    assert log.follow(restored) == 12
    assert_same(restored, table)
    for _ in range(12):
        keys = rng.integers(0, 400, 40)
        found = [each.find_or_insert(keys).found for each in (table, restored)]
        np.testing.assert_array_equal(*found)
    assert_same(restored, table)
    if splits == 5:
        assert table.admission.state_dict()["advances"] > 5


def test_a_delta_holds_the_lines_of_the_filter_that_changed():
    table = Table(1, admission=CountFilter(100_000, 2), track="changes")
    table.find_or_insert(np.arange(20_000))
    mark = table.mark()
    table.find_or_insert(np.array([5, 10**6]))
    change = table.delta(mark).admission
    assert change.state["whole"] is False and 1 <= len(change.lines) <= 4
    table.admission.clear()
    assert not table.delta(mark).admission.cells.any()


def test_another_filter_is_sent_whole_and_only_to_one_like_it(tmp_path):
    table = Table(1, admission=CountFilter(100, 3), track="changes")
    table.find_or_insert(np.arange(30))
    replica = replica_of(table, tmp_path)
    table.admission = CountFilter(100, 3)
    table.find_or_insert(np.arange(1000, 1010))
    delta = table.delta(replica.position)
    assert delta.admission.state["whole"] is True
    other = Table.load(tmp_path / "snapshot")
    assert replica.apply(delta.to_bytes())
    assert_same(replica, table)
    for counter, text in (
        (CountFilter(90, 3), "(1, 100, 7), not (1, 90, 7)"),
        (ProbabilisticFilter(1.0), "got that of a CountFilter"),
    ):
        other.admission = counter
        with refused(f"[Table.apply] admission: expected what …{text}", DeltaError):
            other.apply(delta)
        assert len(other) == 0
    other.admission = None  # a copy for serving
    assert other.apply(delta)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"head": 7}, "head: expected an integer >= 0 and <= 6, got 7"),
        ({"elements": [0]}, "1 numbers of elements for 7 splits"),
        ({"elements": [-1] * 7}, "elements: expected an integer >= 0"),
        ({"failures": None}, "failures: expected an integer"),
        ({"whole": ...}, r"KeyError\('whole'\)"),
    ],
)
def test_a_filter_that_does_not_fit_is_refused_before_anything_is_written(tmp_path, change, text):
    table = Table(1, admission=CountFilter(100, 0), track="changes")
    replica = replica_of(table, tmp_path)
    table.find_or_insert(np.arange(30))
    delta = table.delta(replica.position)
    state = {k: v for k, v in {**delta.admission.state, **change}.items() if v is not ...}
    damaged = deltas.FilterChange(state, delta.admission.lines, delta.admission.cells)
    with pytest.raises(DeltaError, match=rf"^\[Table.apply\] admission: expected what .*{text}"):
        replica.apply(with_(delta, admission=damaged))
    assert len(replica) == 0 and replica.position == delta.since
    far = deltas.FilterChange(
        delta.admission.state, np.array([10**9]), np.zeros((1, 32), np.uint16)
    )
    with pytest.raises(DeltaError, match="lines 1000000000 to 1000000000 of "):
        replica.apply(with_(delta, admission=far))


def test_a_row_that_was_used_and_not_written_is_not_expired_by_a_restored_publisher(tmp_path):
    table = Table(1, track=("use", "changes"))
    table.find_or_insert(np.array([1, 2]), time=10)
    restored, log = replica_of(table, tmp_path), DeltaLog(tmp_path / "deltas")
    table.find_or_insert(np.array([1]), time=50)
    log.publish(table)
    log.follow(restored)
    assert_same(restored, table)
    assert [each.expire(40) for each in (table, restored)] == [1, 1]
    assert keys_of(restored) == keys_of(table) == [1]


def test_a_use_that_leaves_nothing_is_no_change():
    table = Table(1, track="changes")
    insert(table, 1)
    mark = table.mark()
    table.find_or_insert(np.array([1]))
    assert len(table.delta(mark).keys) == 0


def test_uses_of_an_lfu_table_reach_its_replica(tmp_path):
    table = Table(1, max_capacity=3, evict_strategy="lfu", track="changes")
    insert(table, 1, 2, 3)
    replica = replica_of(table, tmp_path)
    for _ in range(5):
        table.find_or_insert(np.array([1, 2]))
    assert replica.apply(table.delta(replica.position))
    assert_same(replica, table)


def test_a_snapshot_of_a_table_at_work_has_a_clock_beyond_its_scores(tmp_path, monkeypatch):
    table = Table(1, max_capacity=50, evict_strategy="lru")
    insert(table, *range(50))

    def change():
        for _ in range(30):
            table.find_or_insert(np.arange(50))

    at_work(monkeypatch, change)
    loaded = replica_of(table, tmp_path)
    assert_same(loaded, table)
    loaded.find_or_insert(np.array([77]))
    assert loaded.contains(np.array([77])).all()


# --- files of before


def test_deltas_of_version_1_are_read_and_the_clock_follows_their_scores(tmp_path):
    """They hold no clock: what their scores say of it is what a restored table goes on from."""
    table = Table(1, max_capacity=3, evict_strategy="lru", track="changes")
    insert(table, 1, 2, 3)
    restored = replica_of(table, tmp_path)
    for _ in range(20):
        insert(table, 1, 2, 3)
    delta = table.delta(restored.position)
    old = Delta(delta.table_id, delta.since, delta.until, delta.rows, delta.erased)
    data = old.to_bytes()
    assert b'"version":"1"' in data[:400] and b'"version":"2"' in delta.to_bytes()[:400]
    assert restored.apply(data)
    restored.find_or_insert(np.array([77]))
    assert restored.contains(np.array([77])).all()


def test_a_delta_that_says_more_is_of_version_2_and_comes_back(tmp_path):
    table = Table(2, admission=CountFilter(100, 1), track="changes")
    table.find_or_insert(np.array([1, 1, 2, 2, 3]))
    table.clear()
    table.insert_or_assign(np.array([8]), np.ones((1, 2), np.float32))
    wanted = table.delta(0)
    found = deltas.decode_delta(wanted.to_bytes())
    assert found.present.tolist() == [8] and len(found.erased) == 0
    assert found.clock == wanted.clock == replicas.clock(table)
    assert found.writer == wanted.writer and found.admission.state == wanted.admission.state
    np.testing.assert_array_equal(found.admission.lines, wanted.admission.lines)
    np.testing.assert_array_equal(found.admission.cells, wanted.admission.cells)
    with pytest.raises(container.NewerFormatError, match="upgrade hotloop to read it"):
        container.decode(wanted.to_bytes(), "a reader of version 1")


NO_DELTA = {
    ValueError: [
        ({"present": np.zeros(2, np.uint64)}, "present: expected I64 (m,) like keys"),
        ({"present": np.arange(2), "erased": np.arange(1)}, "no key beside present, got 1"),
        ({"clock": {"tick": -1, "epoch": 0, "step": 0}}, "tick: expected an integer >= 0"),
        ({"clock": {"tick": 1, "epoch": 2**32, "step": 0}}, "epoch: expected an integer"),
        ({"writer": "x"}, "writer: expected 16 lower-case hexadecimal digits"),
    ],
    TypeError: [({"clock": {"tick": 1}}, "epoch: expected an integer, got NoneType")],
}


@pytest.mark.parametrize(("error", "change", "text"), grouped(NO_DELTA))
def test_what_is_no_delta_is_refused(error, change, text):
    nothing = np.empty(0, np.int64)
    good = {
        "table_id": "0" * 32, "since": 0, "until": 1, "erased": nothing,
        "rows": {"keys": nothing, "values": np.empty((0, 1), np.float32)},
    }  # fmt: skip
    with refused(f"[Delta] …{text}", error):
        Delta(**{**good, **change})
    with pytest.raises(ValueError, match=r"^\[FilterChange\] lines: expected I64 \(k,\) and U16"):
        deltas.FilterChange({}, np.arange(2), np.zeros((1, 32), np.uint16))
    with pytest.raises(TypeError, match=r"^\[FilterChange\] state: expected Mapping, got int"):
        deltas.FilterChange(3, np.arange(1), np.zeros((1, 32), np.uint16))


# --- no end of a log


def test_a_clear_reaches_the_replicas(tmp_path):
    table = Table(1, track="changes")
    insert(table, *range(50))
    replica, shard = replica_of(table, tmp_path), Table.load(tmp_path / "snapshot", shard=(1, 3))
    log = DeltaLog(tmp_path / "deltas")
    table.clear()
    insert(table, 40, 60, value=4.0)
    delta = log.publish(table)
    assert delta.present is not None and sorted(delta.present.tolist()) == [40, 60]
    for each in (replica, shard):
        assert log.follow(each) == 1
    assert_same(replica, table)
    assert set(keys_of(shard)) <= {40, 60}
    insert(table, 61)
    assert log.publish(table).present is None  # and the next one is as any other
    assert log.follow(replica) == 1
    assert_same(replica, table)


def test_more_erasures_than_a_table_remembers_reach_the_replicas(tmp_path):
    """2^21 are kept; with more of them gone a delta lists who is there, not the rows of all."""
    many, table = 2**21 + 10, Table(1, track="changes")
    insert(table, *range(20))
    replica, log = replica_of(table, tmp_path), DeltaLog(tmp_path / "deltas")
    for begin in range(100, 100 + many, 1 << 20):
        keys = np.arange(begin, min(begin + (1 << 20), 100 + many))
        table.insert_or_assign(keys, np.zeros((len(keys), 1), np.float32))
        table.erase(keys)
    table.erase(np.arange(5))
    insert(table, 7, value=3.0)
    delta = log.publish(table)
    assert sorted(delta.present.tolist()) == list(range(5, 20)) and delta.keys.tolist() == [7]
    assert log.follow(replica) == 1
    assert_same(replica, table)
    insert(table, 8)
    assert log.publish(table).present is None
