"""Fixtures of the rooms that take NumPy arrays: poisoned outputs, and whatever a test forces is undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hotloop.front import arrays, native

CORE = native.core
LEVELS = tuple(name for name, runs in CORE.simd_levels().items() if runs)


@pytest.fixture(autouse=True)
def poisoned_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that are not written hold NaN, the largest integer or True."""
    real = arrays.empty

    def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        out = real(like, shape, dtype)
        if isinstance(out, np.ndarray):
            floating = np.issubdtype(out.dtype, np.floating)
            poison = np.nan if floating else True if out.dtype == bool else np.iinfo(out.dtype).max
            out.fill(poison)
        return out

    monkeypatch.setattr(arrays, "empty", empty)


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HOTLOOP_CHECK", raising=False)
    threads = torch.get_num_threads()
    yield
    CORE.force_simd_level("auto")
    torch.set_num_threads(threads)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    """Every instruction set that is compiled in and runs here, forced in turn."""
    CORE.force_simd_level(request.param)
    return str(request.param)
