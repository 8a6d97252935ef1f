"""The benches of this room under pytest-benchmark; contenders come from ``bench/conftest.py``."""

from __future__ import annotations

from collections.abc import Callable


def test_contender(turn: Callable[[], object]) -> None:
    turn()
