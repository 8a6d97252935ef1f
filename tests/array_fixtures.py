# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the rooms that take NumPy arrays: poisoned outputs, and whatever a test forces is undone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from fixtures import LEVELS, level, unforced
from hotloop.front import arrays

__all__ = ["LEVELS", "level", "poisoned_arrays", "unforced"]


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
