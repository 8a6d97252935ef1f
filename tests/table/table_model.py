# SPDX-License-Identifier: Apache-2.0
"""A table with a bound as a dict: who leaves, and who is not let in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Model:
    """Known keys of a batch first, then unknown ones, in order; of equal scores the lower unsigned key leaves."""

    def __init__(self, strategy: str, bound: int | None) -> None:
        self.strategy, self.bound = strategy, bound
        self.tick = 0
        self.rows: dict[int, Any] = {}
        self.score: dict[int, int] = {}
        self.refused = 0

    def next_score(self, key: int, given: int, epoch: int = 0, *, fresh: bool = False) -> int:
        before = 0 if fresh else self.score[key]
        return {
            "none": 0,
            "lru": self.tick,
            "lfu": before + given,
            "epoch_lru": (epoch << 32) | self.tick,
            "epoch_lfu": (epoch << 32) | min((before & 0xFFFFFFFF) + given, 0xFFFFFFFF),
            "custom": given,
        }[self.strategy]

    def upsert(
        self,
        keys: list[int],
        row: Callable[[int, Any], Any],
        scores: list[int] | None = None,
        epoch: int = 0,
    ) -> list[tuple[int, Any, int]]:
        """``row(i, before)`` is what the key at i holds then; gives back (key, row, score) of all who left."""
        self.tick += 1
        gone = []
        known = [i for i, key in enumerate(keys) if key in self.rows]
        unknown = [i for i, key in enumerate(keys) if key not in self.rows]
        for i in known + unknown:
            key, given = keys[i], 1 if scores is None else scores[i]
            fresh = key not in self.rows
            score = self.next_score(key, given, epoch, fresh=fresh)
            new = row(i, self.rows.get(key))
            if fresh and len(self.rows) == self.bound:
                lowest = min(self.rows, key=lambda k: (self.score[k], k % 2**64))
                if self.strategy != "lfu" and score < self.score[lowest]:
                    self.refused += 1
                    gone.append((key, new, score))
                    continue
                gone.append((lowest, self.rows.pop(lowest), self.score.pop(lowest)))
            self.rows[key], self.score[key] = new, score
        return gone
