# SPDX-License-Identifier: Apache-2.0
"""What the verbs of a ``Table`` return and raise."""

from __future__ import annotations

from typing import Any, NamedTuple

NO_ROW = -1
"""The row number that means "no row". Row numbers are uint32 kept in int32 arrays: the largest reads as -1."""


class Found(NamedTuple):
    """values (n, dim), and which keys were there (n,) bool."""

    values: Any
    found: Any


class Evicted(NamedTuple):
    """Rows that had to leave and pairs that were refused, as it happened: keys (m,), values (m, dim), scores (m,)."""

    keys: Any
    values: Any
    scores: Any


class Rows(NamedTuple):
    """Rows of a table: keys (m,), values (m, dim), state (m, s) float32, scores (m,), last_use (m,) in seconds."""

    keys: Any
    values: Any
    state: Any
    scores: Any
    last_use: Any


class TableFullError(RuntimeError):
    """A table with a bound and no eviction strategy has no room for a batch.

    Nothing was written, and a ``CountFilter`` has not seen the batch; a ``ProbabilisticFilter`` draws anew next time.
    Only where other threads erase keys of the batch and fill their room meanwhile may it show after some rows were
    written; those stay.
    """
