# SPDX-License-Identifier: Apache-2.0
"""Numbers that would leave a wrong order of eviction or rows that are not finite are refused, and nothing changes."""

import sys

import numpy as np
import pytest
import torch
from hotloop.table import (
    FTRL,
    SGD,
    Adagrad,
    Adam,
    Constant,
    GroupAdagrad,
    HashEmbeddingBag,
    Normal,
    RowwiseAdagrad,
    Table,
    Uniform,
)
from processes import printed
from table_checks import refused
from table_model import Model

TOP = 2**63 - 1
ONE = np.ones((1, 1), np.float32)
FLOAT32 = {np.array: np.float32, torch.tensor: torch.float32}


def key(*keys):
    return np.array(keys)


@pytest.mark.parametrize("strategy", ["lfu", "custom", "lru", "epoch_lfu"])
@pytest.mark.parametrize(
    "verb", ["find_or_insert", "insert_or_assign", "insert_and_evict", "assign"]
)
@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_scores_below_0_are_refused(strategy, verb, make):
    table = Table(1, max_capacity=3, evict_strategy=strategy)
    table.insert_or_assign(key(1, 2, 3), np.ones((3, 1), np.float32), scores=key(5, 6, 7))
    before = table.scores(key(1, 2, 3)).tolist()
    values = () if verb == "find_or_insert" else (make([[1.0], [1.0]], dtype=FLOAT32[make]),)
    with refused(f"[Table.{verb}] scores: expected 0 to 2^63 - 1, got -4. The lowest score"):
        getattr(table, verb)(make([1, 2]), *values, scores=make([3, -4]))
    assert table.scores(key(1, 2, 3)).tolist() == before


def test_scores_of_uint64_that_int64_cannot_hold_are_refused():
    table = Table(1, max_capacity=3, evict_strategy="custom")
    with refused(f"[Table.find_or_insert] scores: expected 0 to 2^63 - 1, got {2**63 + 1}."):
        table.find_or_insert(key(1), scores=np.array([2**63 + 1], np.uint64))
    table.find_or_insert(key(1), scores=np.array([TOP], np.uint64))
    assert table.scores(key(1)).tolist() == [TOP]


def test_sums_of_uses_stay_at_the_top():
    """A sum that wrapped was the lowest score, and the row that was used most left first."""
    table = Table(1, max_capacity=2, evict_strategy="lfu")
    table.find_or_insert(key(1, 2), scores=key(TOP, 3))
    for given in (1, TOP, TOP):
        table.find_or_insert(key(1), scores=key(given))
        assert table.scores(key(1)).tolist() == [TOP]
    assert table.insert_and_evict(key(9), ONE).keys.tolist() == [2]
    epochs = Table(1, max_capacity=2, evict_strategy="epoch_lfu")
    for given in (TOP, TOP, 1):
        epochs.find_or_insert(key(1), scores=key(given), epoch=2)
    assert epochs.scores(key(1)).tolist() == [(2 << 32) + 2**32 - 1]


def test_the_clock_of_epoch_lru_goes_on_past_32_bits():
    """It wrapped: the row used last had the lowest score of its epoch and left first."""
    table = Table(1, max_capacity=4, evict_strategy="epoch_lru")
    table.find_or_insert(key(1), epoch=1)
    table._native.tick = 2**32 - 4
    table.find_or_insert(key(2), epoch=1)
    for k in (3, 4, 3, 4, 3):
        table.find_or_insert(key(k), epoch=1)
    scores = table.scores(key(1, 2, 4, 3))
    assert (np.diff(scores) > 0).all() and (scores >> 32).tolist() == [1] * 4
    left = [int(table.insert_and_evict(key(k), ONE, epoch=1).keys[0]) for k in (10, 11, 12, 13)]
    assert left == [1, 2, 4, 3]


