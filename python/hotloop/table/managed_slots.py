# SPDX-License-Identifier: Apache-2.0
"""Which ids keep their slot of a fixed table when new ones compete for it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..front import arrays, check, native
from ..front.check import choice, integer, number
from ..front.impl import Impl, choose
from ..reference.table import managed_slots as _reference
from ..reference.table.results import Eviction, ManagedSlots
from . import _keys, _words

EvictionPolicy = Literal["lfu", "lru", "distance_lfu"]
POLICIES = ("lfu", "lru", "distance_lfu")
Admission = Literal["all", "average", "dynamic", "probabilistic"]
ADMISSIONS = ("all", "average", "dynamic", "probabilistic")
_FLAGS = ("bool", "uint8")
_FARTHEST = 2**61  # of a step from 0: now - last_access + 1 is then an int64


@_words.documented
def mch_evict_batch(
    slots: ManagedSlots,
    ids: Any,
    counts: Any = None,
    last_access: Any = None,
    *,
    now: int,
    policy: EvictionPolicy = "lfu",
    decay_exponent: float = 1.0,
    admission: Admission = "all",
    skew: float = 10.0,
    probability: float = 0.01,
    seed: int = 0,
    impl: Impl = "auto",
) -> Eviction:
    """Let new ids compete for the slots of a table by frequency, recency or both; the better half stays.

    Ids that have a slot: counts += c, last_access = theirs. Slots and new ids are then ranked together and the Z - 1
    best keep or get a slot:
    lfu: score = count;  lru: -(now - last + 1)^p;  distance_lfu: count / (now - last + 1)^p, p = ``decay_exponent``.
    Equal scores: slots before new ids; among slots the smaller id; among new ids the larger count, then the smaller id.
    The k-th best new id takes the k-th best of the slots that lost, then the last free ones.
    Before all this ``admission`` keeps ids out, known ones too:
    average: count > mean of the counts;  dynamic: count > ``skew`` * mean;
    probabilistic: u < 1 - (1 - ``probability``)^count, u drawn as in ``probabilistic_admission_filter``.

    Differs from TorchRec: free slots are filled before any id loses one, whatever the scores (there they are ids like
    any other, with count 0 and step 0); scores are float64, or integers where the order allows (there float32, which
    ties what is close); draws are keyed, not from torch's generator; ids may have any value.

    Args:
        slots: ``ManagedSlots.start(Z)``, later ``slots`` of what this function returned. Not changed.
        ids: (n,), distinct; int64 or uint64 of any value, or int32.
        counts: sightings of each id since the last round, int64 or int32 (n,), from 1 to below 2^62. Default 1 each.
        last_access: step of the last of them, int64 or int32 (n,), -2^61 to ``now``. Default ``now``.
        now: this step, not before any last access, -2^61 to 2^61.
        policy: "lfu", "lru" or "distance_lfu". Default "lfu".
        decay_exponent: p, > 0. Default 1. The order of "lru" does not depend on it.
        admission: "all", "average", "dynamic" or "probabilistic". Default "all".
        skew: of "dynamic", >= 0. Default 10.
        probability: of "probabilistic", per sighting, 0 to 1. Default 0.01.
        seed: of "probabilistic", 0 to 2^64 - 1. Default 0.

    Returns:
        An ``Eviction``, arrays of the kind of ``ids``.

    Raises:
        ValueError: shapes that do not fit, ids that stand twice, accesses after ``now``, numbers out of range.

    Examples:
        >>> import numpy as np
        >>> table = ManagedSlots.start(3)
        >>> table = mch_evict_batch(table, np.array([70, 80]), np.array([5, 1]), now=0).slots
        >>> done = mch_evict_batch(table, np.array([90, 95, 70]), np.array([2, 1, 1]), now=1)
        >>> done.slot_of.tolist(), done.evicted_ids.tolist(), done.slots.counts.tolist()
        ([1, 2, 0], [80], [6, 2, 0])

    Reference:
        TorchRec, modules/mc_modules.py: LFU_EvictionPolicy, LRU_EvictionPolicy, DistanceLFU_EvictionPolicy and the
        threshold filters.
    """
    op = "mch_evict_batch"
    check.instance(op, "slots", slots, ManagedSlots, hint="Use ManagedSlots.start(...).")
    k = _keys.keys(op, ids, 1, name="ids")
    n = int(k.shape[0])
    for name, value in zip(ManagedSlots._fields, slots):
        dtypes = _FLAGS if name == "used" else ("int64",)
        check.array(op, f"slots.{name}", value, dtypes, 1)
        check.same_place(op, f"slots.{name}", value, "ids", k)
        if tuple(value.shape) != tuple(slots.ids.shape) or value.shape[0] < 1:
            raise ValueError(
                f"[{op}] slots.{name}: expected shape {tuple(slots.ids.shape)} like slots.ids, of one slot or more, "
                f"got {tuple(value.shape)}."
            )
    now = integer(op, "now", now, at_least=-_FARTHEST, at_most=_FARTHEST)
    choice(op, "policy", policy, POLICIES)
    choice(op, "admission", admission, ADMISSIONS)
    p = number(op, "decay_exponent", decay_exponent, above=0, below=float("inf"))
    skew = number(op, "skew", skew, at_least=0, below=float("inf"))
    probability = number(op, "probability", probability, at_least=0, at_most=1)
    seed = integer(op, "seed", seed, at_least=0, at_most=2**64 - 1)
    c = _keys.counts(op, counts, k, least=1)
    last = None
    if last_access is not None:
        last = _keys.counts(op, last_access, k, name="last_access", least=-(2**63))
        _not_after(op, "last_access", last, now)
    _not_after(op, "slots.last_access", slots.last_access, now)
    _summable(op, "slots.counts", slots.counts)
    if c is not None:
        _summable(op, "counts", c)
    incoming = arrays.to_numpy(k)
    if choose(op, impl, "ids", k) == "reference":
        order = np.sort(incoming)
        if (twice := order[1:][order[1:] == order[:-1]]).size:
            _refuse_twice(op, int(twice[0]))
        return _reference.mch_evict_batch(
            slots,
            k,
            c,
            last,
            now=now,
            policy=policy,
            decay_exponent=p,
            admission=admission,
            skew=skew,
            probability=probability,
            seed=seed,
        )
    c = np.ones(n, np.int64) if c is None else arrays.to_numpy(c)
    last = np.full(n, now, np.int64) if last is None else arrays.to_numpy(last)
    admitted: Any
    if admission == "probabilistic":
        admitted = np.empty(n, bool)
        t = _reference.sightings_of(probability)
        native.core.table.probabilistic(n, seed, incoming, now % 2**64, c, t, True, admitted)
    else:
        admitted = _reference.admitted(incoming, c, now, admission, skew, probability, seed)
    new = [np.array(arrays.to_numpy(x)) for x in slots]  # copies
    slot_of = np.empty(n, np.int64)
    twice_at, *parts = native.core.table.evict(
        len(new[0]), tuple(new), n, (incoming, c, last, admitted), now, policy, p, slot_of
    )
    if twice_at >= 0:
        _refuse_twice(op, int(incoming[twice_at]))
    rest = (slot_of, *(np.array(x, t) for x, t in zip(parts, (np.int64, np.int64, bool))))
    done = [arrays.from_numpy(x, k) for x in (*new, *rest)]
    return Eviction(ManagedSlots(*done[:4]), *done[4:])


def _refuse_twice(op: str, value: int) -> None:
    raise ValueError(
        f"[{op}] ids: expected distinct ids, got {value} twice. Use unique(return_counts=True)."
    )


def _summable(op: str, name: str, value: Any) -> None:
    """Two counts that pass can be added in int64."""
    if value.shape[0] and (most := int(value.max())) >= 2**62:
        raise ValueError(
            f"[{op}] {name}: expected counts below 2^62, got {most}: the sum would wrap. Halve all counts."
        )


def _not_after(op: str, name: str, value: Any, now: int) -> None:
    if value.shape[0] and (latest := int(value.max())) > now:
        raise ValueError(
            f"[{op}] {name}: expected steps up to now = {now}, got {latest}. Pass a later now."
        )
    if value.shape[0] and (first := int(value.min())) < -_FARTHEST:
        raise ValueError(
            f"[{op}] {name}: expected steps from -2^61, got {first}. Count steps from a later one."
        )
