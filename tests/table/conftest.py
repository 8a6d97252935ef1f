"""Poisoned outputs for NumPy too, and whatever a test forces is undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hotloop import _arrays


@pytest.fixture(autouse=True)
def poisoned_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that are not written hold NaN, the largest integer or True."""
    real = _arrays.empty

    def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
        out = real(like, shape, dtype)
        if isinstance(out, np.ndarray):
            floating = np.issubdtype(out.dtype, np.floating)
            poison = np.nan if floating else True if out.dtype == bool else np.iinfo(out.dtype).max
            out.fill(poison)
        return out

    monkeypatch.setattr(_arrays, "empty", empty)


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HOTLOOP_CHECK", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
