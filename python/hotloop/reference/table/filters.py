# SPDX-License-Identifier: Apache-2.0
"""The two filters in NumPy and plain Python, cell by cell and draw by draw."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...front import arrays
from ..core import philox
from .hashing import bucket_of, mix64

MAX_COUNT = 15


class Cells:
    """The cells of a ``CountFilter``, from its ``state_dict``."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = dict(state, cells=state["cells"].copy(), elements=state["elements"].copy())
        self.splits, capacity = state["splits"], state["capacity"]
        single = self.splits == 1
        self.split_capacity = capacity if single else -(-capacity // (self.splits - 1))
        self.total = self.split_capacity + self.split_capacity // (2 if single else 5)
        self.steps = 32 if single else 16

    def find(self, split: int, start: int, signature: int) -> int | None:
        """The first cell of the probe that is free or has this signature."""
        for at in range(start, start + self.steps):
            cell = int(self.state["cells"][split, at])
            if cell == 0 or cell >> 4 == signature:
                return at
        return None

    def add(self, key: int, count: int) -> int:
        s = self.state
        h = mix64(np.array([key], np.int64).view(np.uint64))
        start, signature = int(bucket_of(h, self.total)[0]), int(h[0]) & 0xFFF
        head = s["head"]
        for split in [head] if self.splits == 1 else [head, (head + 1) % self.splits]:
            at = self.find(split, start, signature)
            if at is not None:
                break
        if at is None:
            s["failures"] += count > 0
            return MAX_COUNT
        old = int(s["cells"][split, at]) & MAX_COUNT
        if s["cells"][split, at] == 0 and self.splits > 1:
            for back in range(1, 1 + min(s["advances"], self.splits - 2)):
                older = (head - back) % self.splits
                found = self.find(older, start, signature)
                if found is not None and s["cells"][older, found] != 0:
                    old = int(s["cells"][older, found]) & MAX_COUNT
                    break
        if count == 0:
            return old
        s["elements"][split] += s["cells"][split, at] == 0
        s["cells"][split, at] = (signature << 4) | min(old + count, MAX_COUNT)
        if self.splits > 1 and s["elements"][head] >= self.split_capacity - 1:
            s["head"], s["advances"] = (head + 1) % self.splits, s["advances"] + 1
            cleared = (head + 2) % self.splits
            s["cells"][cleared], s["elements"][cleared] = 0, 0
        return old


def frequency_admission_filter(
    counter: Any, keys: Any, counts: Any = None, *, threshold: int | None = None
) -> Any:
    k = arrays.to_numpy(keys)
    c = np.ones(len(k), np.int64) if counts is None else arrays.to_numpy(counts)
    least = counter.threshold if threshold is None else threshold
    admitted = np.ones(len(k), bool)
    if least > 0:
        cells = Cells(counter.state_dict())
        admitted[:] = [cells.add(int(x), int(n)) >= least for x, n in zip(k, c)]
        counter.load_state_dict(cells.state)
    return arrays.from_numpy(admitted, keys)


def probabilistic_admission_filter(
    keys: Any,
    counts: Any = None,
    *,
    threshold: float,
    step: int,
    equal: bool = False,
    seed: int = 0,
) -> Any:
    k = arrays.to_numpy(keys)
    c = np.ones(len(k), np.int64) if counts is None else arrays.to_numpy(counts)
    admitted = np.ones(len(k), bool)
    for i in range(len(k) if threshold > 0 else 0):
        first, second = (
            int(w) for w in philox(seed, 1, offset=step, first_item=int(k[i]) % 2**64)[0, :2]
        )
        u = (((first << 32) | second) >> 11) * 2.0**-53
        if equal:
            admitted[i] = u < 1.0 - math.pow(0.05, int(c[i]) / threshold)
        else:
            admitted[i] = u * threshold < int(c[i])
    return arrays.from_numpy(admitted, keys)
