# SPDX-License-Identifier: Apache-2.0
"""Managed eviction: the example by hand, one sort of everything, laws, TorchRec on the same stream."""

import itertools
import math

import numpy as np
import pytest
import torch
from hotloop.table import Eviction, ManagedSlots, mch_evict_batch
from hotloop.table.managed_slots import ADMISSIONS, POLICIES
from table_checks import NO_ARRAY, grouped, refused


def stream(seed, rounds, ids=60, length=40):
    """Rounds of (distinct ids, counts, last_access, now); few distinct numbers, so that scores tie."""
    rng = np.random.default_rng(seed)
    names = np.concatenate([rng.integers(-(2**63), 2**63 - 1, ids - 3), [0, 2**63 - 1, -(2**63)]])
    for r in range(rounds):
        k, c = np.unique(rng.choice(names, rng.integers(0, length)), return_counts=True)
        order = rng.permutation(len(k))
        yield k[order], c[order], 3 * r + rng.integers(0, 3, len(k)), 3 * r + 2


def brute(slots, ids, counts, last, now, policy, p):
    """Every free slot and every id in one list, sorted by the rule of the docstring; free slots rank last."""
    z = len(slots.ids) - 1
    seen = {}  # id -> [count, last, slot or None]
    for s in range(z):
        if slots.used[s]:
            seen[int(slots.ids[s])] = [int(slots.counts[s]), int(slots.last_access[s]), s]
    for i, c, t in zip(ids.tolist(), counts.tolist(), last.tolist()):
        entry = seen.setdefault(i, [0, 0, None])
        entry[0], entry[1] = entry[0] + c, t

    def key(item):
        i, (c, t, slot) = item
        age = float(now - t + 1) ** p
        score = {"lfu": c, "lru": -age, "distance_lfu": c / age}[policy]
        return (-score, slot is None, -c if slot is None else 0, i)

    ranked = sorted(seen.items(), key=key)
    kept = dict(ranked[:z])
    lost = [e[2] for _, e in ranked[z:] if e[2] is not None]
    won = [i for i, e in ranked[:z] if e[2] is None]
    free = [s for s in range(z) if not slots.used[s]]
    places = lost + free[len(free) - (len(won) - len(lost)) :]
    where = {i: e[2] for i, e in kept.items() if e[2] is not None} | dict(zip(won, places))
    return {i: (s, *seen[i][:2]) for i, s in where.items()}, places


def contents(slots):
    z = len(slots.ids) - 1
    return {
        int(slots.ids[s]): (s, int(slots.counts[s]), int(slots.last_access[s]))
        for s in range(z)
        if slots.used[s]
    }


