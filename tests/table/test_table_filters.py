# SPDX-License-Identifier: Apache-2.0
"""Admission filters: counters against a dict, the sliding window, snapshots, rates of the random one."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hotloop import table
from hotloop.table import CountFilter, ProbabilisticFilter
from table_checks import NO_ARRAY, grouped, refused

SPLITS = (1, 5, 7)


def keys_of(rng, n):
    """Distinct keys of any bits, the extremes among them."""
    keys = np.unique(rng.integers(-(2**63), 2**63 - 1, n))
    extremes = np.array([0, -1, 2**63 - 1, -(2**63)], np.int64)
    return np.concatenate([extremes, np.setdiff1d(keys, extremes)])[:n]


def collision_free(counter, keys):
    """Those of the keys that share no counter with another: added one by one, they were unknown."""
    return keys[counter.add(keys) == 0]


@pytest.mark.parametrize("splits", SPLITS)
def test_counts_like_a_dict(splits):
    rng = np.random.default_rng(splits)
    counter = CountFilter(200_000, 3, splits=splits)
    keys = keys_of(rng, 3000)
    fresh = CountFilter(200_000, 3, splits=splits)
    keys = collision_free(fresh, keys)
    assert len(keys) > 2950
    seen: dict[int, int] = {}
    for _ in range(30):
        batch = rng.choice(keys, rng.integers(0, 400))
        sightings = rng.integers(0, 4, len(batch))
        old = counter.add(batch, sightings)
        for key, c, o in zip(batch.tolist(), sightings.tolist(), old.tolist()):
            assert o == min(seen.get(key, 0), 15)
            seen[key] = seen.get(key, 0) + c
    assert counter.counts(keys).tolist() == [min(seen.get(k, 0), 15) for k in keys.tolist()]
    assert len(counter) == sum(c > 0 for c in seen.values())
    assert counter.failures == 0


@pytest.mark.parametrize("threshold", [1, 2, 15])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_admitted_on_the_sighting_after_the_threshold(threshold, impl):
    counter = CountFilter(2000, threshold, splits=5)
    keys = np.array([3, -3, 2**40])
    for sighting in range(threshold + 3):
        admitted = table.frequency_admission_filter(counter, keys, impl=impl)
        assert admitted.dtype == bool
        assert admitted.all() if sighting >= threshold else not admitted.any()


def test_threshold_zero_lets_everything_pass_and_counts_nothing():
    counter = CountFilter(1000, 0)
    assert counter.admits(np.arange(50)).all()
    assert len(counter) == 0
    assert not table.frequency_admission_filter(counter, np.arange(50), threshold=1).any()


def test_saturates_at_fifteen():
    counter = CountFilter(1000, 15, splits=1)
    key = np.array([9])
    assert counter.add(key, np.array([14])).item() == 0
    assert not counter.admits(key).item()
    assert counter.add(key, np.array([2**40])).item() == 15
    assert counter.admits(key).item()
    assert counter.add(key).item() == 15
    assert counter.add(np.array([10]), np.array([2**62])).item() == 0
    assert counter.counts(np.array([10])).item() == 15


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_full_filter_answers_fifteen(impl):
    counter = CountFilter(32, 15, splits=1)
    counter.add(np.arange(1000))
    new = np.arange(5000, 5400)
    old = counter.counts(new)
    full = old == 15
    assert full.mean() > 0.5  # all cells are taken; the rest share a signature with one in reach
    before = counter.failures
    assert table.frequency_admission_filter(counter, new[full], impl=impl).all()
    assert counter.failures == before + full.sum()


@pytest.mark.parametrize("splits", [5, 7])
def test_the_window_slides(splits):
    capacity = 6000
    per_split = -(-capacity // (splits - 1))
    counter = CountFilter(capacity, 3, splits=splits)
    old = np.array([77])
    counter.add(old, np.array([5]))
    rng = np.random.default_rng(0)
    # While fewer than capacity other keys came, it is known (none of them may have its signature: 1% here).
    fill = rng.integers(2**40, 2**60, per_split * (splits - 2))
    counter.add(fill)
    assert counter.counts(old).item() == 5
    # Seen again, it moves to the newest split with its count.
    again = copy.deepcopy(counter)
    again.add(old)
    # S - 1 splits later nothing of it is left; the one that was seen again is.
    rest = rng.integers(2**40, 2**60, per_split + per_split // 2)
    counter.add(rest)
    again.add(rest)
    assert counter.counts(old).item() == 0
    assert again.counts(old).item() == 6
    again.add(rng.integers(2**40, 2**60, per_split * splits))
    assert again.counts(old).item() == 0


def test_memory_and_length_stay_bounded():
    counter = CountFilter(5000, 3)
    rng = np.random.default_rng(1)
    most = 0
    for _ in range(30):
        counter.add(rng.integers(-(2**63), 2**63 - 1, 1000))
        most = max(most, len(counter))
    assert 4000 < most < 7 * 834
    assert counter.nbytes == 2 * 7 * 1024  # (834 * 1.2 + 16) rounded up to lines of 32


@pytest.mark.parametrize("splits", SPLITS)
def test_wrong_counts_are_rare_and_never_too_low(splits):
    n = 20_000
    counter = CountFilter(n, 3, splits=splits)
    # A key seen again in a later split takes a cell there too: half as many keys fill the window twice.
    keys = np.random.default_rng(2).permutation(n * 3)[
        : n * 9 // 10 if splits == 1 else n * 4 // 10
    ]
    first = counter.add(keys)
    second = counter.add(keys)
    # A signature of 12 bits, met by some cells of a probe: about 0.1%, and each error is an excess.
    assert np.count_nonzero(first) < 0.01 * n
    assert (second >= 1).all()
    assert np.count_nonzero(second != 1) < 0.01 * n


@pytest.mark.parametrize("splits", SPLITS)
def test_reference_and_loop_agree_cell_by_cell(splits):
    rng = np.random.default_rng(splits)
    ours, theirs = (CountFilter(120, 2, splits=splits) for _ in range(2))
    for round_ in range(8):  # far more keys than fit: the ring turns, probes fail
        keys = rng.integers(0, 150 * (round_ + 1), 100)
        counts = rng.integers(0, 5, 100)
        a = table.frequency_admission_filter(ours, keys, counts, impl="cpu")
        b = table.frequency_admission_filter(theirs, keys, counts, impl="reference")
        assert np.array_equal(a, b)
        assert_same_state(ours, theirs)


def assert_same_state(a, b):
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    for name in x:
        assert np.array_equal(x[name], y[name]), name


@pytest.mark.parametrize("splits", SPLITS)
def test_saved_and_restored_cell_by_cell(splits):
    rng = np.random.default_rng(3)
    counter = CountFilter(500, 4, splits=splits)
    counter.add(rng.integers(0, 10**9, 3000))
    other = CountFilter(500, 4, splits=splits)
    other.load_state_dict(counter.state_dict())
    third = pickle.loads(pickle.dumps(counter))
    fourth = copy.deepcopy(counter)
    more = rng.integers(0, 10**9, 500)
    answers = [f.add(more) for f in (counter, other, third, fourth)]
    for f, answer in zip((other, third, fourth), answers[1:]):
        assert_same_state(counter, f)
        assert np.array_equal(answer, answers[0])
        assert f.threshold == 4
    state = counter.state_dict()
    counter.clear()
    assert len(counter) == 0
    assert state["elements"].sum() > 0  # a copy


def test_damaged_states_are_refused_and_change_nothing():
    counter = CountFilter(500, 4)
    counter.add(np.arange(100))
    good = counter.state_dict()
    broken_cells = good["cells"].copy()
    broken_cells[3, 5] = 77 << 4
    for change, text in (
        ({"version": 2}, "expected version 1, got 2"),
        ({"capacity": 501}, "expected capacity 500, got 501"),
        ({"splits": 5}, "expected splits 7, got 5"),
        ({"cells": good["cells"][:2]}, r"expected cells uint16 \(7, 128\), got uint16 \(2, 128\)"),
        ({"cells": good["cells"].astype(np.int64)}, "got int64"),
        ({"cells": broken_cells}, "The state is damaged"),
        ({"elements": good["elements"][:3]}, r"expected elements int64 \(7,\)"),
        ({"head": 7}, "head: expected an integer >= 0 and <= 6, got 7"),
        ({"failures": -1}, "failures: expected an integer >= 0"),
    ):
        with pytest.raises(ValueError, match=rf"^\[CountFilter.load_state_dict\] .*{text}"):
            counter.load_state_dict(good | change)
        assert np.array_equal(counter.state_dict()["cells"], good["cells"])
    with pytest.raises(ValueError, match="got none of head, cells"):
        counter.load_state_dict({k: v for k, v in good.items() if k not in ("head", "cells")})


def test_kinds():
    keys = np.array([1, 2, 1, -5])
    wanted = CountFilter(100, 1).admits(keys)
    for given in (
        torch.from_numpy(keys),
        torch.from_numpy(keys).int(),
        torch.from_numpy(keys)[::1],
    ):
        ours = CountFilter(100, 1).admits(given, torch.ones(4, dtype=torch.int32))
        assert ours.dtype == torch.bool
        assert np.array_equal(ours.numpy(), wanted)
    assert np.array_equal(CountFilter(100, 1).admits(keys.view(np.uint64)), wanted)
    assert CountFilter(100, 1).add(keys[:0]).shape == (0,)
    assert repr(CountFilter(100, 1)) == "CountFilter(100, 1, splits=7)"


# -- the filter without memory


def rate(threshold, sightings, equal, batches, n=200_000):
    """Share of n keys let in over ``batches`` steps of ``sightings`` each."""
    keys = np.arange(n) * 7919 - n
    inside = np.zeros(n, bool)
    for step in range(batches):
        inside |= table.probabilistic_admission_filter(
            keys, np.full(n, sightings), threshold=threshold, step=step, equal=equal, seed=11
        )
    return inside.mean()


def assert_rate(got, wanted, n=200_000):
    # 5 standard deviations: a false alarm in 2e6.
    assert abs(got - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / n) + 1e-12, (got, wanted)


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("threshold", [1.0, 2.5, 10.0])
def test_rates(k, threshold):
    assert_rate(rate(threshold, 1, False, k), 1 - (1 - 1 / threshold) ** k)
    assert_rate(rate(threshold, 1, True, k), 1 - 0.05 ** (k / threshold))
    assert_rate(rate(threshold, k, False, 1), min(1.0, k / threshold))


def test_only_the_equal_mode_does_not_see_batches():
    wanted = 1 - 0.05 ** (6 / 10)
    for sightings, batches in ((6, 1), (3, 2), (2, 3), (1, 6)):
        assert_rate(rate(10.0, sightings, True, batches), wanted)
    # Negative control: the unequal mode is not invariant, and the bound sees it.
    with pytest.raises(AssertionError):
        assert_rate(rate(10.0, 1, False, 6), rate(10.0, 6, False, 1))
    with pytest.raises(AssertionError):
        assert_rate(rate(10.0, 6, True, 1), wanted + 0.01)


@pytest.mark.parametrize("equal", [False, True])
def test_draws_belong_to_key_step_and_seed(equal):
    rng = np.random.default_rng(5)
    keys = rng.integers(-(2**63), 2**63 - 1, 5000)
    counts = rng.integers(0, 5, 5000)
    call = {"threshold": 3.3, "step": 2**63 + 4, "equal": equal, "seed": 2**64 - 1}
    a = table.probabilistic_admission_filter(keys, counts, impl="cpu", **call)
    assert np.array_equal(
        a[:500],
        table.probabilistic_admission_filter(keys[:500], counts[:500], impl="reference", **call),
    )
    order = rng.permutation(5000)
    assert np.array_equal(
        a[order], table.probabilistic_admission_filter(keys[order], counts[order], **call)
    )
    for change in ({"step": 1}, {"seed": 1}):
        other = table.probabilistic_admission_filter(keys, counts, **(call | change))
        assert 0.1 < (other != a).mean() < 0.9
    assert not a[counts == 0].any()
    chance = ProbabilisticFilter(3.3, equal=equal, seed=2**64 - 1)
    again = ProbabilisticFilter(1.0)
    again.load_state_dict(chance.state_dict())
    for f in (chance, again):
        assert np.array_equal(f.admits(keys, counts, step=2**63 + 4), a)
    free = table.probabilistic_admission_filter(keys, counts * 0, threshold=0, step=0, equal=equal)
    assert free.all()


K = np.arange(4)
COUNTER = CountFilter(100, 2)


def frequency(*args, **kw):
    return lambda: table.frequency_admission_filter(*args, **kw)


def chance(*args, **kw):
    return lambda: table.probabilistic_admission_filter(
        *args, **({"threshold": 2.0, "step": 0} | kw)
    )


ERRORS = {
    ("CountFilter", ValueError): [
        (lambda: CountFilter(100, 16), "threshold: expected an integer >= 0 and <= 15, got 16"),
        (lambda: CountFilter(13, 1), "capacity: expected an integer >= 14"),
        (lambda: CountFilter(100, 1, splits=4), "splits: expected 1, or 5 to 64, got 4. Leave"),
        (
            lambda: CountFilter(100, 1, splits=0),
            "splits: expected an integer >= 1 and <= 64, got 0",
        ),
    ],
    ("CountFilter", TypeError): [
        (lambda: CountFilter(100, 1.0), "threshold: expected an integer, got float"),
        (lambda: CountFilter("9", 1), "capacity: expected an integer, got str"),
    ],
    ("CountFilter.add", TypeError): [
        (lambda: COUNTER.add([1]), f"keys: {NO_ARRAY} list"),
        (lambda: COUNTER.add(K, K * 1.0), "counts: expected dtype int64, int32, got float64"),
    ],
    ("CountFilter.add", ValueError): [
        (lambda: COUNTER.add(K[None]), "keys: expected 1 dimension(s), got shape (1, 4)"),
        (lambda: COUNTER.add(K, K[:2]), "counts: expected shape (4,) like keys, got (2,)"),
        (lambda: COUNTER.add(K, -K), "counts: expected counts >= 0, got -3. Leave"),
    ],
    ("CountFilter.counts", TypeError): [
        (lambda: COUNTER.counts(K * 1.0), "keys: expected dtype int64")
    ],
    ("CountFilter.counts", NotImplementedError): [
        (
            lambda: COUNTER.counts(torch.zeros(1, dtype=torch.int64, device="meta")),
            "keys: expected device cpu, got meta",
        )
    ],
    ("frequency_admission_filter", TypeError): [
        (frequency(3, K), "counter: expected CountFilter, got int. Use"),
        (frequency(COUNTER, [1]), f"keys: {NO_ARRAY}"),
        (
            frequency(COUNTER, K, torch.ones(4).long()),
            "counts: expected a numpy array like keys, got torch",
        ),
    ],
    ("frequency_admission_filter", ValueError): [
        (
            frequency(COUNTER, K, threshold=16),
            "threshold: expected an integer >= 0 and <= 15, got 16",
        )
    ],
    ("frequency_admission_filter", NotImplementedError): [
        (frequency(COUNTER, K, impl="cuda"), "no implementation fits keys (4,) int64 on cpu")
    ],
    ("ProbabilisticFilter", ValueError): [
        (lambda: ProbabilisticFilter(-1.0), "threshold: expected a number >= 0"),
        (lambda: ProbabilisticFilter(1.0, seed=-1), "seed: expected an integer >= 0"),
    ],
    ("ProbabilisticFilter.load_state_dict", ValueError): [
        (
            lambda: ProbabilisticFilter(1.0).load_state_dict({}),
            "state: expected version 1, got None",
        )
    ],
    ("probabilistic_admission_filter", TypeError): [(chance([1]), f"keys: {NO_ARRAY}")],
    ("probabilistic_admission_filter", ValueError): [
        (chance(K, -K), "counts: expected counts >= 0, got -3"),
        (chance(K, threshold=math.inf), "threshold: expected a finite number >= 0, got inf"),
        (chance(K, step=-1), "step: expected an integer >= 0"),
        (chance(K, seed=2**64), "seed: expected an integer >= 0"),
    ],
    ("probabilistic_admission_filter", NotImplementedError): [
        (chance(K, impl="triton"), "no implementation fits")
    ],
}


@pytest.mark.parametrize(("op", "error", "call", "text"), grouped(ERRORS))
def test_errors(op, error, call, text):
    with refused(f"[{op}] {text}", error):
        call()


def test_a_refused_batch_counts_nothing():
    counter = CountFilter(100, 2)
    with pytest.raises(ValueError, match="counts"):
        counter.add(K, np.array([1, 1, 1, -1]))
    assert len(counter) == 0
