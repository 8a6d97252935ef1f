# SPDX-License-Identifier: Apache-2.0
"""Results that an op and its reference both make, and how the error memory reads arrays; front doors import them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...front import arrays
from ...front.check import integer


class Compensated(NamedTuple):
    """Compensated predictions and what they came from.

    ``prediction`` (B,): y_pred. ``weights`` (B, k): the softmax weights a, largest first, 0 where there is no further
    neighbour. ``neighbors`` (B, k) int64: their slots, -1 where there is none.
    """

    prediction: Any
    weights: Any
    neighbors: Any


class SketchCompensated(NamedTuple):
    """``prediction`` (B,): y_pred. ``weights`` (B, R): of each repeat, 0 where the bucket is empty."""

    prediction: Any
    weights: Any


class MergedGradients(NamedTuple):
    """One row per distinct id, in the order of first occurrence."""

    ids: Any
    """(U,), dtype of the ids given."""
    grads: Any
    """(U, D) float32 (float64 for float64 grads): sums in the order of the batch."""
    counts: Any
    """(U,) int64: how often each id occurs."""
    inverse: Any
    """(N,) int64: the row of ``ids`` that each id of the batch is."""


class ManagedSlots(NamedTuple):
    """Z slots of a table of fixed size, arrays of one kind.

    ``ids`` (Z,) int64 of any value; ``counts`` (Z,) int64, sightings; ``last_access`` (Z,) int64, the step of the last
    one; ``used`` (Z,) bool: whether the slot holds an id. The last slot is for all ids without one, and never used.
    """

    ids: Any
    counts: Any
    last_access: Any
    used: Any

    @classmethod
    def start(cls, num_slots: int, *, like: Any = None) -> ManagedSlots:
        """Return ``num_slots`` >= 1 empty slots, in an array kind like ``like``."""
        z = integer("mch_evict_batch", "num_slots", num_slots, at_least=1)
        like = np.empty(0) if like is None else like
        parts = (*(np.zeros(z, np.int64) for _ in range(3)), np.zeros(z, bool))
        return cls(*(arrays.from_numpy(x, like) for x in parts))


class Eviction(NamedTuple):
    """What one round of eviction did.

    ``slots``: the new ``ManagedSlots``. ``slot_of`` (n,) int64: where each incoming id is now, Z - 1 for those without
    a slot. ``refilled`` (E,) int64: slots that hold another id than before, whose rows are to be reset.
    ``evicted_ids`` (E,) int64: what they held; meaningless where ``was_used`` (E,) bool is False.
    """

    slots: ManagedSlots
    slot_of: Any
    refilled: Any
    evicted_ids: Any
    was_used: Any
