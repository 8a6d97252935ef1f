# SPDX-License-Identifier: Apache-2.0
"""Admission: which unknown keys may enter a table. A filter that counts sightings, and one that keeps nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..front import arrays, check, native
from ..front.arrays import Array
from ..front.check import integer, number
from ..front.impl import Impl, choose
from ..reference.table import filters as _reference
from . import _keys, _words

MAX_COUNT = 15
"""What a counter of four bits holds, and the largest threshold that can be met."""

STATE_VERSION = 1
_MOST = 2**64 - 1


class CountFilter:
    """Count how often keys were seen, up to 15, in two bytes per key, and forget the oldest.

    Cells of 16 bits (12 of signature, 4 of a saturating counter) in open addressing. With one split (1.5 cells per key,
    probes of 32 cells) nothing is forgotten, and when it is full new keys get 15. With S splits, a ring of
    S arrays of capacity / (S - 1) keys (1.2 cells per key, probes of 16), the oldest is cleared when the newest one is
    full. A key seen again later takes a cell of the newest split too and carries its count over: ``capacity`` is what
    is remembered of keys seen once, less of keys that come back all the time. Two keys with one signature in reach
    of each other share a counter, about 0.1% of keys in a full split: of what is remembered, counts are never too low,
    sometimes too high. As ``admission`` of a table it has not seen a batch that raised ``TableFullError``.

    Differs from Monolith in the hash (``mix64``), and in the probe of a single split (Monolith: 64 cells), so that no
    probe touches more than two cache lines.

    Args:
        capacity: distinct keys to remember, >= 2 splits. Memory: 2.4 bytes * S / (S - 1) per key for a ring, 3 for one
            split.
        threshold: sightings before a key is admitted, 0 to 15: it is let in on the sighting after. 0 admits everything.
        splits: 1, or 5 to 64. Default 7.

    Raises:
        TypeError: not an integer.
        ValueError: out of range; a threshold above 15 would never be met.

    Examples:
        >>> import numpy as np
        >>> counter = CountFilter(1000, 2)
        >>> counter.add(np.array([7, 7, 7, -1])).tolist()
        [0, 1, 2, 0]
        >>> counter.admits(np.array([7, -1])).tolist()
        [True, False]
    """

    def __init__(self, capacity: int, threshold: int, *, splits: int = 7) -> None:
        self._set(capacity, threshold, splits)
        self._native = native.core.table.CountFilter(self.capacity, self.splits)

    def _set(self, capacity: int, threshold: int, splits: int) -> None:
        op = "CountFilter"
        self.splits = integer(op, "splits", splits, at_least=1, at_most=64)
        if 1 < self.splits < 5:
            raise ValueError(
                f"[{op}] splits: expected 1, or 5 to 64, got {self.splits}. Leave it at 7 for a sliding window."
            )
        self.capacity = integer(op, "capacity", capacity, at_least=2 * self.splits, at_most=2**48)
        self.threshold = integer(op, "threshold", threshold, at_least=0, at_most=MAX_COUNT)

    @classmethod
    def restored(cls, state: dict[str, Any], threshold: int) -> CountFilter:
        """Make the filter of a ``state_dict`` whose cells may be flat; no memory is taken that the cells do not fill.

        Raises:
            TypeError, ValueError: the state is not one, or its cells are fewer or more than its capacity takes.
        """
        found = cls.__new__(cls)
        found._set(state["capacity"], threshold, state["splits"])
        cells = np.asarray(state["cells"])
        each = int(native.core.table.filter_cells(found.capacity, found.splits))
        if cells.size != found.splits * each:
            raise ValueError(
                f"[CountFilter] state: expected {found.splits * each} cells for capacity {found.capacity}, got "
                f"{cells.size}. The state is damaged."
            )
        found._native = native.core.table.CountFilter(found.capacity, found.splits)
        found.load_state_dict({**state, "cells": cells.reshape(found.splits, each)})
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of cells."""
        return int(self._native.bytes)

    @property
    def failures(self) -> int:
        """How many sightings found no free cell; they counted as 15."""
        return int(self._native.save(None)[2])

    def __len__(self) -> int:
        """Occupied cells: distinct keys in the window, those counted in two splits twice."""
        return sum(self._native.save(None)[3])

    def __repr__(self) -> str:
        return f"CountFilter({self.capacity}, {self.threshold}, splits={self.splits})"

    def add(self, keys: Any, counts: Any = None) -> Any:
        """Add sightings, in order, and return what each key had before.

        Args:
            keys: (n,), int64 or uint64 of any value, or int32.
            counts: sightings of each, int64 or int32 (n,), >= 0. Default 1 each.
        Returns:
            Counts before, 0 to 15, int64 (n,), the kind of ``keys``.
        """
        op = "CountFilter.add"
        k = _on_cpu(op, _keys.keys(op, keys, 1))
        c = _keys.counts(op, counts, k)
        old = arrays.empty(k, (k.shape[0],), "int64")
        self._native.add(k.shape[0], k, c, old)
        return old

    def counts(self, keys: Any) -> Any:
        """Return what each key has, 0 to 15, int64 (n,), and change nothing."""
        op = "CountFilter.counts"
        k = _on_cpu(op, _keys.keys(op, keys, 1))
        out = arrays.empty(k, (k.shape[0],), "int64")
        self._native.count(k.shape[0], k, out)
        return out

    def admits(self, keys: Any, counts: Any = None, *, step: int = 0) -> Any:
        """Add sightings; return which keys are let in, as ``frequency_admission_filter`` does. ``step`` is unused."""
        return frequency_admission_filter(self, keys, counts)

    def clear(self) -> None:
        """Forget everything."""
        self._native.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the threshold: numbers, ``elements`` (S,) int64 and ``cells`` (S, cells) uint16."""
        cells = np.empty((self.splits, self._native.cells_per_split), np.uint16)
        head, advances, failures, elements = self._native.save(_as_bytes(cells))
        return {
            "version": STATE_VERSION,
            "capacity": self.capacity,
            "splits": self.splits,
            "head": head,
            "advances": advances,
            "failures": failures,
            "elements": np.array(elements, np.int64),
            "cells": cells,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` of a filter of the same capacity and splits returned.

        Raises:
            ValueError: another version, capacity or number of splits, or parts that are missing or damaged. Nothing is
                changed then.
        """
        op = "CountFilter.load_state_dict"
        wanted = {"version": STATE_VERSION, "capacity": self.capacity, "splits": self.splits}
        numbers = ("head", "advances", "failures")
        check.entries(op, state, (*wanted, *numbers, "elements", "cells"))
        for name, value in wanted.items():
            if state[name] != value:
                raise ValueError(
                    f"[{op}] state: expected {name} {value}, got {state[name]}. Make a filter like the one saved."
                )
        cells = np.asarray(state["cells"])
        elements = np.asarray(state["elements"])
        shape = (self.splits, self._native.cells_per_split)
        for name, array, dtype, size in (
            ("cells", cells, np.uint16, shape),
            ("elements", elements, np.int64, (self.splits,)),
        ):
            if array.dtype != dtype or array.shape != size:
                raise ValueError(
                    f"[{op}] state: expected {name} {np.dtype(dtype)} {size}, got {array.dtype} {array.shape}."
                )
        occupied = np.count_nonzero(cells, axis=1)
        if not np.array_equal(occupied, elements):
            raise ValueError(
                f"[{op}] state: expected {occupied.tolist()} elements, as many as cells in use, got "
                f"{elements.tolist()}. The state is damaged."
            )
        head, advances, failures = (
            integer(op, n, state[n], at_least=0, at_most=self.splits - 1 if n == "head" else None)
            for n in numbers
        )
        saved = (head, advances, failures, elements.tolist())
        self._native.load(saved, _as_bytes(np.ascontiguousarray(cells)))

    def __getstate__(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "state": self.state_dict()}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__dict__.update(CountFilter.restored(saved["state"], saved["threshold"]).__dict__)


