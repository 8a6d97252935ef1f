# SPDX-License-Identifier: Apache-2.0
"""The benches of all rooms under pytest-benchmark, a room by `-k preference`; contenders come from conftest.py."""

from __future__ import annotations

from collections.abc import Callable


def test_contender(turn: Callable[[], object]) -> None:
    turn()
