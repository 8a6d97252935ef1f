# SPDX-License-Identifier: Apache-2.0
"""A replica is what its source was, or says that it is not; what is refused has changed nothing."""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import pytest
import torch
from hotloop.table import (
    SGD,
    Adagrad,
    CountFilter,
    Delta,
    DeltaError,
    DeltaLog,
    HashEmbedding,
    ProbabilisticFilter,
    Table,
    TableFullError,
)
from hotloop.table.files import container, replicas
from replica_cases import ONES, assert_same, at_work, insert, keys_of, replica_of, with_
from table_checks import beside, refused, unchanged

# --- bounds


@pytest.mark.parametrize("strategy", ["none", "lru", "lfu", "custom"])
def test_a_replica_takes_what_a_table_at_work_published(tmp_path, monkeypatch, strategy):
    """Of three rows one goes and another comes while a delta is made: it holds all four."""

    def put(*keys):
        scores = np.array(keys) if strategy == "custom" else None
        table.insert_or_assign(np.array(keys), ONES[: len(keys)], scores=scores)

    table = Table(1, max_capacity=3, evict_strategy=strategy, track="changes")
    put(1, 2, 3)
    replica, log = replica_of(table, tmp_path), DeltaLog(tmp_path / "deltas")

    def change():
        table.erase(np.array([2]))
        put(4)

    at_work(monkeypatch, change)
    log.publish(table)
    log.follow(replica)
    assert keys_of(replica) == [1, 2, 3, 4]  # nobody is evicted: who left is for the source to say
    log.publish(table)
    assert log.follow(replica) == 1
    assert_same(replica, table)
    assert keys_of(replica) == [1, 3, 4]


@pytest.mark.parametrize("strategy", ["none", "lru"])
def test_a_snapshot_of_a_table_at_work_is_taken_whole(tmp_path, monkeypatch, strategy):
    table = Table(1, max_capacity=200, evict_strategy=strategy, track="changes")
    insert(table, *range(200))

    def change():
        table.erase(np.arange(5))
        insert(table, 500, 501, 502)

    table.reserve(200)
    at_work(monkeypatch, change, first=100)
    table.save(tmp_path / "snapshot")
    monkeypatch.undo()
    replica, log = Table.load(tmp_path / "snapshot"), DeltaLog(tmp_path / "deltas")
    log.publish(table)
    log.follow(replica)
    assert_same(replica, table)


@pytest.mark.parametrize("strategy", ["none", "lru", "lfu"])
def test_replicas_of_a_bounded_table_with_writers_at_work(tmp_path, strategy):
    """Threads insert, erase and evict while another publishes; in the end the replica is what the table is."""
    table = Table(2, max_capacity=60, evict_strategy=strategy, track="changes")
    replica, log = replica_of(table, tmp_path), DeltaLog(tmp_path / "deltas")

    def write(rng):
        keys = rng.integers(0, 150, 5)
        with contextlib.suppress(TableFullError):
            table.insert_or_assign(keys, np.ones((5, 2), np.float32))
        table.erase(rng.integers(0, 150, 5))

    with beside(*(functools.partial(write, np.random.default_rng(seed)) for seed in range(2))):
        for step in range(60):
            log.publish(table)
            if step % 3 == 0:
                log.follow(replica)
    log.publish(table)
    log.follow(replica)
    assert_same(replica, table)
    again = Table.load(tmp_path / "snapshot")
    log.follow(again)
    assert_same(again, table)


def test_a_restored_publisher_comes_back_within_its_bound(tmp_path, monkeypatch):
    table = Table(1, max_capacity=3, evict_strategy="lru", track="changes")
    insert(table, 1, 2, 3)
    replica = replica_of(table, tmp_path)

    def change():
        table.erase(np.array([2]))
        insert(table, 4)

    at_work(monkeypatch, change)
    assert replica.apply(table.delta(replica.position))
    assert len(replica) == 4
    replica.find_or_insert(np.array([9]))
    assert len(replica) == 3 and keys_of(replica) == [3, 4, 9]


