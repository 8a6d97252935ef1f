# SPDX-License-Identifier: Apache-2.0
"""Fixtures that folders put into their conftest: numbers of threads, instruction sets, environment variables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hotloop.front import native
from hotloop.front.environment import VARIABLES

CORE = native.core
LEVELS = tuple(name for name, runs in CORE.simd_levels().items() if runs)


def threads(count: int, scope: Any = "function") -> Any:
    """A fixture under which torch runs on this many threads: small inputs wait longer for others than they gain."""

    @pytest.fixture(autouse=True, scope=scope)
    def limited() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        yield
        torch.set_num_threads(before)

    return limited


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test forces, the next one finds as it was."""
    monkeypatch.delenv("HOTLOOP_CHECK", raising=False)
    before = torch.get_num_threads()
    yield
    CORE.force_simd_level("auto")
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No environment variable but those a test sets."""
    for name in VARIABLES:
        if name != "HOTLOOP_SIMD":
            monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    """Every instruction set that is compiled in and runs here, forced in turn."""
    CORE.force_simd_level(request.param)
    return str(request.param)
