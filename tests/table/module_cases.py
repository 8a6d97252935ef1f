# SPDX-License-Identifier: Apache-2.0
"""What the tests of the hash modules share: ids of every kind, and a dense module with the same rows."""

from __future__ import annotations

import torch
from hotloop.table import SGD, Adagrad, Adam
from hotloop.table.modules import HashEmbedding, HashEmbeddingBag
from torch import Tensor, nn

DIM = 5
# Of both signs, the extremes, neighbours of 2^32, and 0: nothing is reserved.
UNIVERSE = torch.tensor(
    [-(2**63), -(2**40), -7, -1, 0, 1, 5, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1]
)
PAD = 5
RULES = {
    "sgd": (SGD(lr=0.3), lambda p: torch.optim.SGD(p, lr=0.3)),
    "adagrad": (Adagrad(lr=0.3), lambda p: torch.optim.Adagrad(p, lr=0.3)),
    "adam": (Adam(lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1)),
    "adamw": (
        Adam(lr=0.1, weight_decay=0.2, weight_decay_mode="decoupled"),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    ),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(n: int, seed: int = 0) -> Tensor:
    return UNIVERSE[torch.randint(len(UNIVERSE), (n,), generator=seeded(seed))]


def dense_ids(ids: Tensor) -> Tensor:
    return torch.searchsorted(UNIVERSE, ids.long())


def rows_of(module: nn.Module, ids: Tensor = UNIVERSE) -> Tensor:
    return module.table.find(ids).values.clone()


def filled(module: nn.Module) -> nn.Module:
    """A row for every id of the universe."""
    module.table.find_or_insert(UNIVERSE)
    return module


def dense_like(module: nn.Module, dtype: torch.dtype, **settings: object) -> nn.Module:
    kind = nn.EmbeddingBag if isinstance(module, HashEmbeddingBag) else nn.Embedding
    made = kind(len(UNIVERSE), DIM, dtype=dtype, **settings)
    with torch.no_grad():
        made.weight.copy_(rows_of(module))
    return made


def target(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, DIM, generator=seeded(9)).to(dtype)


def bags(n: int, sizes: list[int]) -> Tensor:
    assert sum(sizes) == n
    return torch.tensor([0, *sizes]).cumsum(0)[:-1]


def pair(rule: str, **settings: object) -> tuple[nn.Module, dict]:
    """A filled module, and dense ones in float32 and float64 with torch's optimizer."""
    module = filled(HashEmbedding(DIM, optimizer=RULES[rule][0], **settings))
    dense = {}
    for dtype in (torch.float32, torch.float64):
        made = dense_like(module, dtype)
        dense[dtype] = made, RULES[rule][1](made.parameters())
    return module, dense
