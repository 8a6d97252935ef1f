# SPDX-License-Identifier: Apache-2.0
"""Managed eviction by one sort of slots and newcomers together."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...front import arrays
from .filters import probabilistic_admission_filter
from .results import Eviction, ManagedSlots


def admitted(
    ids: np.ndarray,
    counts: np.ndarray,
    now: int,
    admission: str,
    skew: float,
    probability: float,
    seed: int,
) -> np.ndarray | None:
    """Which ids may compete, or None for all."""
    if admission == "all" or not len(ids):
        return None
    if admission == "average":
        return np.asarray(counts > counts.mean())
    if admission == "dynamic":
        return np.asarray(counts > skew * counts.mean())
    t, step = sightings_of(probability), now % 2**64
    found = probabilistic_admission_filter(
        ids, counts, threshold=t, step=step, equal=True, seed=seed
    )
    return np.asarray(found)


def sightings_of(probability: float) -> float:
    """The threshold T with 0.05^(1 / T) = 1 - probability."""
    if probability in (0.0, 1.0):
        return math.inf if probability == 0.0 else 0.0
    return math.log(0.05) / math.log1p(-probability)


def mch_evict_batch(
    slots: Any,
    ids: Any,
    counts: Any = None,
    last_access: Any = None,
    *,
    now: int,
    policy: str = "lfu",
    decay_exponent: float = 1.0,
    admission: str = "all",
    skew: float = 10.0,
    probability: float = 0.01,
    seed: int = 0,
) -> Eviction:
    given, ids = ids, arrays.to_numpy(ids)
    counts = np.ones(len(ids), np.int64) if counts is None else arrays.to_numpy(counts)
    last = np.full(len(ids), now) if last_access is None else arrays.to_numpy(last_access)
    enters = admitted(ids, counts, now, admission, skew, probability, seed)
    enters = np.ones(len(ids), bool) if enters is None else enters
    slot_ids, slot_counts, slot_last, used = (np.array(arrays.to_numpy(x)) for x in slots)
    used = used.astype(bool)
    reserve = len(slot_ids) - 1
    where = {int(slot_ids[s]): s for s in range(reserve) if used[s]}
    fresh = []
    for i in range(len(ids)):
        s = where.get(int(ids[i]))
        if s is None:
            if enters[i]:
                fresh.append(i)
        elif enters[i]:
            slot_counts[s] += counts[i]
            slot_last[s] = last[i]

    def score(count: int, seen: int) -> float:
        if policy == "lfu":
            return count
        if policy == "lru":
            return seen
        return float(count) / math.pow(now - seen + 1, decay_exponent)

    # Descending, incumbents before newcomers where equal, free slots last of all.
    ranked = [
        (-score(int(slot_counts[s]), int(slot_last[s])), 0, 0, int(slot_ids[s]), s)
        for s in range(reserve)
        if used[s]
    ]
    ranked += [
        (-score(int(counts[i]), int(last[i])), 1, -int(counts[i]), int(ids[i]), i) for i in fresh
    ]
    ranked.sort()
    lost = [x[-1] for x in ranked[reserve:] if x[1] == 0]
    won = [x[-1] for x in ranked[:reserve] if x[1] == 1]
    free = [s for s in range(reserve) if not used[s]]
    refilled = np.array(lost + free[len(free) + len(lost) - len(won) :], np.int64)
    evicted, was_used = slot_ids[refilled], used[refilled]
    for s, i in zip(refilled, won):
        slot_ids[s], slot_counts[s], slot_last[s], used[s] = ids[i], counts[i], last[i], True
    where = {int(slot_ids[s]): s for s in range(reserve) if used[s]}
    slot_of = np.array([where.get(int(i), reserve) for i in ids], np.int64)
    after = (slot_ids, slot_counts, slot_last, used, slot_of, refilled, evicted, was_used)
    done = [arrays.from_numpy(x, given) for x in after]
    return Eviction(ManagedSlots(*done[:4]), *done[4:])