# one slot is no slot; one usable; fewer than ids; more than ids
@pytest.mark.parametrize("num_slots", [1, 2, 20, 100])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("p", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_equals_one_sort_of_everything(num_slots, policy, p, impl):
    slots = ManagedSlots.start(num_slots)
    for ids, counts, last, now in stream(num_slots, 25):
        wanted, places = brute(slots, ids, counts, last, now, policy, p)
        before = [x.copy() for x in slots]
        done = mch_evict_batch(
            slots, ids, counts, last, now=now, policy=policy, decay_exponent=p, impl=impl
        )
        assert all(np.array_equal(a, b) for a, b in zip(before, slots)), "slots were changed"
        assert contents(done.slots) == wanted
        assert not done.slots.used[-1]
        assert done.refilled.tolist() == places
        assert done.slot_of.tolist() == [wanted.get(i, (num_slots - 1,))[0] for i in ids.tolist()]
        assert done.was_used.tolist() == [bool(slots.used[s]) for s in places]
        held = [int(i) for i, u in zip(done.evicted_ids, done.was_used) if u]
        assert held == [int(slots.ids[s]) for s in places if slots.used[s]]
        slots = done.slots


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("admission", ADMISSIONS)
def test_loop_and_reference_agree_over_many_rounds(policy, admission):
    ours = theirs = ManagedSlots.start(30)
    for ids, counts, last, now in stream(7, 40, ids=200, length=400):
        call = {"now": now, "policy": policy, "admission": admission, "skew": 1.5, "seed": 9}
        call["probability"] = 0.3
        a = mch_evict_batch(ours, ids, counts, last, impl="cpu", **call)
        b = mch_evict_batch(theirs, ids, counts, last, impl="reference", **call)
        for x, y in zip((*a.slots, *a[1:]), (*b.slots, *b[1:])):
            assert x.dtype == y.dtype
            assert np.array_equal(x, y)
        ours, theirs = a.slots, b.slots


def test_laws():
    ids = np.arange(40) - 20
    start = mch_evict_batch(ManagedSlots.start(41), ids, now=0).slots
    # Room for everybody: nothing is evicted. No new ids: nothing is, either.
    assert start.used[:-1].all()
    again = mch_evict_batch(start, ids[::-1].copy(), now=1, policy="lru")
    assert len(again.refilled) == 0
    assert (again.slots.counts[:-1] == 2).all()
    # Equal scores keep the incumbents; one more wins.
    same = mch_evict_batch(start, ids + 100, now=0)
    assert len(same.refilled) == 0
    assert (same.slot_of == 40).all()
    more = mch_evict_batch(start, ids + 100, ids * 0 + 2, now=0)
    assert sorted(more.refilled.tolist()) == list(range(40))
    assert set(more.evicted_ids.tolist()) == set(ids.tolist())
    # The order in which ids are given does not matter.
    rng = np.random.default_rng(0)
    c = rng.integers(1, 4, 40)
    order = rng.permutation(40)
    a = mch_evict_batch(start, ids + 15, c, now=0)
    b = mch_evict_batch(start, (ids + 15)[order], c[order], now=0)
    assert np.array_equal(a.slot_of[order], b.slot_of)
    assert np.array_equal(a.slots.ids, b.slots.ids)
    # An id that comes in, is known and loses its slot all the same has none.
    little = mch_evict_batch(ManagedSlots.start(2), np.array([5]), now=0).slots
    lost = mch_evict_batch(little, np.array([5, 6]), np.array([1, 9]), now=0)
    assert lost.slot_of.tolist() == [1, 0]
    assert lost.evicted_ids.tolist() == [5]


def test_large_tables_agree_with_the_reference():
    rng = np.random.default_rng(1)
    z = 40_000  # several threads scan the slots
    slots = mch_evict_batch(
        ManagedSlots.start(z + 1), np.arange(z), rng.integers(1, 50, z), now=0
    ).slots
    ids = rng.choice(3 * z, 20_000, replace=False)
    counts = rng.integers(1, 60, 20_000)
    for policy in POLICIES:
        a = mch_evict_batch(slots, ids, counts, now=3, policy=policy)
        b = mch_evict_batch(slots, ids, counts, now=3, policy=policy, impl="reference")
        assert np.array_equal(a.slot_of, b.slot_of)
        assert len(a.refilled) > 1000 or policy == "lfu"


def test_admission():
    ids = np.arange(4)
    counts = np.array([1, 2, 3, 30])
    empty = ManagedSlots.start(10)

    def entered(**kw):
        return (mch_evict_batch(empty, ids, counts, now=0, **kw).slot_of < 9).tolist()

    assert entered() == [True] * 4
    assert entered(admission="average") == [False, False, False, True]
    assert entered(admission="dynamic") == [False] * 4
    assert entered(admission="dynamic", skew=0.2) == [False, True, True, True]
    assert entered(admission="probabilistic", probability=1.0) == [True] * 4
    assert entered(admission="probabilistic", probability=0.0) == [False] * 4
    # Known ids that are kept out keep slot and score.
    known = mch_evict_batch(empty, ids, counts, now=0).slots
    after = mch_evict_batch(known, ids, counts, now=5, admission="average")
    assert after.slots.counts[after.slot_of].tolist() == [1, 2, 3, 60]
    assert after.slots.last_access[after.slot_of].tolist() == [0, 0, 0, 5]


def test_probabilistic_admission_has_its_rate():
    n = 20_000
    ids = np.arange(n)
    for count, q in itertools.product((1, 5), (0.01, 0.2)):
        done = mch_evict_batch(
            ManagedSlots.start(n + 1),
            ids,
            ids * 0 + count,
            now=4,
            admission="probabilistic",
            probability=q,
        )
        wanted = 1 - (1 - q) ** count
        got = (done.slot_of < n).mean()
        bound = 5 * math.sqrt(wanted * (1 - wanted) / n)  # a false alarm in 2e6
        assert abs(got - wanted) < bound
        assert abs(got - wanted * 1.5) > bound  # and it would see another rate


def test_kinds():
    ids = torch.tensor([4, 5, 6])
    done = mch_evict_batch(ManagedSlots.start(3, like=ids), ids, torch.tensor([1, 3, 2]), now=0)
    assert isinstance(done, Eviction)
    assert all(isinstance(x, torch.Tensor) for x in (*done.slots, *done[1:]))
    assert done.slot_of.tolist() == [2, 0, 1]
    assert done.slots.used.tolist() == [True, True, False]
    none = mch_evict_batch(done.slots, ids[:0], now=1)
    assert torch.equal(none.slots.ids, done.slots.ids)


S, I = ManagedSlots.start(4), np.arange(3)


def evict(slots=S, ids=I, *args, **kw):
    return lambda: mch_evict_batch(slots, ids, *args, **({"now": 5} | kw))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_largest_numbers_do_not_wrap(policy, impl):
    most, far = 2**62 - 1, 2**61
    one, two, early, late = (np.array([x]) for x in (1, 2, -far, far))
    kw = {"now": far, "policy": policy, "impl": impl}
    slots = mch_evict_batch(ManagedSlots.start(2), one, np.array([most]), early, **kw).slots
    # One sighting 2^62 steps ago has the smallest score there is, a wrapped distance a negative one.
    lost = mch_evict_batch(slots, two, np.array([most]), late, **kw)
    assert lost.slot_of.tolist() == ([1] if policy == "lfu" else [0])
    again = mch_evict_batch(slots, one, np.array([most]), late, **kw).slots
    assert (again.counts[0], again.last_access[0]) == (2 * most, far)
    with pytest.raises(ValueError, match=r"slots\.counts: expected counts below 2\^62"):
        mch_evict_batch(again, one, np.array([1]), late, **kw)


ERRORS = {
    TypeError: [
        (evict(3), "slots: expected ManagedSlots, got int. Use ManagedSlots.start"),
        (evict(S._replace(ids=I * 1.0)), "slots.ids: expected dtype int64, got float64"),
        (evict(S._replace(used=I)), "slots.used: expected dtype bool, uint8, got int64"),
        (evict(ids=torch.arange(3)), "slots.ids: expected a torch array like ids"),
        (evict(ids=[1]), f"ids: {NO_ARRAY} list"),
        (evict(now=1.0), "now: expected an integer, got float"),
    ],
    ValueError: [
        (evict(S._replace(counts=I)), "slots.counts: expected shape (4,) like slots"),
        (evict(ids=np.array([3, 1, 3])), "ids: expected distinct ids, got 3 twice. Use"),
        (evict(ids=np.array([3, 1, 3]), impl="reference"), "ids: expected distinct ids"),
        (evict(S, I, I), "counts: expected counts >= 1, got 0"),
        (
            evict(S, I + 1, np.array([1, 2**62, 1])),
            f"counts: expected counts below 2^62, got {2**62}: the sum would wrap",
        ),
        (
            evict(S._replace(counts=np.full(4, 2**63 - 1))),
            f"slots.counts: expected counts below 2^62, got {2**63 - 1}",
        ),
        (
            evict(S, I, None, I * 0 - 2**62),
            f"last_access: expected steps from -2^61, got {-(2**62)}. Count steps from a later one",
        ),
        (
            evict(S._replace(last_access=np.full(4, -(2**63)))),
            f"slots.last_access: expected steps from -2^61, got {-(2**63)}",
        ),
        (evict(now=2**61 + 1), f"now: expected an integer >= {-(2**61)} and <= {2**61}, got"),
        (evict(S, I, I[:2]), "counts: expected shape (3,)"),
        (evict(S, I, None, I * 4), "last_access: expected steps up to now = 5, got 8"),
        (
            evict(S._replace(last_access=np.full(4, 9))),
            "slots.last_access: expected steps up to now = 5, got 9. Pass a later now",
        ),
        (evict(policy="fifo"), "policy: expected one of lfu, lru, distance_lfu, got"),
        (evict(admission="some"), "admission: expected one of all, average, dynamic"),
        (evict(decay_exponent=0.0), "decay_exponent: expected a number > 0"),
        (evict(skew=-1.0), "skew: expected a number >= 0"),
        (evict(probability=1.5), "probability: expected a number >= 0 and <= 1"),
        (evict(seed=-1), "seed: expected an integer >= 0"),
        (lambda: ManagedSlots.start(0), "num_slots: expected an integer >= 1, got 0"),
    ],
    NotImplementedError: [(evict(impl="cuda"), "no implementation fits ids (3,) int64 on cpu")],
}


@pytest.mark.parametrize(("error", "call", "text"), grouped(ERRORS))
def test_errors(error, call, text):
    with refused(f"[mch_evict_batch] {text}", error):
        call()


# -- TorchRec itself


@pytest.mark.peer
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_slots", [8, 33])
@pytest.mark.filterwarnings("ignore")
def test_torchrec_on_the_same_stream(policy, num_slots):
    modules = pytest.importorskip("torchrec.modules.mc_modules")
    sparse = pytest.importorskip("torchrec.sparse.jagged_tensor")
    theirs = {
        "lfu": modules.LFU_EvictionPolicy,
        "lru": modules.LRU_EvictionPolicy,
        "distance_lfu": modules.DistanceLFU_EvictionPolicy,
    }[policy]
    interval = 3
    module = modules.MCHManagedCollisionModule(
        zch_size=num_slots,
        device=torch.device("cpu"),
        eviction_policy=theirs(),
        eviction_interval=interval,
    )
    slots = ManagedSlots.start(num_slots)
    rng = np.random.default_rng(num_slots)
    history: dict[int, list[int]] = {}
    evicted = 0
    for step in range(60):
        # What is frequent moves on, and becomes more frequent: even counts that never decay are overtaken.
        batch = (rng.zipf(1.3, 20 + 4 * step) % 40 + step // 6 * 10).astype(np.int64)
        lengths = torch.ones(len(batch), dtype=torch.int64)
        module._input_history_buffer_size = (
            -1 if step % interval == 0 else module._input_history_buffer_size
        )
        module({"f": sparse.JaggedTensor(torch.from_numpy(batch), lengths=lengths)})
        now = module._current_iter
        for i in batch.tolist():
            entry = history.setdefault(i, [0, 0])
            entry[0], entry[1] = entry[0] + 1, now
        if now != module._last_eviction_iter:
            continue
        ids = np.array(sorted(history), np.int64)
        counts, last = (np.array([history[i][j] for i in ids.tolist()], np.int64) for j in (0, 1))
        done = mch_evict_batch(slots, ids, counts, last, now=now, policy=policy)
        slots, history = done.slots, {}
        evicted += int(done.was_used.sum())
        used = module._mch_sorted_raw_ids != torch.iinfo(torch.int64).max
        held = module._mch_sorted_raw_ids[used].tolist()
        assert sorted(contents(slots)) == held
        for name, column in (("counts", 1), ("last_access_iter", 2)):
            if name in module._mch_metadata:
                got = [contents(slots)[i][column] for i in held]
                assert got == module._mch_metadata[name][used].tolist()
        assert [contents(slots)[i][0] for i in held] == module._mch_remapped_ids_mapping[
            used
        ].tolist()
    assert evicted > 10