def test_a_replica_with_less_room_than_its_source_says_so(tmp_path):
    table = Table(1, max_capacity=10, track="changes")
    insert(table, 1, 2, 3)
    small = replica_of(table, tmp_path, max_capacity=4)
    insert(table, 4, 5, 6)
    table.erase(np.array([1]))
    delta = table.delta(small.position)
    before = keys_of(small)
    text = r"^\[Table.apply\] max_capacity: expected room for 2 more rows, got 4 with 3 in use\. Pass a larger"
    for _ in range(2):
        with pytest.raises(TableFullError, match=text):
            small.apply(delta)
        assert keys_of(small) == before and small.position == delta.since
    small.save(tmp_path / "small")  # and so does what is loaded from its own snapshot
    with pytest.raises(TableFullError, match=text):
        Table.load(tmp_path / "small").apply(delta)
    table.erase(np.array([4, 5]))
    assert small.apply(table.delta(small.position))  # three rows again
    assert_same(small, table)


def test_a_table_that_left_rows_out_keeps_the_highest_and_is_no_replica(tmp_path):
    table = Table(1, max_capacity=40, evict_strategy="lru", track="changes")
    insert(table, *range(40))
    for key in (7, 30, 2):
        table.find_or_insert(np.array([key]))
    small = replica_of(table, tmp_path, max_capacity=3)
    assert keys_of(small) == [2, 7, 30]
    insert(table, 99)
    text = r"^\[Table.apply\] delta: expected a replica with all rows .* max_capacity = 3 left some out"
    for each in (small, replica_of(small, tmp_path / "again")):
        with pytest.raises(DeltaError, match=text):
            each.apply(table.delta(each.position))
        assert keys_of(each) == [2, 7, 30]
    none = Table(1, max_capacity=40)
    insert(none, *range(40))
    none.save(tmp_path / "none")
    with refused("[Table.load] max_capacity: expected room for 40 more", TableFullError):
        Table.load(tmp_path / "none", max_capacity=3)


def test_a_replica_with_more_room_than_its_source(tmp_path, monkeypatch):
    table = Table(1, max_capacity=3, track="changes")
    insert(table, 1, 2, 3)
    replica = replica_of(table, tmp_path, max_capacity=4)

    def change():
        table.erase(np.array([1, 2]))
        insert(table, 4, 5)

    at_work(monkeypatch, change)
    assert replica.apply(table.delta(replica.position))
    assert len(replica) == 5
    assert replica.apply(table.delta(replica.position))
    assert_same(replica, table)


def test_a_key_that_was_erased_and_came_back_while_a_delta_was_made_is_in_it_once(monkeypatch):
    table = Table(1, track="changes")
    insert(table, *range(300))

    def change():
        table.erase(np.array([3]))
        insert(table, 1000)
        insert(table, 3, value=9.0)

    at_work(monkeypatch, change, first=100)
    delta = table.delta(0)
    at = np.flatnonzero(delta.keys == 3)
    assert len(at) == 1 and len(np.unique(delta.keys)) == len(delta.keys)


# --- one position


def test_a_publisher_does_not_apply_its_own_delta(tmp_path):
    table, log = Table(1, track="changes"), DeltaLog(tmp_path / "deltas")
    insert(table, 1, value=1.0)
    delta = log.publish(table)
    table.assign(np.array([1]), np.full((1, 1), 2.0, np.float32))
    assert table.apply(delta) is False and table.apply(delta.to_bytes()) is False
    assert log.follow(table) == 0 and log.follow(table, name="itself") == 0
    assert table.find(np.array([1])).values.tolist() == [[2.0]]
    log.publish(table)
    assert table.apply(delta) is False