class ProbabilisticFilter:
    """Admit keys at random, at a rate set by how often they are seen: ``probabilistic_admission_filter`` as an object.

    It has no memory and no state; ``step`` has to differ from call to call, or a key draws the same number again.

    Args:
        threshold: sightings, >= 0; see ``probabilistic_admission_filter``.
        equal: whether batching leaves the rate as it is. Default False.
        seed: of the draws, 0 to 2^64 - 1. Default 0.

    Examples:
        >>> import numpy as np
        >>> chance = ProbabilisticFilter(2.0, seed=1)
        >>> chance.admits(np.arange(6), step=0).tolist()
        [False, False, True, False, True, True]
    """

    def __init__(self, threshold: float, *, equal: bool = False, seed: int = 0) -> None:
        op = "ProbabilisticFilter"
        self.threshold = number(op, "threshold", threshold, at_least=0, below=float("inf"))
        self.equal = bool(equal)
        self.seed = integer(op, "seed", seed, at_least=0, at_most=_MOST)

    def __repr__(self) -> str:
        return f"ProbabilisticFilter({self.threshold}, equal={self.equal}, seed={self.seed})"

    def admits(self, keys: Any, counts: Any = None, *, step: int) -> Any:
        """Return which keys are let in, bool (n,); see ``probabilistic_admission_filter``."""
        return probabilistic_admission_filter(
            keys, counts, threshold=self.threshold, step=step, equal=self.equal, seed=self.seed
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the settings: there is nothing else."""
        return {
            "version": STATE_VERSION,
            "threshold": self.threshold,
            "equal": self.equal,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the settings of another filter."""
        op = "ProbabilisticFilter.load_state_dict"
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"[{op}] state: expected version {STATE_VERSION}, got {state.get('version')}. "
                "Pass what state_dict() returned."
            )
        check.entries(op, state, ("threshold", "equal", "seed"))
        new = ProbabilisticFilter(state["threshold"], equal=state["equal"], seed=state["seed"])
        self.threshold, self.equal, self.seed = new.threshold, new.equal, new.seed


