"""One thread for small inputs, and no environment variable but those a test sets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hotloop.front.environment import VARIABLES


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        if name != "HOTLOOP_SIMD":
            monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 512 columns, so that a vocabulary of a thousand takes several."""
    monkeypatch.setattr("hotloop.logprob._cpu._TILE_BYTES", 1)
