# SPDX-License-Identifier: Apache-2.0
"""A batch that does not fit leaves no trace: not in the rows, and not in what the filter has counted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hotloop.table import SGD, CountFilter, ProbabilisticFilter, Table, TableFullError
from hotloop.table.modules import HashEmbedding
from hypothesis import given, settings
from hypothesis import strategies as st
from table_checks import beside, unchanged

DIM = 2


def state_of(counter: CountFilter) -> tuple:
    state = counter.state_dict()
    return {k: v for k, v in state.items() if k not in ("cells", "elements")}, (
        state["cells"].tobytes(),
        state["elements"].tobytes(),
    )


def full_table(counter, rows: int = 8) -> Table:
    table = Table(DIM, max_capacity=rows, admission=counter, optimizer=SGD())
    table.insert_or_assign(np.arange(rows - 2), np.zeros((rows - 2, DIM), np.float32))
    return table


CALLS = {
    "find_or_insert": lambda table, keys: table.find_or_insert(keys),
    "update": lambda table, keys: table.update(keys, np.zeros((len(keys), DIM), np.float32)),
    "module": lambda table, keys: HashEmbedding(DIM, table=table)(torch.from_numpy(keys)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize(
    "many", [3, 300]
)  # a ring of 60 keys moves on many times within the latter
def test_a_batch_that_does_not_fit_was_not_seen(call, splits, many):
    counter = CountFilter(60, 1, splits=splits)
    table = full_table(counter)
    new = np.arange(100, 100 + many)
    counter.add(new[:3])
    counter.add(np.arange(1000, 1050))
    before = state_of(counter)
    keys = np.concatenate([new, np.arange(4), new])  # twice in the batch, yet asked once
    for _ in range(2):
        with unchanged(table), pytest.raises(TableFullError):
            call(table, keys)
        assert state_of(counter) == before
    table.erase(np.arange(6))
    call(table, np.concatenate([new[:3]] * 2))
    assert table.export().keys.tolist() == new[:3].tolist()


@pytest.mark.parametrize("splits", [1, 5])
def test_keys_that_the_filter_keeps_out_need_no_room_and_are_seen(splits):
    counter = CountFilter(600, 1, splits=splits)
    table = full_table(counter)
    new = np.arange(100, 150)
    counter.add(new[:2])
    assert table.find_or_insert(new).found.sum() == 0
    assert table.contains(new).tolist() == [True] * 2 + [False] * 48
    assert counter.counts(new).tolist() == [2] * 2 + [1] * 48


@settings(deadline=None, max_examples=150)
@given(
    splits=st.sampled_from([1, 5]),
    threshold=st.integers(0, 3),
    batches=st.lists(
        st.lists(st.integers(0, 60), min_size=1, max_size=25), min_size=1, max_size=12
    ),
)
def test_the_filter_has_seen_what_the_table_took(splits, threshold, batches):
    """Against the filter alone, given the batches that went through and no others."""
    counter, alone = (CountFilter(20, threshold, splits=splits) for _ in range(2))
    table = Table(DIM, max_capacity=10, admission=counter)
    inside: set[int] = set()
    for batch in batches:
        sightings = Counter(key for key in batch if key not in inside)
        trial = CountFilter(20, threshold, splits=splits)
        trial.load_state_dict(alone.state_dict())
        keys = np.array(list(sightings), np.int64)  # in the order of their first place
        let_in = trial.admits(keys, np.array(list(sightings.values()), np.int64))
        if len(inside) + let_in.sum() > 10:
            with pytest.raises(TableFullError):
                table.find_or_insert(np.array(batch))
        else:
            table.find_or_insert(np.array(batch))
            alone = trial
            inside.update(keys[let_in].tolist())
        assert state_of(counter) == state_of(alone)
        assert table.export().keys.tolist() == sorted(inside)


def test_two_tables_that_share_a_filter_lose_no_sighting_of_each_other():
    """One table is full all the time, the other counts; what the first takes back is its own."""
    counter = CountFilter(5000, 15)
    full, other = full_table(counter), Table(DIM, admission=counter)
    counter.add(np.arange(200, 210), np.full(10, 15))

    def fail():
        with pytest.raises(TableFullError):
            full.find_or_insert(np.arange(200, 2000))

    mine = np.arange(10_000, 10_500)
    with beside(fail):
        for _ in range(14):
            for part in np.split(mine, 50):
                other.find_or_insert(part)
    assert (counter.counts(mine) == 14).all()
    assert (counter.counts(np.arange(300, 2000)) == 0).mean() > 0.99  # but for shared signatures


def test_a_filter_without_memory_has_nothing_to_take_back():
    table = full_table(ProbabilisticFilter(0.0))
    with pytest.raises(TableFullError):
        table.find_or_insert(np.arange(100, 110))
    assert len(table) == 6
    table.find_or_insert(np.arange(100, 102))
    assert len(table) == 8
