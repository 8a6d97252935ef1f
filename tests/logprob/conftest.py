# SPDX-License-Identifier: Apache-2.0
"""One thread for small inputs, and no environment variable but those a test sets."""

from __future__ import annotations

import pytest
import torch  # noqa: F401  torch.compile looks it up in the module that is called conftest
from fixtures import plain_environment, threads  # noqa: F401

single_thread = threads(1)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 512 columns, so that a vocabulary of a thousand takes several."""
    monkeypatch.setattr("hotloop.logprob._cpu._TILE_BYTES", 1)
