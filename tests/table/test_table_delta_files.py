# SPDX-License-Identifier: Apache-2.0
"""Deltas: which one a replica applies, and a directory of them that holds one chain or says what is wrong."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hotloop.table.files import container, deltas, disk
from hotloop.table.files.deltas import (
    Delta,
    DeltaError,
    admit,
    decode_delta,
    encode_delta,
    pending,
    prune,
    publish,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from table_checks import grouped, refused
from table_file_cases import TABLE_ID, any_array, assert_same, flipped, rows

OTHER_ID = "f" * 32


def delta(since: int, until: int, *, table_id: str = TABLE_ID, count: int = 5) -> Delta:
    block = {name: array[:count] for name, array in rows(5, first=since).items()}
    return Delta(table_id, since, until, block, np.arange(since, until))


def data(since: int, until: int, **options) -> bytes:
    return encode_delta(delta(since, until, **options))


def put(directory, since: int, until: int, content: bytes | None = None) -> None:
    """A file that arrives by another way than ``publish``."""
    directory.mkdir(exist_ok=True)
    content = data(since, until) if content is None else content
    (directory / f"delta-{since}-{until}.safetensors").write_bytes(content)


def spans(directory, position: int, **options) -> list[tuple[int, int]]:
    return [(d.since, d.until) for d in pending(directory, TABLE_ID, position, **options)]


def assert_equal(found: Delta, wanted: Delta) -> None:
    head = (wanted.table_id, wanted.since, wanted.until)
    assert (found.table_id, found.since, found.until) == head
    assert_same(found.rows, wanted.rows)
    assert_same({"erased": found.erased}, {"erased": wanted.erased})


@settings(deadline=None)
@given(
    count=st.integers(0, 5),
    erased=st.integers(0, 5),
    more=st.booleans(),
    unsigned=st.booleans(),
    since=st.integers(0, 2**63 - 2),
    picked=st.data(),
)
def test_any_delta_comes_back(count, erased, more, unsigned, since, picked):
    until = picked.draw(st.integers(since + 1, 2**63 - 1))
    block = {"keys": np.arange(count), "values": picked.draw(any_array(st.just(count)))}
    if more:
        block["state"] = np.zeros((count, 2), np.float32)
    gone = -np.arange(erased) - 1
    if unsigned:
        block["keys"], gone = block["keys"].astype(np.uint64), gone.astype(np.uint64)
    wanted = Delta(TABLE_ID, since, until, block, gone)
    found = decode_delta(encode_delta(wanted))
    assert_equal(found, wanted)
    assert (found.state is not None) == more
    assert found.keys is found.rows["keys"] and found.values is found.rows["values"]


def test_every_flipped_bit_and_truncation_of_a_delta_is_found():
    content = data(3, 9)
    for bit in range(len(content) * 8):
        with pytest.raises(DeltaError, match=r"\[decode_delta\] delta: expected .* got .* again"):
            decode_delta(flipped(content, bit))
    for length in range(len(content)):
        with pytest.raises(DeltaError):
            decode_delta(content[:length])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "part"}, "expected a delta, got a file of kind 'part'"),
        ({"since": "-1"}, r"entries of a delta, got ValueError\(\"position '-1'\"\)"),
        ({"since": "03"}, "position '03'"),
        ({"until": "3"}, "a position after since = 3, got 3"),
        ({"until": "9" * 19}, "expected an integer <= 9223372036854775807"),
        ({"table_id": "x"}, "table_id: expected 32 lower-case"),
        ({"table_id": None}, r"got KeyError\('table_id'\)"),
    ],
)
def test_metadata_with_a_valid_checksum_is_still_checked(change, text):
    arrays, metadata = container.decode(data(3, 9), "x")
    metadata = {k: v for k, v in {**metadata, **change}.items() if v is not None}
    with pytest.raises(DeltaError, match=text):
        decode_delta(b"".join(container.encode(arrays, metadata)))


def test_arrays_with_a_valid_checksum_are_still_checked():
    arrays, metadata = container.decode(data(3, 9), "x")
    for name in ("keys", "values", "erased"):
        without = {key: array for key, array in arrays.items() if key != name}
        with pytest.raises(DeltaError, match=f"expected the entries of a delta, got .*{name}"):
            decode_delta(b"".join(container.encode(without, metadata)))


NO_DELTA = {
    ValueError: [
        ({"table_id": "A" * 32}, "table_id: expected 32 lower-case hexadecimal digits"),
        ({"table_id": 5}, "table_id: expected 32 … got 5"),
        ({"since": -1}, "since: expected an integer >= 0, got -1"),
        ({"until": 3}, "until: expected a position after since = 3, got 3"),
        ({"until": 2**63}, "until: expected an integer <= "),
        ({"rows": {}}, "rows: expected keys and values, got nothing"),
        ({"rows": {"keys": np.arange(2)}}, "expected keys and values, got keys"),
        ({"rows": {**rows(2), "erased": np.arange(2)}}, "expected no array 'erased'"),
        ({"rows": {**rows(2), "keys": np.zeros((2, 1), int)}}, "expected shape (n,)"),
        ({"rows": {**rows(2), "more": np.arange(3)}}, "['more']: expected 2 entries"),
        ({"rows": {**rows(2), "more": np.array(3)}}, "['more']: expected 2 entries"),
        ({"erased": np.zeros(2, np.uint64)}, "erased: expected I64 (m,) like keys"),
        ({"erased": np.zeros((2, 2), int)}, "erased: expected I64 (m,)"),
    ],
    TypeError: [
        ({"since": 0.5}, "since: expected an integer, got float"),
        ({"rows": {**rows(2), "keys": np.arange(2.0)}}, "['keys']: expected int64 or"),
        ({"rows": {**rows(2), "more": [1, 2]}}, "['more']: expected ndarray"),
        ({"erased": [1]}, "erased: expected ndarray"),
    ],
}


@pytest.mark.parametrize(("error", "change", "text"), grouped(NO_DELTA))
def test_what_is_no_delta_is_refused(error, change, text):
    good = {"table_id": TABLE_ID, "since": 3, "until": 9, "rows": rows(2), "erased": np.arange(1)}
    Delta(**good)
    with refused(f"[Delta] …{text}", error):
        Delta(**{**good, **change})


def test_a_replica_applies_the_delta_that_starts_where_it_stands():
    for position in range(12):
        if position == 3:
            assert admit(position, TABLE_ID, delta(3, 9)) is True
        elif position >= 9:
            assert admit(position, TABLE_ID, delta(3, 9)) is False
        else:
            kind = f"{position} to 3 is missing" if position < 3 else "overlaps what was applied"
            with pytest.raises(
                DeltaError, match=rf"\[admit\] delta: .* {position}, .* 3 to 9.*{kind}"
            ):
                admit(position, TABLE_ID, delta(3, 9))
    with pytest.raises(DeltaError, match=f"expected table {OTHER_ID}, got {TABLE_ID}"):
        admit(9, OTHER_ID, delta(3, 9))
    with pytest.raises(ValueError, match=r"\[admit\] position: expected an integer >= 0, got -1"):
        admit(-1, TABLE_ID, delta(3, 9))


def test_published_deltas_are_pending_in_order(tmp_path):
    directory = tmp_path / "new" / "deltas"
    chain = [(0, 1), (1, 9), (9, 10), (10, 100), (100, 101)]
    for span in chain:
        assert publish(directory, data(*span)) is True
    for position in (0, 1, 9, 10, 100, 101):
        assert spans(directory, position) == [span for span in chain if span[1] > position]
    assert_equal(pending(directory, TABLE_ID, 100)[0], delta(100, 101))
    assert sorted(os.listdir(directory)) == sorted(deltas.delta_name(*span) for span in chain)


def test_publishing_the_same_again_does_nothing(tmp_path):
    for span in ((0, 3), (3, 9)):
        publish(tmp_path, data(*span))
    before = {path: path.stat() for path in tmp_path.iterdir()}
    for span in ((0, 3), (3, 9)):
        assert publish(tmp_path, bytearray(data(*span))) is False
    assert {path: path.stat() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (data(10, 11), "expected one that starts at position 9, .* got 10 to 11, a gap"),
        (data(8, 11), "got 8 to 11, an overlap"),
        (data(3, 11), "got 3 to 11, an overlap"),
        (data(0, 1), "got 0 to 1, an overlap"),
        (data(3, 9, count=4), "another of the same span, a fork"),
        (data(9, 11, table_id=OTHER_ID), f"expected table {TABLE_ID} as in .*, got {OTHER_ID}"),
        (flipped(data(9, 11), 5000), r"delta_bytes: expected .* got"),
        (b"", "delta_bytes: expected at least"),
    ],
)
def test_what_does_not_join_is_not_published(tmp_path, content, text):
    publish(tmp_path, data(0, 3))
    publish(tmp_path, data(3, 9))
    with pytest.raises(DeltaError, match=rf"\[publish\] .*{text}"):
        publish(tmp_path, content)
    assert spans(tmp_path, 0) == [(0, 3), (3, 9)]
    assert publish(tmp_path, data(9, 11))


def test_a_chain_may_start_anywhere_and_a_damaged_end_stops_the_publisher(tmp_path):
    publish(tmp_path, data(50, 60))
    put(tmp_path, 50, 60, flipped(data(50, 60), 4000))
    with pytest.raises(DeltaError, match=r"\[publish\] .*delta-50-60.safetensors: expected"):
        publish(tmp_path, data(60, 61))


@pytest.mark.parametrize(
    ("chain", "position", "text"),
    [
        ([(0, 3), (5, 9)], 0, "starts at position 3, got 5 to 9: 3 to 5 is missing"),
        ([(3, 9)], 0, "starts at position 0, got 3 to 9: 0 to 3 is missing"),
        ([(0, 3), (2, 9)], 0, "starts at position 3, got 2 to 9, which overlaps"),
        ([(0, 9), (3, 6)], 0, "starts at position 9, got 3 to 6, which overlaps the one before"),
        ([(0, 9), (3, 9)], 0, "got 3 to 9, which overlaps the one before"),
        ([(3, 9)], 5, "starts at position 5, got 3 to 9, which overlaps"),
        (
            [(0, 3), (3, 5), (3, 9)],
            0,
            "one delta that starts at position 3, got two, to 5 and to 9",
        ),
        ([(3, 5), (3, 9), (5, 9)], 3, "got two, to 5 and to 9, a fork"),
        ([(0, 5), (0, 9)], 5, "starts at position 5, got 0 to 9, which overlaps"),
    ],
)
def test_a_chain_that_is_broken_ahead_of_the_replica_is_refused(tmp_path, chain, position, text):
    for span in chain:
        put(tmp_path, *span)
    with pytest.raises(
        DeltaError, match=re.escape(f"[pending] {tmp_path}: expected") + ".*" + text
    ):
        pending(tmp_path, TABLE_ID, position)


def test_what_is_behind_the_replica_does_not_hold_it_up(tmp_path):
    for span in ((0, 3), (1, 4), (6, 9), (9, 12)):
        put(tmp_path, *span)
    put(tmp_path, 5, 6, b"damaged")
    assert spans(tmp_path, 9) == [(9, 12)]
    assert spans(tmp_path, 12) == spans(tmp_path, 99) == []


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (flipped(data(3, 9), 4000), "expected checksum"),
        (data(3, 9)[:-1], "expected checksum"),
        (data(3, 8), "expected the span of its name, got 3 to 8"),
        (b"".join(container.encode({}, {})), "expected a delta, got a file of kind None"),
    ],
)
def test_a_file_that_is_not_the_delta_is_refused(tmp_path, content, text):
    put(tmp_path, 0, 3)
    put(tmp_path, 3, 9, content)
    with pytest.raises(
        DeltaError, match=rf"\[pending\] {tmp_path}/delta-3-9.safetensors: .*{text}"
    ):
        pending(tmp_path, TABLE_ID, 0)


def test_another_tables_delta_is_refused(tmp_path):
    put(tmp_path, 0, 3)
    put(tmp_path, 3, 9, data(3, 9, table_id=OTHER_ID))
    with refused(f"[pending] …expected table {TABLE_ID}, got {OTHER_ID}", DeltaError):
        pending(tmp_path, TABLE_ID, 0)


def test_pending_stops_at_its_bytes_and_goes_on(tmp_path):
    for i in range(6):
        put(tmp_path, i, i + 1)
    size = len(data(0, 1))
    assert spans(tmp_path, 0, max_bytes=0) == [(0, 1)]
    assert spans(tmp_path, 1, max_bytes=3 * size) == [(1, 2), (2, 3), (3, 4)]
    assert len(spans(tmp_path, 0, max_bytes=100 * size)) == 6
    with pytest.raises(ValueError, match=r"\[pending\] max_bytes: expected an integer >= 0"):
        pending(tmp_path, TABLE_ID, 0, max_bytes=-1)
    with pytest.raises(ValueError, match=r"\[pending\] position: expected an integer >= 0"):
        pending(tmp_path, TABLE_ID, -1)


def test_a_missing_directory_is_said_to_be_missing(tmp_path):
    with refused("[pending] directory: expected the directory of", FileNotFoundError):
        pending(tmp_path / "x", TABLE_ID, 0)


def test_pruning_keeps_what_a_replica_and_the_publisher_need(tmp_path):
    for i in range(6):
        publish(tmp_path, data(2 * i, 2 * i + 2))
    (tmp_path / "delta-0-2.safetensors.bak").write_text("mine")
    assert prune(tmp_path, 5) == 2
    assert spans(tmp_path, 4) == [(4, 6), (6, 8), (8, 10), (10, 12)]
    assert prune(tmp_path, 5) == 0
    assert prune(tmp_path, 1000) == 3
    assert sorted(os.listdir(tmp_path)) == ["delta-0-2.safetensors.bak", "delta-10-12.safetensors"]
    with pytest.raises(DeltaError, match="a gap"):
        publish(tmp_path, data(13, 14))
    assert publish(tmp_path, data(12, 14))


def test_a_delta_pruned_while_it_is_read_is_listed_again(tmp_path, monkeypatch):
    for i in range(3):
        publish(tmp_path, data(i, i + 1))
    real, pruned = disk.read, []

    def read(path, **options):
        if not pruned:
            pruned.append(prune(tmp_path, 2))
        return real(path, **options)

    monkeypatch.setattr(disk, "read", read)
    with pytest.raises(DeltaError, match="0 to 2 is missing"):
        pending(tmp_path, TABLE_ID, 0)
    assert pruned == [2]


def test_a_link_to_nowhere_is_an_error_and_no_endless_loop(tmp_path):
    (tmp_path / "delta-0-3.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        pending(tmp_path, TABLE_ID, 0)


def test_other_names_are_no_deltas(tmp_path):
    names = ["delta-00-3.safetensors", "delta-0-03.safetensors", "delta-0-0.safetensors"]
    names += [".delta-0-3.safetensors", f".delta-0-3.safetensors.{'0' * 16}.hotloop-tmp"]
    names += ["delta-1-2", "notes.txt"]
    for name in names:
        (tmp_path / name).write_text("mine")
    assert pending(tmp_path, TABLE_ID, 0) == []
    assert publish(tmp_path, data(5, 6))
    assert len(set(names) - set(os.listdir(tmp_path))) == 1  # the file a killed writer left


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.integers(1, 50), min_size=1, max_size=8),
    limit=st.integers(0, 5000),
    lost=st.none() | st.integers(0, 7),
    draws=st.data(),
)
def test_replicas_that_follow_end_where_the_table_is(tmp_path_factory, steps, limit, lost, draws):
    """A replica of any start that polls, applies and polls again equals a dict that saw every change; or is told."""
    directory = tmp_path_factory.mktemp("deltas")
    ends = np.cumsum([0, *steps]).tolist()
    truth: dict[int, float] = {}
    states = [dict(truth)]
    for since, until in itertools.pairwise(ends):
        written = draws.draw(st.lists(st.integers(0, 9), max_size=4, unique=True))
        erased = draws.draw(st.lists(st.integers(0, 9), max_size=4, unique=True))
        keys, values = np.array(written, np.int64), np.full((len(written), 1), float(until))
        change = Delta(
            TABLE_ID, since, until, {"keys": keys, "values": values}, np.array(erased, np.int64)
        )
        publish(directory, encode_delta(change))
        for key in erased:
            truth.pop(key, None)
        truth.update(dict.fromkeys(written, float(until)))
        states.append(dict(truth))
    start = draws.draw(st.integers(0, len(steps)))
    position, replica = ends[start], dict(states[start])
    lost = None if lost is None or lost >= len(steps) else lost
    if lost is not None:
        (directory / deltas.delta_name(ends[lost], ends[lost + 1])).unlink()
    told = False
    while not told:
        try:
            found = pending(directory, TABLE_ID, position, max_bytes=limit)
        except DeltaError:
            told = True
            continue
        if not found:
            break
        for change in found:
            assert admit(position, TABLE_ID, change)
            for key in change.erased:
                replica.pop(int(key), None)
            replica.update(zip(change.keys.tolist(), change.values[:, 0].tolist()))
            position = change.until
            assert not admit(position, TABLE_ID, change)
    assert replica == states[ends.index(position)]
    # a loss at the very end looks like a publisher that is not there yet
    assert told == (lost is not None and start <= lost < len(steps) - 1)
    shutil.rmtree(directory)


def test_of_publishers_at_once_one_wins(tmp_path):
    """Threads stand for processes: each opens the directory by itself, and locks belong to what was opened."""
    contents = [data(3, 5), data(3, 9), data(3, 9, count=4), data(3, 7)]
    for i in range(10):
        directory = tmp_path / str(i)
        publish(directory, data(0, 3))
        ready = threading.Barrier(len(contents))

        def attempt(content, directory=directory, ready=ready):
            ready.wait()
            try:
                return publish(directory, content)
            except DeltaError:
                return False

        with ThreadPoolExecutor(len(contents)) as pool:
            outcomes = list(pool.map(attempt, contents))
        assert outcomes.count(True) == 1, outcomes
        assert len(spans(directory, 0)) == 2
