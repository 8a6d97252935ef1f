# SPDX-License-Identifier: Apache-2.0
"""Groups of every form, for the tests of segment reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hotloop import core
from hotloop.reference import core as reference
from torch import Tensor

NAMES = ("sum", "mean", "max", "min", "logsumexp")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Of a result in float32, and of a gradient rounded to the dtype.
TOLERANCE = {
    torch.float32: (2e-6, 2e-6),
    torch.float64: (1e-13, 1e-13),
    torch.float16: (2e-6, 2e-3),
    torch.bfloat16: (2e-6, 1e-2),
}


def ours(name: str) -> Callable[..., Any]:
    return getattr(core, f"segment_{name}")  # type: ignore[no-any-return]


def theirs(name: str) -> Callable[..., Any]:
    return getattr(reference, f"segment_{name}")  # type: ignore[no-any-return]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def offsets_of(n: int, segments: int, seed: int = 0) -> Tensor:
    """Ragged, some of them empty, among them the first and the last."""
    cuts = torch.randint(0, n + 1, (segments - 1,), generator=generator(seed)).sort().values
    cuts[0], cuts[-1] = 0, n
    return torch.cat((torch.zeros(1, dtype=torch.int64), cuts, torch.full((1,), n)))


def ways(n: int, segments: int) -> dict[str, dict[str, Any]]:
    g = generator(n)
    ids = torch.randint(0, segments, (n,), generator=g)
    mask = torch.rand(n, generator=g) > 0.3
    offsets = offsets_of(n, segments)
    by_id: dict[str, Any] = {"num_segments": segments}
    return {
        "offsets": {"cu_seqlens": offsets},
        "offsets, mask": {"cu_seqlens": offsets.int(), "mask": mask},
        "ids": by_id | {"segment_ids": ids},
        "ids, mask": by_id | {"segment_ids": ids.int(), "mask": mask.long()},
    }


WAYS = tuple(ways(3, 3))
