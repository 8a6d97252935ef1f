# SPDX-License-Identifier: Apache-2.0
"""Who leaves a full table, key by key against a plain model; bounds, refusals, and who is let in at all."""

import numpy as np
import pytest
import torch
from hotloop.table import (
    SGD,
    Constant,
    CountFilter,
    HashEmbeddingBag,
    ProbabilisticFilter,
    Table,
    TableFullError,
    probabilistic_admission_filter,
)
from table_checks import refused, unchanged
from table_model import Model

STRATEGIES = ("lru", "lfu", "epoch_lru", "epoch_lfu", "custom")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("bound", [1, 12, 150])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_lowest_score_leaves_first(strategy, bound, threads):
    """Thousands of evictions, so that what a scan has kept (64 rows, or all) runs out many times."""
    torch.set_num_threads(threads)
    rng = np.random.default_rng(bound)
    pool = np.concatenate([np.arange(-2 * bound, 2 * bound), [-(2**63), 2**63 - 1]])
    table = Table(1, capacity=1, max_capacity=bound, evict_strategy=strategy)
    model = Model(strategy, bound)
    evictions, next_value = 0, 0.0
    for step in range(300):
        n = int(rng.integers(0, 24))
        # Half the keys come back often, as in a real stream.
        keys = np.where(rng.random(n) < 0.5, rng.choice(pool, n), rng.integers(0, bound + 1, n))
        values = next_value + np.arange(n, dtype=np.float32)
        next_value += n
        scores = None
        if strategy == "custom" or (strategy in ("lfu", "epoch_lfu") and step % 2):
            scores = rng.integers(0, 6 if strategy != "custom" else 2**62, n)
        epoch = int(rng.integers(max(0, step // 50 - 1), step // 50 + 1))
        refused = model.refused
        given, new = None if scores is None else scores.tolist(), values.tolist()
        gone = model.upsert(keys.tolist(), lambda i, _, new=new: new[i], given, epoch)
        if step % 3:
            out = table.insert_and_evict(keys, values[:, None], scores=scores, epoch=epoch)
            got = zip(out.keys.tolist(), out.values[:, 0].tolist(), out.scores.tolist())
            assert list(got) == gone
        else:
            done = table.insert_or_assign(keys, values[:, None], scores=scores, epoch=epoch)
            assert done.tolist() == [key in model.rows for key in keys.tolist()]
        evictions += len(gone) - (model.refused - refused)
        if step % 10 == 0 and model.rows:  # erased rows are nobody's victims
            victim = np.array([next(iter(model.rows))])
            assert table.erase(victim).all()
            del model.rows[int(victim[0])], model.score[int(victim[0])]
        rows = table.export()
        assert dict(zip(rows.keys.tolist(), rows.values[:, 0].tolist())) == model.rows
        assert dict(zip(rows.keys.tolist(), rows.scores.tolist())) == model.score
        wanted = [model.score.get(key, 0) for key in pool.tolist()]
        assert table.scores(pool).tolist() == wanted
    assert evictions > (300 if bound > 1 else 30)
    assert (
        model.refused > 0 if strategy == "custom" else strategy[:5] == "epoch" or not model.refused
    )
    assert table.size <= bound == table.capacity


def test_ties_leave_by_the_lower_key_as_unsigned():
    table = Table(1, max_capacity=4, evict_strategy="custom")
    keys, ones = np.array([-1, 5, 0, 3]), np.ones((4, 1), np.float32)
    same = np.full(4, 7)
    table.insert_or_assign(keys, ones, scores=same)
    out = table.insert_and_evict(np.array([10, 11, 12, 13]), ones, scores=same + 1)
    assert out.keys.tolist() == [0, 3, 5, -1]
    assert out.scores.tolist() == [7, 7, 7, 7]


def test_many_evictions_in_one_batch_and_one_scan():
    """A thousand rows leave in the order of their scores; a later row with a lower score cuts in."""
    table = Table(1, max_capacity=5000, evict_strategy="custom")
    rng = np.random.default_rng(0)
    scores = rng.permutation(5000) + 10
    table.insert_or_assign(np.arange(5000), np.ones((5000, 1), np.float32), scores=scores)
    order = np.argsort(scores)
    n = 1000
    fresh = np.arange(10_000, 10_000 + n)
    out = table.insert_and_evict(fresh, np.ones((n, 1), np.float32), scores=np.full(n, 9000))
    assert out.keys.tolist() == order[:n].tolist()
    # The row that is used rises out of the way, the one that falls comes first.
    table.assign(order[n : n + 1], np.zeros((1, 1), np.float32), scores=np.array([9500]))
    table.assign(order[4000:4001], np.zeros((1, 1), np.float32), scores=np.array([1]))
    out = table.insert_and_evict(fresh[:2] + n, np.ones((2, 1), np.float32), scores=fresh[:2])
    assert out.keys.tolist() == [order[4000], order[n + 1]]


def test_refused_pairs_are_handed_back_where_they_were_refused():
    """As HierarchicalKV: what is not in the table is in the second store that the caller keeps."""
    table = Table(1, max_capacity=2, evict_strategy="custom")
    keys, scores = np.array([1, 2, 3, 4, 5, 3]), np.array([50, 60, 7, 55, 8, 9])
    values = np.arange(10.0, 16.0, dtype=np.float32)[:, None]
    out = table.insert_and_evict(keys, values, scores=scores)
    assert out.keys.tolist() == [3, 1, 5, 3]
    assert out.values.ravel().tolist() == [12.0, 10.0, 14.0, 15.0]
    assert out.scores.tolist() == [7, 50, 8, 9]
    second = dict(zip(out.keys.tolist(), out.values.ravel().tolist()))
    second |= dict(zip(table.export().keys.tolist(), table.export().values.ravel().tolist()))
    assert second == dict(zip(keys.tolist(), values.ravel().tolist()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_evicted_rows_come_whole(dtype, kind):
    table = Table(3, max_capacity=2, evict_strategy="lru", dtype=dtype)
    keys, values = np.array([4, 5]), np.array([[1, 2, 3], [0.5, -1, 8]], np.float32)
    if kind == "torch":
        keys, values = torch.from_numpy(keys), torch.from_numpy(values)
    table.insert_or_assign(keys, values)
    out = table.insert_and_evict(keys + 2, values)
    assert type(out.keys) is type(out.values) is type(out.scores) is type(keys)
    assert out.keys.tolist() == [4, 5] and out.values.tolist() == values.tolist()


def test_refused_keys_are_told():
    table = Table(2, max_capacity=2, evict_strategy="custom", initializer=Constant(3.0))
    keys, ones = np.array([1, 2]), np.ones((2, 2), np.float32)
    table.insert_or_assign(keys, ones, scores=np.array([5, 6]))
    assert not table.insert_or_assign(np.array([3]), ones[:1], scores=np.array([4]))[0]
    found = table.find_or_insert(np.array([3, 1]), scores=np.array([4, 5]))
    assert found.found.tolist() == [False, True]
    assert found.values.tolist() == [[0, 0], [1, 1]]
    assert table.export().keys.tolist() == [1, 2]
    assert table.insert_or_assign(np.array([3]), ones[:1], scores=np.array([5]))[0]  # a tie enters


def test_update_is_no_use_of_its_own_but_its_lookup_is():
    table = Table(1, max_capacity=3, evict_strategy="lfu", optimizer=SGD(lr=1.0))
    keys = np.array([1, 2, 3])
    table.find_or_insert(keys)
    table.update(keys[:1], np.ones((1, 1), np.float32))
    assert table.scores(keys).tolist() == [2, 1, 1]
    lost = table.update(np.array([7, 8, 9, 10]), np.ones((4, 1), np.float32))
    assert lost == 4 - int(table.contains(np.array([7, 8, 9, 10])).sum()) > 0


@pytest.mark.parametrize("strategy", ["epoch_lru", "epoch_lfu"])
def test_training_keeps_the_epoch(strategy):
    """A backward pass knows no epoch: what it touches must not fall behind what is never used again."""
    table = Table(2, max_capacity=4, evict_strategy=strategy, optimizer=SGD(lr=0.1))
    keys = np.arange(2)
    table.insert_or_assign(keys, np.zeros((2, 2), np.float32), epoch=3)
    table.insert_or_assign(np.array([7]), np.zeros((1, 2), np.float32), epoch=4)
    table.update(keys[:1], np.ones((1, 2), np.float32))
    assert (table.scores(np.array([0, 1, 7])) >> 32).tolist() == [4, 3, 4]
    new = np.arange(10, 12)
    assert table.insert_and_evict(new, np.zeros((2, 2), np.float32)).keys.tolist() == [1]


@pytest.mark.parametrize("optimizer", [None, SGD(lr=1.0)])
def test_a_full_table_without_a_strategy_is_left_as_it_was(optimizer):
    table = Table(2, capacity=1, max_capacity=20, optimizer=optimizer, track=("use", "changes"))
    keys = np.arange(18)
    table.insert_or_assign(keys, np.random.default_rng(0).random((18, 2), np.float32), time=5)
    mark = table.mark()
    batch = np.array([0, 1, 100, 101, 102, 2])
    values = np.full((6, 2), 9, np.float32)
    calls = {"insert_or_assign": (values,), "insert_and_evict": (values,), "find_or_insert": ()}
    if optimizer is not None:
        calls["update"] = (values,)
    for verb, given in calls.items():
        text = f"[Table.{verb}] keys: expected room for … got 18 rows"
        with unchanged(table), refused(text, TableFullError):
            getattr(table, verb)(batch, *given, time=9)
        assert len(table.delta(mark).keys) == 0
    table.insert_or_assign(np.array([0, 100, 101, 100]), values[:4])  # exactly full
    assert len(table) == 20 and table.contains(np.array([100, 101])).all()
    with pytest.raises(TableFullError):
        table.find_or_insert(np.array([102]))


@pytest.mark.parametrize("verb", ["find_or_insert", "update"])
def test_a_count_filter_lets_in_on_the_sighting_after(verb):
    admission = CountFilter(1000, 2)
    table = Table(2, admission=admission, optimizer=SGD(lr=1.0), initializer=Constant(1.0))
    table.insert_or_assign(np.array([1]), np.zeros((1, 2), np.float32))  # is not asked
    keys = np.array([1, 5, 1, 6])
    grads = np.full((4, 2), 0.5, np.float32)
    for sighting in range(4):
        known = [True, sighting > 2, True, sighting > 2]
        if verb == "update":
            assert table.update(keys, grads) == (2 if sighting < 2 else 0)
        else:
            found = table.find_or_insert(keys)
            assert found.found.tolist() == known
            wanted = [[0, 0], [sighting >= 2] * 2, [0, 0], [sighting >= 2] * 2]
            assert found.values.tolist() == wanted
        assert table.contains(keys).tolist() == [True, sighting >= 2, True, sighting >= 2]
    assert admission.counts(np.array([1, 5])).tolist() == [0, 3], "known keys are not counted"
    if verb == "update":
        # 4 calls of two gradients that are merged; the others from the third sighting on.
        assert table.find(np.array([1, 5])).values[:, 0].tolist() == [-4.0, 0.0]


def test_sightings_inside_a_batch_count_together():
    table = Table(1, admission=CountFilter(1000, 3))
    assert not table.find_or_insert(np.array([4, 4, 4])).found.any() and len(table) == 0
    found = table.find_or_insert(np.array([4, 5]))
    assert len(table) == 1 and table.contains(np.array([4]))[0]
    assert not found.found.any()


def test_a_random_filter_is_the_random_filter():
    chance = ProbabilisticFilter(4.0, seed=3)
    table = Table(1, admission=chance)
    keys = np.arange(2000)
    inside = np.zeros(2000, bool)
    for step in range(1, 4):
        table.find_or_insert(keys)
        drawn = probabilistic_admission_filter(keys, threshold=4.0, seed=3, step=step)
        inside |= drawn
        np.testing.assert_array_equal(table.contains(keys), inside)
    assert 0.2 < inside.mean() < 0.95


def test_admission_and_eviction_together():
    """Only keys that are let in may push others out."""
    table = Table(1, max_capacity=3, evict_strategy="lru", admission=CountFilter(1000, 1))
    ones = np.ones((3, 1), np.float32)
    table.insert_or_assign(np.array([1, 2, 3]), ones)
    assert not table.find_or_insert(np.array([4, 5])).found.any()
    assert table.export().keys.tolist() == [1, 2, 3]
    table.find_or_insert(np.array([4, 6]))
    assert table.export().keys.tolist() == [2, 3, 4]


def test_who_leaves_in_a_batch_reads_as_zeros_in_it():
    """Known keys are used first; what is returned is what is there after the batch."""
    table = Table(2, evict_strategy="lru", max_capacity=3, capacity=1, initializer=Constant(1.0))
    table.find_or_insert(np.array([0, 5]))
    looked = table.find_or_insert(np.array([5, 0, 6, 7, 0]))
    assert looked.found.tolist() == [True, True, False, False, True]
    # All four have the number of this call for a score, and of equal scores the lower key goes.
    assert looked.values.tolist() == [[1, 1], [0, 0], [1, 1], [1, 1], [0, 0]]
    assert sorted(table.export().keys.tolist()) == [5, 6, 7]


def test_a_bag_is_pooled_of_who_stays():
    layer = HashEmbeddingBag(
        2,
        mode="mean",
        optimizer=SGD(lr=1.0),
        evict_strategy="lru",
        max_capacity=3,
        initializer=Constant(1.0),
    )
    layer.table.insert_or_assign(torch.tensor([0, 5]), torch.tensor([[8.0, 8.0], [3.0, 3.0]]))
    pooled = layer(torch.tensor([0, 5, 6, 7]), torch.tensor([0, 2]))
    assert pooled.tolist() == [[3.0, 3.0], [1.0, 1.0]]
    pooled.sum().backward()
    assert layer.table.find(torch.tensor([5, 6, 7])).values.tolist() == [
        [2, 2],
        [0.5, 0.5],
        [0.5, 0.5],
    ]