def test_a_table_that_went_on_by_itself_refuses_the_deltas_of_another(tmp_path):
    """Two copies of one table that both change are a fork, whatever their positions are called."""
    table = Table(1, track="changes")
    insert(table, 1)
    log = DeltaLog(tmp_path / "deltas")
    table.save(tmp_path / "snapshot")
    trained, marked = (Table.load(tmp_path / "snapshot") for _ in range(2))
    for each in (trained, marked):
        insert(each, 50, value=5.0)
    insert(table, 2)
    delta = log.publish(table)
    text = (
        rf"^\[Table.apply\] delta: expected a replica that only reads, got a table with rows or sightings that changed "
        rf"since position {delta.since}, which .* Load a snapshot of the source"
    )
    with pytest.raises(DeltaError, match=text):
        trained.apply(delta)
    marked.save(tmp_path / "marked")
    assert marked.position == delta.until  # the same number, another table
    with pytest.raises(DeltaError, match=r"^\[Table.apply\] delta: .* marks \d+ to \d+ of its own"):
        marked.apply(delta)
    for each in (trained, marked):
        with refused("[DeltaLog.follow] delta: expected a replica that", DeltaError):
            log.follow(each)
        assert keys_of(each) == [1, 50]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.erase(np.array([1])),
        lambda t: t.expire(100),
        lambda t: t.clear(),
        lambda t: t.find_or_insert(np.array([1]), time=99),
        lambda t: t.find_or_insert(np.array([9])),
    ],
)
def test_a_replica_that_changed_says_so(tmp_path, change):
    table = Table(1, track=("use", "changes"), admission=CountFilter(100, 0))
    table.find_or_insert(np.array([1, 2]), time=5)
    table.admission = CountFilter(100, 3)
    replica = replica_of(table, tmp_path)
    delta = table.delta(replica.position)
    replica.find(np.array([1, 2, 3]))
    change(replica)
    with pytest.raises(DeltaError, match="expected a replica that only reads"):
        replica.apply(delta)


def test_a_delta_that_was_broken_off_is_applied_again(tmp_path, monkeypatch):
    table = Table(1, track="changes")
    insert(table, 1, 2)
    replica = replica_of(table, tmp_path)
    insert(table, 3)
    table.erase(np.array([1]))
    delta = table.delta(replica.position)
    with monkeypatch.context() as patch:

        def stop(*_):
            raise KeyboardInterrupt

        patch.setattr(replicas, "stand", stop)
        with pytest.raises(KeyboardInterrupt):
            replica.apply(delta)
    assert replica.apply(delta) is True
    assert_same(replica, table)


def test_a_replica_knows_nothing_from_before_its_snapshot(tmp_path):
    """Rows that were loaded look old: a delta from before would leave out what changed until then."""
    table = Table(1, track="changes")
    insert(table, 1)
    first = table.mark()
    insert(table, 2)
    restored = replica_of(table, tmp_path)
    with refused(
        f"[Table.delta] since: expected a position from {restored.position} on, … got {first}",
        DeltaError,
    ):
        restored.delta(first)


# --- check, then write


