# SPDX-License-Identifier: Apache-2.0
"""Plain copies, reads and products of the size of a case: what no op can be far below."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._case import Roof


def copy(nbytes: int, device: str) -> Roof:
    """Reads half the bytes and writes the other half."""

    def allocate() -> Callable[[], object]:
        source, to = (torch.ones(nbytes // 8, device=device) for _ in range(2))
        return lambda: to.copy_(source)

    return allocate


def read(nbytes: int, device: str) -> Roof:
    """A plain sum that reads as many bytes."""

    def allocate() -> Callable[[], object]:
        source = torch.ones(max(nbytes // 4, 1), device=device)
        return source.sum

    return allocate


def product(n: int, width: int, vocabulary: int, dtype: str, device: str) -> Roof:
    """A plain torch.mm of the forward's shape."""

    def allocate() -> Callable[[], object]:
        like = {"dtype": getattr(torch, dtype), "device": device}
        a, b = torch.randn(n, width, **like), torch.randn(vocabulary, width, **like)
        out = torch.zeros(n, vocabulary, **like)
        return lambda: torch.mm(a, b.T, out=out)

    return allocate
