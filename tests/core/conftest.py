"""Whatever a test forces, the next one finds as it was."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from hotloop.front import native as _native

CORE = _native.core
LEVELS = tuple(name for name, runs in CORE.simd_levels().items() if runs)


@pytest.fixture(autouse=True)
def unforced() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    CORE.force_simd_level("auto")
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def native() -> ModuleType:
    return CORE


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, native: ModuleType) -> str:
    """Every instruction set that is compiled in and runs here, forced in turn."""
    native.force_simd_level(request.param)
    return str(request.param)