@_words.documented
def frequency_admission_filter(
    counter: CountFilter,
    keys: Array,
    counts: Any = None,
    *,
    threshold: int | None = None,
    impl: Impl = "auto",
) -> Array:
    """Let in the keys that were seen ``threshold`` times before, and count these sightings.

    admitted_i = (threshold = 0) or (count of key i before this sighting >= threshold): a key gets in on its
    (threshold + 1)-th sighting. Sightings are added in order, so a key that stands twice in ``keys`` is seen twice.
    With threshold 0 nothing is counted. Meant for keys that are not in the table yet.

    Args:
        counter: the filter, which is updated.
        threshold: 0 to 15. Default None: that of ``counter``.
        impl: "auto", "cpu" or "reference" (slow: cell by cell in Python). Default "auto".

    Returns:
        bool (n,), the kind of ``keys``.

    Raises:
        ValueError: shapes that differ, negative counts, or a threshold that four bits cannot reach.

    Examples:
        >>> import numpy as np
        >>> counter = CountFilter(1000, 2)
        >>> frequency_admission_filter(counter, np.array([5, 5, 5, 6])).tolist()
        [False, False, True, False]

    Reference:
        Liu et al. 2022, arXiv:2209.07663 (Monolith), section 2.1; the cells and the ring are those of its code.
    """
    op = "frequency_admission_filter"
    check.instance(op, "counter", counter, CountFilter, hint="Use CountFilter(...).")
    k = _keys.keys(op, keys, 1)
    c = _keys.counts(op, counts, k)
    least = counter.threshold
    if threshold is not None:
        least = integer(op, "threshold", threshold, at_least=0, at_most=MAX_COUNT)
    if choose(op, impl, "keys", k) == "reference":
        return _reference.frequency_admission_filter(counter, k, c, threshold=least)
    out = arrays.empty(k, (k.shape[0],), "bool")
    counter._native.admits(k.shape[0], k, c, least, out)
    return out


@_words.documented
def probabilistic_admission_filter(
    keys: Array,
    counts: Any = None,
    *,
    threshold: float,
    step: int,
    equal: bool = False,
    seed: int = 0,
    impl: Impl = "auto",
) -> Array:
    """Let in keys at random, at a rate set by how often they are seen, without remembering anything.

    unequal: admitted_i = u_i * threshold < counts_i, which has probability min(1, counts_i / threshold);
    equal:   admitted_i = u_i < 1 - 0.05^(counts_i / threshold): after ``threshold`` sightings 95% are in, whether they
             came in one batch or in several.
    u_i in [0, 1) is a Philox draw of (seed, key, step) with 53 bits. The same call gives the same answer; a key that
    stands twice in ``keys`` draws once, so add its sightings up first. Meant for keys that are not in the table yet.

    Args:
        counts: sightings of each key in this step, int64 or int32 (n,), >= 0. Default 1 each.
        threshold: >= 0; 0 lets everything in.
        step: number of the step, 0 to 2^64 - 1, another one each time.
        equal: see above. Default False.

    Returns:
        bool (n,), the kind of ``keys``.

    Examples:
        >>> import numpy as np
        >>> probabilistic_admission_filter(np.arange(6), threshold=2.0, step=0, seed=1).tolist()
        [False, False, True, False, True, True]

    Reference:
        Liu et al. 2022, arXiv:2209.07663 (Monolith), section 2.1; the two modes are those of its code.
    """
    op = "probabilistic_admission_filter"
    k = _keys.keys(op, keys, 1)
    c = _keys.counts(op, counts, k)
    t = number(op, "threshold", threshold, at_least=0, below=float("inf"))
    step = integer(op, "step", step, at_least=0, at_most=_MOST)
    seed = integer(op, "seed", seed, at_least=0, at_most=_MOST)
    if choose(op, impl, "keys", k) == "reference":
        return _reference.probabilistic_admission_filter(
            k, c, threshold=t, step=step, equal=equal, seed=seed
        )
    out = arrays.empty(k, (k.shape[0],), "bool")
    native.core.table.probabilistic(k.shape[0], seed, k, step, c, t, bool(equal), out)
    return out


def _on_cpu(op: str, keys: Any) -> Any:
    if arrays.device(keys) != "cpu":
        raise NotImplementedError(
            f"[{op}] keys: expected device cpu, got {arrays.device(keys)}. Move them first."
        )
    return keys


def _as_bytes(cells: np.ndarray) -> np.ndarray:
    return cells.view(np.uint8).reshape(*cells.shape, 2)