def test_thousands_of_new_scores_between_evictions():
    """The candidates are cleared meanwhile of what is no longer true, and of the highest."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(3)
    bound = 900
    table = Table(1, max_capacity=bound, evict_strategy="custom")
    model = Model("custom", bound)
    model.upsert([*range(bound)], lambda *_: 1.0, [*range(bound)])
    table.find_or_insert(np.arange(bound), scores=np.arange(bound))
    for step in range(120):
        keys = rng.permutation(np.array(sorted(model.score)))[:800]
        scores = rng.integers(0, 10 if step % 3 else 10**6, len(keys))
        table.find_or_insert(keys, scores=scores)
        model.score |= dict(zip(keys.tolist(), scores.tolist()))
        for i in range(10):
            fresh = 10_000 + step * 10 + i
            score = int(rng.integers(0, 2000))
            out = table.insert_and_evict(key(fresh), ONE, scores=key(score))
            wanted = model.upsert([fresh], lambda *_: 1.0, [score])
            assert list(zip(out.keys.tolist(), [1.0], out.scores.tolist())) == wanted


HEAP = """
import numpy as np, resource
from hotloop.table import Table
table = Table(1, max_capacity=1000, evict_strategy="custom")
keys = np.arange(1000)
table.find_or_insert(keys, scores=keys + 10**6)
table.find_or_insert(np.array([5000]), scores=np.array([2 * 10**6]))  # somebody leaves: there are candidates
before, held = table.nbytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for use in range(2000):
    table.find_or_insert(keys[1:], scores=np.full(999, 10**5 - use))
print(table.nbytes - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read as Linux gives it")
def test_scores_given_again_and_again_take_no_memory():
    """2,000,000 uses left 48 MB of candidates, which ``nbytes`` did not show."""
    out = printed(HEAP).split()
    assert int(out[0]) < 100_000 and int(out[1]) < 8_000  # bytes; KiB


RULES = [SGD(), RowwiseAdagrad(), Adagrad(), Adam(), Adam(rowwise=True), FTRL(), GroupAdagrad()]


@pytest.mark.parametrize("own", RULES, ids=repr)
@pytest.mark.parametrize("other", RULES, ids=repr)
def test_a_step_takes_the_tables_own_rule(own, other):
    """GroupAdagrad keeps one number per row, too, and means another."""
    dim = 1  # where widths say least
    table = Table(dim, optimizer=own)
    grads = np.ones((1, dim), np.float32)
    if type(own) is type(other) and own.state_layout(dim) == other.state_layout(dim):
        assert table.update(key(1), grads, optimizer=other) == 0
        return
    name = type(own).__name__
    with refused(f"[Table.update] optimizer: expected the state of {name}, got {other!r}. Pass"):
        table.update(key(1), grads, optimizer=other)
    assert len(table) == 0


@pytest.mark.parametrize(
    ("dtype", "most"), [("float32", 3e38), ("float16", 65504), ("bfloat16", 3e38)]
)
@pytest.mark.parametrize(
    "verb", ["insert_or_assign", "insert_and_evict", "assign", "accum_or_assign"]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, "beyond"])
