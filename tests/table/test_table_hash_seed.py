# SPDX-License-Identifier: Apache-2.0
"""Keys chosen to share a bucket, and the seed of a table that keeps them from it."""

import copy
import pickle
import time

import numpy as np
import pytest
import torch
from hotloop.table import RowwiseAdagrad, Table
from table_checks import assert_rows, refused

FIXED = 0xD1B54A32D192ED03  # what every table used to place keys by
MASK = 2**64 - 1


def _unshift(x: np.ndarray) -> np.ndarray:
    return x ^ (x >> np.uint64(33))


def unmixed(h: np.ndarray) -> np.ndarray:
    """The inverse of MurmurHash3's finaliser: shifts by 33 undo themselves, odd factors have inverses."""
    with np.errstate(over="ignore"):
        for factor in (0xC4CEB9FE1A85EC53, 0xFF51AFD7ED558CCD):
            h = _unshift(h) * np.uint64(pow(factor, -1, 2**64))
        return _unshift(h)


def sharing(n: int, seed: int) -> np.ndarray:
    """Keys whose hashes under this seed have no bit in their upper half: one home, whatever the size of the table."""
    hashes = np.arange(1, n + 1, dtype=np.uint64)
    return (unmixed(hashes) ^ np.uint64(seed)).view(np.int64)


def seconds(keys: np.ndarray, **settings) -> float:
    best = float("inf")
    for _ in range(3):
        table = Table(1, capacity=2 * len(keys), **settings)
        began = time.perf_counter()
        table.insert_or_assign(keys, np.ones((len(keys), 1), np.float32))
        best = min(best, time.perf_counter() - began)
        assert len(table) == len(keys) and table.contains(keys).all()
    return best


@pytest.mark.alone
def test_keys_chosen_against_the_fixed_hash_cost_what_others_cost():
    """40,000 of them took 50 times as long."""
    torch.set_num_threads(1)
    n = 40_000
    others = np.random.default_rng(0).integers(-(2**63), 2**63, n)
    assert seconds(sharing(n, FIXED)) < 8 * seconds(others)


def test_the_seed_decides_the_places_and_a_bad_one_is_survived():
    torch.set_num_threads(1)
    keys = sharing(4000, seed := 123)
    table = Table(1, hash_seed=seed)
    values = np.arange(4000, dtype=np.float32)[:, None]
    table.insert_or_assign(keys, values)
    assert (table.find(keys).values == values).all()
    assert not table.find(sharing(5000, seed)[4000:]).found.any()
    assert table.erase(keys[::2]).all()
    assert (table.find(keys).found == (np.arange(4000) % 2 == 1)).all()


def test_seeds_are_drawn_kept_and_given():
    a, b = Table(1), Table(1)
    assert a.hash_seed != b.hash_seed and 0 <= a.hash_seed <= MASK
    assert Table(1, hash_seed=MASK).hash_seed == MASK
    assert pickle.loads(pickle.dumps(a)).hash_seed == copy.deepcopy(a).hash_seed == a.hash_seed


def test_snapshots_keep_the_seed_and_older_ones_have_none(tmp_path, monkeypatch):
    from hotloop.table.files import saving

    table = Table(1, optimizer=RowwiseAdagrad(), track=("use", "changes"))
    table.update(np.arange(50), np.ones((50, 1), np.float32), time=5)
    table.save(tmp_path / "new")
    assert Table.load(tmp_path / "new").hash_seed == table.hash_seed
    config = saving._config
    monkeypatch.setattr(
        saving,
        "_config",
        lambda *a: {k: v for k, v in config(*a).items() if k != "hash_seed"},
    )
    table.save(tmp_path / "old")
    old = Table.load(tmp_path / "old")
    assert old.hash_seed != table.hash_seed
    assert_rows(old, table)


@pytest.mark.parametrize("strategy", ["none", "lru", "custom"])
def test_no_result_depends_on_the_seed(strategy):
    """The order of memory, who leaves and the first rows: also where keys go on behind the last bucket."""
    torch.set_num_threads(1)

    def outcome(seed, rows):
        bound = {} if strategy == "none" else {"max_capacity": rows, "evict_strategy": strategy}
        table = Table(2, capacity=rows, hash_seed=seed, **bound)
        rng = np.random.default_rng(rows)
        gone = []
        for _ in range(4):
            keys = rng.integers(0, 2 * rows, rows // 2 + 1)
            scores = keys + 1 if strategy == "custom" else None
            table.find_or_insert(keys, scores=scores)
            values = np.ones((len(keys), 2), np.float32)
            gone.append(table.insert_and_evict(keys[::-1].copy(), values, scores=scores))
            table.erase(keys[:3])
        parts = [*table.export_batches(rows=64), *gone]
        return [np.asarray(x).tobytes() for part in parts for x in part]

    for rows in (10, 41, 300):
        first = outcome(0, rows)
        for seed in range(1, 30):
            assert outcome(seed, rows) == first


@pytest.mark.parametrize(
    ("given", "error"),
    [(-1, ValueError), (2**64, ValueError), (1.5, TypeError), ("a", TypeError), (True, TypeError)],
)
def test_seeds_that_cannot_be(given, error):
    with refused("[Table] hash_seed: expected an integer", error):
        Table(1, hash_seed=given)
