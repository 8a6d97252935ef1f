# SPDX-License-Identifier: Apache-2.0
"""Threads of Python that read, write, erase, evict and grow one table at once: rows are whole, nothing is lost."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hotloop.table import SGD, Constant, Table
from table_checks import beside

DIM = 33  # two cache lines and a bit: a torn row would show
SECONDS = 1.0


def rows_for(keys, writes):
    """Every element of a row is key % 1000 + 1000 * the number of the write: exact in float32."""
    return np.repeat((keys % 1000 + 1000 * writes).astype(np.float32)[:, None], DIM, 1)


def assert_whole(keys, found):
    there = found.values[found.found]
    assert (there == there[:, :1]).all(), "a row is torn"
    assert (there[:, 0] % 1000 == keys[found.found] % 1000).all(), "a row of another key"
    assert not found.values[~found.found].any()


def seeded(work: Callable, count: int) -> list[Callable[[], object]]:
    """The work of as many threads, each with numbers of its own."""
    return [functools.partial(work, np.random.default_rng(seed)) for seed in range(count)]


def together(*works: Callable[[], object]) -> None:
    """Run all until the time is over or one fails."""
    with beside(*works) as failed:
        failed.wait(SECONDS)


def reader(table, lowest, highest, seen, seed=0, verb="find"):
    rng = np.random.default_rng(seed)

    def read():
        keys = rng.integers(lowest, highest, 300)
        found = getattr(table, verb)(keys)
        assert_whole(keys, found)
        seen.append(int(found.found.sum()))

    return read


def writer(table, final, first, count, seed):
    """Inserts, overwrites, erases; its keys are nobody else's, and ``final`` is what must be there at the end."""

    rng, turns = np.random.default_rng(seed), itertools.cycle(range(1, 1001))

    def write():
        turn = next(turns)
        keys = first + np.unique(rng.integers(0, count, 200))
        if rng.random() < 0.3:
            wanted = [k in final for k in keys.tolist()]
            assert table.erase(keys).tolist() == wanted
            for key in keys.tolist():
                final.pop(key, None)
            assert not table.contains(keys).any()
            return
        assert table.insert_or_assign(keys, rows_for(keys, turn)).all()
        final.update((k, k % 1000 + 1000 * turn) for k in keys.tolist())
        found = table.find(keys)
        np.testing.assert_array_equal(found.values, rows_for(keys, turn))

    return write


@pytest.mark.parametrize("threads", [1, 2])
def test_writers_of_their_own_keys_lose_nothing(threads):
    torch.set_num_threads(threads)
    table = Table(DIM, capacity=1)
    finals: list[dict] = [{}, {}, {}]
    seen: list[int] = []

    def grow():
        table.reserve(table.capacity + 1)
        time.sleep(0.01 if table.capacity < 10**6 else SECONDS)

    works = [writer(table, f, 1000 * i * (-1) ** i, 1000, i) for i, f in enumerate(finals)]
    together(*works, reader(table, -1000, 3000, seen), reader(table, -1000, 3000, seen, 1), grow)
    assert len(seen) > 10 and max(seen) > 0
    wanted = {k: v for final in finals for k, v in final.items()}
    rows = table.export()
    assert rows.keys.tolist() == sorted(wanted)
    assert rows.values[:, 0].tolist() == [wanted[k] for k in sorted(wanted)]
    assert table.size == len(wanted) and table.find(rows.keys).found.all()


@pytest.mark.parametrize("threads", [1, 2])
def test_one_key_many_writers(threads):
    """All write and erase the same few keys, which share buckets, rows and locks."""
    torch.set_num_threads(threads)
    table = Table(DIM, capacity=1)
    seen: list[int] = []

    def churn(rng):
        keys = rng.integers(0, 20, 8)
        table.insert_or_assign(keys, rows_for(keys, int(rng.integers(1, 99))))
        table.erase(rng.integers(0, 20, 8))

    together(*seeded(churn, 4), reader(table, 0, 20, seen))
    rows = table.export()
    assert table.size == len(rows.keys) == len(set(rows.keys.tolist()))
    assert table.find(rows.keys).found.all(), "the index lost a row"
    assert table.erase(rows.keys).all() and len(table) == 0
    assert not table.contains(np.arange(20)).any()


@pytest.mark.parametrize("verb", ["find", "find_or_insert"])
@pytest.mark.parametrize("bound", [1, 5, 400])
def test_eviction_under_readers(bound, verb):
    """A table that evicts is never too full, even for known keys that others evict before their turn."""
    torch.set_num_threads(1)
    table = Table(DIM, max_capacity=bound, evict_strategy="lru", initializer=Constant(0.0))
    seen: list[int] = []

    def evict(rng):
        keys = rng.integers(1, 2 * bound + 2, 40) * 1000  # rows of other verbs are zeros
        out = table.insert_and_evict(keys, rows_for(keys, int(rng.integers(1, 99))))
        assert (out.values == out.values[:, :1]).all()
        assert (out.keys % 1000 == 0).all() and (out.values[:, 0] % 1000 == 0).all()

    def read(rng):
        keys = rng.integers(1, 2 * bound + 2, 4) * 1000
        found = getattr(table, verb)(keys)
        assert (found.values == found.values[:, :1]).all()
        seen.append(1)

    def erase(rng):
        table.erase(rng.integers(1, 2 * bound + 2, 4) * 1000)

    together(*seeded(evict, 2), *seeded(read, 2), *seeded(erase, 1))
    rows = table.export()
    assert table.size == len(rows.keys) <= bound and len(seen) > 10
    assert table.find(rows.keys).found.all()


def test_updates_of_shared_rows_all_count():
    """Gradients of ones from four threads: every one of them moved its row by one."""
    table = Table(DIM, capacity=1, optimizer=SGD(lr=1.0), initializer=Constant(0.0))
    counts = [np.zeros(50, np.int64) for _ in range(4)]

    def step(mine, rng):
        keys = rng.integers(0, 50, 100)
        assert table.update(keys, np.full((100, DIM), -1, np.float32)) == 0
        np.add.at(mine, keys, 1)

    def read():
        values = table.find(np.arange(50)).values
        assert (values == values[:, :1]).all(), "a row is torn"

    generators = map(np.random.default_rng, range(4))
    together(*(functools.partial(step, *each) for each in zip(counts, generators)), read)
    wanted = sum(counts)
    found = table.find(np.arange(50)).values
    np.testing.assert_array_equal(found, np.repeat(wanted[:, None], DIM, 1))


def test_export_and_clear_and_expiry_beside_writers():
    table = Table(DIM, capacity=1, track=("use", "changes"))
    mark = table.mark()

    def write(rng):
        keys = rng.integers(0, 500, 100)
        table.insert_or_assign(keys, rows_for(keys, 7), time=int(rng.integers(0, 9)))

    def scan():
        for rows in table.export_batches(64):
            assert (rows.values == rows.values[:, :1]).all()
            assert (rows.values[:, 0] % 1000 == rows.keys % 1000).all()
            # A key that was erased and came back meanwhile may be seen at both places.
        whole = table.export()
        assert len(set(whole.keys.tolist())) == len(whole.keys)

    def remove(rng):
        if rng.random() < 0.05:
            table.clear()
        table.expire(int(rng.integers(0, 10)))

    together(*seeded(write, 2), scan, *seeded(remove, 1))
    rows = table.export()
    assert table.size == len(rows.keys) and table.find(rows.keys).found.all()
    assert table.mark() > mark