def test_values_are_finite_and_stay_so(dtype, most, verb, bad):
    table = Table(2, dtype=dtype)
    fine = np.array([[1, 2], [3, -most]], np.float32)
    table.insert_or_assign(key(1, 2), fine)
    if bad == "beyond":
        bad = {"float16": 65520.0, "bfloat16": 3.4e38}.get(dtype)
        if bad is None:
            return
    values = np.array([[5, 6], [7, bad]], np.float32)
    rest = (np.array([True, True]),) if verb == "accum_or_assign" else ()
    text = rf"^\[Table.{verb}\] values: expected finite numbers of {dtype}.*, got .* at \[1, 1\] \(\d+ of"
    with pytest.raises(ValueError, match=text):
        getattr(table, verb)(key(1, 2), values, *rest)
    shown = table.find(torch.tensor([1, 2])).values.float().numpy()
    assert np.isfinite(shown).all() and shown[0].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("dtype", "big"), [("float32", 2e38), ("float16", 4e4), ("bfloat16", 2e38)]
)
def test_sums_of_accum_or_assign_stay_finite(dtype, big):
    table = Table(1, dtype=dtype)
    on = np.array([True, True])
    text = f"[Table.accum_or_assign] values: expected sums that {dtype} holds, got up to"
    table.insert_or_assign(key(1, 2), np.array([[big], [1]], np.float32))
    for keys, values in (([1, 2], [big, 1]), ([2, 2], [big, big])):
        with refused(text):
            table.accum_or_assign(key(*keys), np.array(values, np.float32)[:, None], on)
    assert table.accum_or_assign(key(2, 2), np.array([[big], [-big]], np.float32) / 3, on).all()
    assert np.isfinite(table.find(torch.tensor([1, 2])).values.float().numpy()).all()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_sums_of_gradients_stay_finite(rule):
    table = Table(2, optimizer=rule)
    many = np.full(4, 7)
    for size in (1e15, 3e38):
        with refused("[Table.update] grads: expected sums per key up to 1e+15 in size, got"):
            table.update(many, np.full((4, 2), size, np.float32))
    assert len(table) == 0
    # Many keys may have what one may not, and what cancels is no sum.
    table.update(np.arange(4), np.full((4, 2), 9e14, np.float32))
    table.update(many, np.array([[3e38], [-3e38], [1], [1]], np.float32).repeat(2, 1))
    rows = table.export()
    assert np.isfinite(rows.values).all() and np.isfinite(rows.state).all()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_sums_of_gradients_of_bags_stay_finite(mode):
    bags = HashEmbeddingBag(1, mode=mode, optimizer=SGD(lr=1.0), initializer=Constant(0.0)).train()
    ids, offsets = torch.tensor([7, 7, 8, 7]), torch.tensor([0, 2, 3])
    grad = torch.tensor([[1e15], [1.0], [4e14]])
    # sum: 2e15 + 4e14; mean: 1e15 + 4e14; max: 1e15 of one of the two, and 4e14.
    with refused("[HashEmbedding.backward] grads: expected sums per key up to 1e+15 in size, got"):
        bags(ids, offsets).backward(grad)
    assert bags.table.find(np.array([7, 8])).values.tolist() == [[0.0], [0.0]]
    bags(ids, offsets).backward(torch.tensor([[4e14], [9e14], [1e14]]))
    assert bags.table.find(np.array([8])).values.tolist() == [[-np.float32(9e14)]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("update", ["backward", "step"])
def test_weights_of_samples_are_finite(bad, update):
    bags = HashEmbeddingBag(1, mode="sum", optimizer=SGD(), update=update).train()
    weights = torch.tensor([1.0, bad])
    out = bags(torch.tensor([1, 2]), torch.tensor([0, 1]), per_sample_weights=weights).sum()
    text = r"per_sample_weights: expected finite numbers, got .* at \[1\] \(\d+ of \d+\)\. Nothing was written"
    if update == "step":
        out.backward()
    with pytest.raises(ValueError, match=text):
        bags.step() if update == "step" else out.backward()
    assert np.isfinite(bags.table.export().values).all()


@pytest.mark.parametrize(
    ("dtype", "initializer"),
    [
        ("float16", Constant(70000.0)),
        ("float16", Normal(0.0, 20000.0)),
        ("float32", Normal(3e38, 1e38)),
        ("float32", Uniform(-2e38, 2e38)),
        ("bfloat16", Constant(3.4e38)),
    ],
    ids=repr,
)
def test_first_values_are_finite(dtype, initializer):
    with refused(f"[Table] initializer: expected first values that {dtype} holds, up to"):
        Table(4, dtype=dtype, initializer=initializer)


def test_a_first_value_beyond_float32_is_refused_where_it_is_named():
    with refused("[Constant] value: expected a finite number, got 1e+39"):
        Constant(1e39)


def test_a_range_as_wide_as_float32_is_drawn_from():
    wide = Table(4, initializer=Uniform(-1.7e38, 1.7e38))
    assert np.isfinite(wide.find_or_insert(np.arange(1000)).values).all()
