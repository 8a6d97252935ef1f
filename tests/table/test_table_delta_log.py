# SPDX-License-Identifier: Apache-2.0
"""``DeltaLog``: a publisher, replicas that follow, and what they are told of a directory that is wrong."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path

import numpy as np
import pytest
from hotloop.table import Adagrad, DeltaError, DeltaLog, Table
from hotloop.table.files import deltas as delta_files
from hotloop.table.files import disk
from hotloop.table.hashing import salted_hash_bucket
from replica_cases import assert_same, during_save, insert
from table_checks import beside, refused, unchanged
from table_file_cases import flipped

DIM = 3


def source() -> Table:
    table = Table(
        DIM,
        optimizer=Adagrad(lr=0.1),
        track=("use", "changes"),
        max_capacity=500,
        evict_strategy="lfu",
    )
    table.find_or_insert(np.arange(50))
    return table


def train(table: Table, step: int) -> None:
    """Rows move, come and go."""
    rng = np.random.default_rng(step)
    keys = rng.integers(0, 200, 40)
    table.update(keys, rng.normal(size=(40, DIM)).astype(np.float32))
    table.erase(rng.integers(0, 200, 10))


@pytest.fixture
def log(tmp_path) -> DeltaLog:
    return DeltaLog(tmp_path / "deltas")


@pytest.fixture
def table(tmp_path) -> Table:
    made = source()
    made.save(tmp_path / "snapshot")
    return made


@pytest.fixture
def load(tmp_path, table):
    return lambda **options: Table.load(tmp_path / "snapshot", **options)


def files(log: DeltaLog) -> list[str]:
    return sorted(os.listdir(log.directory))


def test_replicas_end_where_the_table_is_whenever_they_look(log, table, load):
    often, late, shard = load(), load(), load(shard=(1, 3))
    assert log.position is None
    for step in range(6):
        train(table, step)
        delta = log.publish(table)
        assert log.position == delta.until == table.position
        assert log.follow(often) == 1
        assert_same(often, table)
    assert log.follow(late) == 6 and log.follow(shard) == 6
    assert_same(late, table)
    keys = table.export().keys
    assert shard.export().keys.tolist() == keys[salted_hash_bucket(keys, 3) == 1].tolist()
    assert log.follow(often) == log.follow(late) == 0
    assert often.position == late.position == shard.position == log.position


def test_a_round_is_bounded_and_all_rounds_are_made(log, table, load):
    for step in range(4):
        train(table, step)
        log.publish(table)
    replica = load()
    assert log.follow(replica, max_bytes=0) == 4
    assert_same(replica, table)


def test_an_empty_delta_moves_the_position_alone(log, table, load):
    delta = log.publish(table)
    assert len(delta.keys) == len(delta.erased) == 0
    replica = load()
    assert log.follow(replica) == 1 and replica.position == table.position
    assert_same(replica, table)


def test_a_reader_that_comes_while_a_file_is_being_written_finds_what_was_there(
    log, table, load, monkeypatch
):
    log.publish(table)
    replica, seen, fill = load(), [], disk._fill

    def in_two_halves(fd, buffers):
        data = b"".join(bytes(b) for b in buffers)
        os.write(fd, data[: len(data) // 2])
        seen.append(DeltaLog(log.directory).follow(replica))
        fill(fd, [data[len(data) // 2 :]])

    train(table, 1)
    monkeypatch.setattr(disk, "_fill", in_two_halves)
    log.publish(table)
    assert seen == [1] and not np.array_equal(replica.export().values, table.export().values)
    assert log.follow(replica) == 1
    assert_same(replica, table)


def test_replicas_follow_beside_a_publisher_that_prunes(log, table, load):
    """Each is at a position of the publisher after every call, never behind what it had, and at its end in the end."""
    log.publish(table)
    replicas = {name: load() for name in ("a", "b")}
    for name, replica in replicas.items():
        log.follow(replica, name=name)

    def follow(name, replica, mine):
        before = replica.position
        mine.follow(replica, name=name)
        assert replica.position >= before

    works = [functools.partial(follow, *item, DeltaLog(log.directory)) for item in replicas.items()]
    pruned = 0
    with beside(*works):
        for step in range(40):
            train(table, step)
            log.publish(table)
            pruned += log.prune()
    for work, replica in zip(works, replicas.values()):
        work()
        assert_same(replica, table)
    assert set(log.followers.values()) == {table.position}
    assert pruned + log.prune() == 40 and len(files(log)) == 3


def published(log: DeltaLog, table: Table, count: int) -> list:
    deltas = []
    for step in range(count):
        train(table, step)
        deltas.append(log.publish(table))
    return deltas


def test_a_missing_delta_is_missed_by_who_needs_it(log, table, load):
    ahead = load()
    first = published(log, table, 1)[0]
    log.follow(ahead)
    published(log, table, 2)
    os.unlink(os.path.join(log.directory, f"delta-{first.since}-{first.until}.safetensors"))
    behind = load()
    text = f"[DeltaLog.follow] …: {first.since} to {first.until} is missing. Fetch what is missing, or load a"
    with unchanged(behind), refused(text, DeltaError):
        log.follow(behind)
    assert behind.position == first.since
    assert log.follow(ahead) == 2
    assert_same(ahead, table)


def test_a_relay_takes_deltas_once_and_in_order(log, table, load, tmp_path):
    deltas = published(log, table, 3)
    relay = DeltaLog(tmp_path / "elsewhere")
    assert relay.add(deltas[0]) is True
    with refused("[DeltaLog.add] delta: expected one that starts at …, a gap", DeltaError):
        relay.add(deltas[2])
    assert relay.add(deltas[0].to_bytes()) is False
    assert relay.add(deltas[1].to_bytes()) is True and relay.add(deltas[2]) is True
    with pytest.raises(DeltaError, match="an overlap"):
        relay.add(table.delta(deltas[0].since))
    with pytest.raises(DeltaError, match=r"^\[DeltaLog.add\] delta: expected at least"):
        relay.add(deltas[2].to_bytes()[:40])
    replica = load()
    assert relay.follow(replica) == 3
    assert_same(replica, table)
    assert [d.until for d in relay.pending(table.table_id, deltas[0].until)] == [
        d.until for d in deltas[1:]
    ]
    with refused(
        "[DeltaLog.add] delta: expected bytes or bytearray or memoryview, got Table.", TypeError
    ):
        relay.add(table)


@pytest.mark.parametrize("how", ["truncated", "flipped", "empty", "of another table"])
def test_a_damaged_file_stops_who_needs_it_and_nobody_else(log, table, load, how):
    first, _ = published(log, table, 2)
    ahead, behind = load(), load()
    log.follow(ahead)
    path = Path(log.directory) / f"delta-{first.since}-{first.until}.safetensors"
    data, other = path.read_bytes(), source()
    for changed in {
        "truncated": [data[:-1], data[: len(data) // 2], data[:63]],
        "flipped": [flipped(data, bit) for bit in range(0, len(data) * 8, 331)],
        "empty": [b""],
        "of another table": [other.delta(0).to_bytes()],
    }[how]:
        path.write_bytes(changed)
        with unchanged(behind), refused(f"[DeltaLog.follow] {path}: ", DeltaError):
            log.follow(behind)
        assert behind.position == first.since
    train(table, 9)
    log.publish(table)
    assert log.follow(ahead) == 1
    assert_same(ahead, table)
    path.write_bytes(data)
    assert log.follow(behind) == 3
    assert_same(behind, table)


def test_pruning_leaves_what_a_named_follower_lacks(log, table, load):
    slow, fast = load(), load()
    log.publish(table)
    log.follow(slow, name="slow-1.eu")
    at = slow.position
    published(log, table, 4)
    log.follow(fast, name="fast")
    assert log.followers == {"fast": fast.position, "slow-1.eu": at}
    assert log.prune(fast.position) == 1 and log.prune() == 0
    assert log.follow(slow, name="slow-1.eu") == 4
    assert_same(slow, table)
    assert log.prune() == 3  # the newest stays
    assert log.forget("slow-1.eu") is True and log.forget("slow-1.eu") is False
    assert list(log.followers) == ["fast"]


def test_pruning_without_names_goes_by_the_position_alone(log, table, load):
    deltas = published(log, table, 4)
    assert log.prune() == 0
    assert log.prune(deltas[1].until) == 2
    with pytest.raises(DeltaError, match="is missing"):
        log.follow(load())
    with refused("[DeltaLog.prune] upto: expected an integer >= 0, got -1"):
        log.prune(-1)
    assert log.prune(10**6) == 1 and log.position == deltas[3].until


def test_a_follower_is_known_before_it_reads(log, table, load, monkeypatch):
    """Whoever prunes between its entry and its first read leaves it everything; without a name it would not."""
    deltas = published(log, table, 3)
    real = delta_files.pending

    def prune_first(*args, **options):
        log.prune(deltas[-1].until)
        return real(*args, **options)

    monkeypatch.setattr(delta_files, "pending", prune_first)
    replica, other = load(), load()
    assert log.follow(replica, name="new") == 3
    assert_same(replica, table)
    with pytest.raises(DeltaError, match="is missing"):
        log.follow(other)


def test_a_replica_that_starts_again_is_kept_from_its_snapshot_on(log, table, load):
    published(log, table, 2)
    replica = load()
    log.follow(replica, name="a")
    again = load()
    log.prune(again.position)  # what a snapshot needs is for who prunes to know
    log.follow(again, name="a")
    assert_same(again, table)
    third = load()
    log._keep("test", "a", third)
    assert log.followers == {"a": third.position} and log.prune() == 0


def test_a_damaged_entry_of_a_follower_stops_pruning(log, table, load):
    published(log, table, 3)
    log.follow(load(), name="a")
    path = Path(log.directory) / "follower-a.safetensors"
    data, before = path.read_bytes(), files(log)
    for changed in [data[:-1], b""] + [flipped(data, bit) for bit in range(len(data) * 8)]:
        path.write_bytes(changed)
        with refused("[DeltaLog.prune] …follower-a.safetensors: expected the pos", DeltaError):
            log.prune()
    assert files(log) == before
    assert log.forget("a")
    assert log.prune(10**6) == 2


@pytest.mark.parametrize("name", ["", ".a", "-a", "a/b", "a" * 101, "ä", 5])
def test_names_that_are_no_names(log, table, load, name):
    log.publish(table)
    with refused("[DeltaLog.follow] name: expected 1 to 100 letters, digits"):
        log.follow(load(), name=name)
    assert len(files(log)) == 1


def test_a_publisher_that_was_killed_goes_on_from_its_snapshot_and_its_log(log, table, load):
    replica = load()
    published(log, table, 3)
    restored = load()
    train(restored, 77)
    with pytest.raises(
        DeltaError,
        match=r"^\[DeltaLog.publish\] table: expected one at position .*, where .* ends, got one that was loaded at \d",
    ):
        DeltaLog(log.directory).publish(restored)
    restored = load()
    assert log.follow(restored) == 3
    assert_same(restored, table)
    for step in (5, 6):
        train(restored, step)
        DeltaLog(log.directory).publish(restored)
    assert log.follow(replica) == 5
    assert_same(replica, restored)
    with pytest.raises(DeltaError, match="got one that was loaded at"):
        log.publish(table)  # the one before has lost the log to it


def test_a_log_belongs_to_one_table(log, table):
    log.publish(table)
    other = source()
    other.mark()
    with refused(f"[DeltaLog.publish] table: expected table {table.table_id} as in ", DeltaError):
        log.publish(other)


def test_two_logs_of_one_table_are_apart(log, table, load, tmp_path):
    hourly, a, b = DeltaLog(tmp_path / "hourly"), load(), load()
    hourly.publish(table)
    for step in range(3):
        train(table, step)
        log.publish(table)
    hourly.publish(table)
    assert hourly.follow(b) == 2
    assert_same(b, table)
    with pytest.raises(DeltaError, match="is missing"):
        log.follow(a)  # the first delta of this one starts where the table stood
    assert hourly.follow(a) == 2


@pytest.mark.parametrize("call", ["write", "directory"])
def test_what_could_not_be_written_is_in_the_next_delta(log, table, load, monkeypatch, call):
    log.publish(table)
    train(table, 1)
    with monkeypatch.context() as patch:

        def fail(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(disk, "_fill" if call == "write" else "sync_directory", fail)
        with refused("[Errno 28] [DeltaLog.publish] path: expected to write", OSError):
            log.publish(table)
    train(table, 2)
    log.publish(table)
    replica = load()
    assert log.follow(replica) == (2 if call == "write" else 3)
    assert_same(replica, table)


def test_a_snapshot_right_after_a_delta_stands_where_it_ends(log, table, tmp_path):
    published(log, table, 2)
    table.save(tmp_path / "second")
    assert table.position == log.position
    loaded = Table.load(tmp_path / "second")
    assert loaded.position == log.position and log.follow(loaded) == 0
    log.publish(loaded)
    log.prune(table.position)
    assert log.follow(Table.load(tmp_path / "second")) == 1
    for change in (
        lambda: table.erase(table.export().keys[:1]),
        lambda: train(table, 3),
        table.clear,
    ):
        before = table.mark()
        change()
        table.save(tmp_path / "second")
        assert table.position > before


def test_rows_written_during_a_save_are_not_taken_for_published(log, table, tmp_path, monkeypatch):
    """Or a publisher that starts from this snapshot would never send them."""
    published(log, table, 1)
    end = log.position
    during_save(monkeypatch, lambda: insert(table, 777))
    table.save(tmp_path / "second")
    assert table.position > end
    assert Table.load(tmp_path / "second").contains(np.array([777])).all()


def test_a_replica_saved_while_a_delta_is_applied_takes_it_again(
    log, table, load, tmp_path, monkeypatch
):
    published(log, table, 2)
    replica = load()
    at = replica.position
    during_save(monkeypatch, lambda: log.follow(replica))
    replica.save(tmp_path / "second")
    loaded = Table.load(tmp_path / "second")
    assert loaded.position == at and log.follow(loaded) == 2
    assert_same(loaded, table)


def test_a_snapshot_of_a_table_at_work_joins_the_delta_that_spans_it(log, table, load, tmp_path):
    published(log, table, 1)
    train(table, 5)
    table.save(tmp_path / "between")
    at = table.position
    train(table, 6)
    spanning = log.publish(table)
    assert spanning.since < at < spanning.until
    for replica in (Table.load(tmp_path / "between"), load()):
        log.follow(replica)
        assert_same(replica, table)
        with pytest.raises(DeltaError, match="overlaps what was applied"):
            replica.apply(table.delta(spanning.since))
    replica = Table.load(tmp_path / "between")
    replica.save(tmp_path / "again")  # a replica's own snapshot stands where its source's did
    assert log.follow(Table.load(tmp_path / "again")) == 1


def test_what_is_no_table_or_has_no_changes(log, table, load, tmp_path):
    for call in (log.publish, log.follow):
        with pytest.raises(TypeError, match=r"^\[DeltaLog\.\w+\] \w+: expected Table, got int\."):
            call(3)
    with refused("[DeltaLog.publish] track: expected a table made with"):
        log.publish(Table(2))
    with refused("[DeltaLog.follow] directory: expected the directory of", FileNotFoundError):
        log.follow(load())
    assert repr(log) == f"DeltaLog({str(tmp_path / 'deltas')!r})"


def test_a_replica_for_serving_needs_no_track(log, tmp_path):
    table = Table(DIM, track="changes")
    assert (table.position, Table(2).position) == (0, 0)
    table.save(tmp_path / "t")
    table.insert_or_assign(np.arange(4), np.ones((4, DIM), np.float32))
    log.publish(table)
    replica = Table.load(tmp_path / "t")
    assert replica.position == 0 and log.follow(replica) == 1 and replica.position == 1