def bad_deltas(delta: Delta) -> dict[str, tuple[dict, str]]:
    rows, n = dict(delta.rows), len(delta.keys)
    without = {name: {k: v for k, v in rows.items() if k != name} for name in rows}
    return {
        "narrow": ({"rows": {**rows, "values": rows["values"][:, :1]}}, r"values: expected F32 \(\d, 2\), got F32"),
        "wide": ({"rows": {**rows, "values": rows["values"].astype(np.float64)}}, "values: expected F32 .* got F64"),
        "bits": (
            {"rows": {**rows, "values": container.RawArray("bfloat16", np.zeros((n, 2), np.uint16))}},
            "values: expected F32 .* got BF16",
        ),
        "no state": ({"rows": without["state"]}, r"state: expected F32 \(\d, 2\), got none"),
        "state": ({"rows": {**rows, "state": rows["state"].astype(np.float64)}}, "state: expected F32 .* got F64"),
        "no scores": ({"rows": without["scores"]}, "scores: expected I64 .* got none"),
        "scores": ({"rows": {**rows, "scores": rows["scores"].astype(np.int32)}}, "scores: expected I64 .* got I32"),
        "no use": ({"rows": without["last_use"]}, "last_use: expected U32 .* got none"),
        "use": ({"rows": {**rows, "last_use": rows["scores"]}}, "last_use: expected U32 .* got I64"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "which", ["narrow", "wide", "bits", "no state", "state", "no scores", "scores", "no use", "use"]
)
def test_a_delta_that_is_refused_has_changed_nothing(tmp_path, which):
    table = Table(
        2, track=("use", "changes"), evict_strategy="lfu", max_capacity=50, optimizer=Adagrad()
    )
    insert(table, *range(10))
    replica, log = replica_of(table, tmp_path), DeltaLog(tmp_path / "deltas")
    table.erase(np.arange(3))
    insert(table, 20, 21)
    good = log.publish(table)
    changes, text = bad_deltas(good)[which]
    log.add(with_(good, **changes, since=good.until, until=good.until + 1))
    with unchanged(replica):
        with pytest.raises(DeltaError, match=rf"^\[Table.apply\] {text}"):
            replica.apply(with_(good, **changes))
        with pytest.raises(DeltaError, match=rf"^\[DeltaLog.follow\] {text}"):
            log.follow(replica)  # not even the good one before it
    assert replica.position == good.since and len(replica) == 10
    assert replica.apply(good)
    assert_same(replica, table)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scores": torch.zeros(3, dtype=torch.int64)}, ValueError, r"scores: expected I64 \(6,\), got I64 \(3,\)"),
        ({"scores": torch.zeros(6)}, ValueError, r"scores: expected I64 \(6,\), got F32"),
        ({"last_use": torch.zeros(6, 2, dtype=torch.int32)}, ValueError, r"last_use: expected U32 \(6,\), got U32"),
        ({"keys": torch.zeros(6)}, ValueError, r"keys: expected I64 \(6,\), got F32"),
        ({"state": torch.zeros(6, 3, dtype=torch.float64)}, ValueError, r"state: expected F32 \(6, 3\), got F64"),
        ({"values": [1.0]}, TypeError, "values: expected a torch.Tensor, got list"),
        ({"tick": "late"}, TypeError, "tick: expected an integer, got str"),
        ({"epoch": 2**32}, ValueError, "epoch: expected an integer"),
        ({"step": -1}, ValueError, "step: expected an integer >= 0"),
        ({"admission": {"name": "CountFilter"}}, ValueError, r"admission: expected the state of CountFilter"),
        ({"admission": 3}, ValueError, "admission: expected the state of CountFilter.*, got that of a int"),
    ],
)  # fmt: skip
def test_a_state_dict_that_is_refused_has_changed_nothing(change, error, text):
    def made():
        return HashEmbedding(
            3, optimizer=Adagrad(), evict_strategy="lfu", max_capacity=50, track="use",
            admission=CountFilter(100, 0),
        )  # fmt: skip

    module, other = made(), made()
    module(torch.arange(6)).sum().backward()
    other(torch.arange(20, 24)).sum().backward()
    other.table.admission.add(np.array([5]))
    state = {"_extra_state": {**module.state_dict()["_extra_state"], **change}}
    clock, expected = replicas.clock(other.table), rf"^\[HashEmbedding.load_state_dict\] {text}"
    with unchanged(other.table), pytest.raises(error, match=expected):
        other.load_state_dict(state)
    assert replicas.clock(other.table) == clock
    assert other.table.admission.counts(np.array([5])).tolist() == [1]


def test_a_state_dict_of_more_rows_than_fit_keeps_those_with_the_highest_scores():
    module = HashEmbedding(2, optimizer=SGD(), evict_strategy="lru", max_capacity=50)
    for key in (3, 1, 4, 15, 9, 2, 6):
        module(torch.tensor([key])).sum().backward()
    small = HashEmbedding(2, optimizer=SGD(), evict_strategy="lru", max_capacity=3)
    small.load_state_dict(module.state_dict())
    assert keys_of(small.table) == [2, 6, 9]


def test_a_filter_that_refuses_a_state_keeps_its_own():
    chance = ProbabilisticFilter(3.0, seed=5)
    with pytest.raises(ValueError, match="seed: expected an integer >= 0"):
        chance.load_state_dict({"version": 1, "threshold": 7.0, "equal": True, "seed": -1})
    assert repr(chance) == "ProbabilisticFilter(3.0, equal=False, seed=5)"


def test_a_device_whose_buckets_evict_takes_no_deltas(tmp_path):
    table = Table(1, max_capacity=3, evict_strategy="lru", track="changes")
    replica = replica_of(table, tmp_path)
    insert(table, 1)
    delta, replica.device = table.delta(replica.position), "cuda:0"
    text = r"^\[Table.apply\] device: expected a replica on the CPU with evict_strategy 'lru', got cuda:0, where"
    with pytest.raises(NotImplementedError, match=text):
        replica.apply(delta)
    assert len(replica) == 0
