# SPDX-License-Identifier: Apache-2.0
"""Keys that look random, the values or rows they have, and ids that are asked for.

What is stored is the same for every input set of a case, and so is what each contender built of
it: only the ids change. A ``World`` holds both, and the next case's takes its place.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._case import Inputs, Roof

T = TypeVar("T")

ZIPF = 1.05
_LINE = 64


@dataclass
class World:
    """``keys`` (n,) distinct int64, ``values`` (n, dim) float32."""

    keys: Tensor
    values: Tensor
    slots: int
    """Slots that hold the keys at the load that is measured."""
    absent: Tensor
    """As many keys that are not stored."""
    built: dict[str, Any] = field(default_factory=dict)
    """What a contender made of it, by name."""


@lru_cache(maxsize=1)
def world(n: int, slots: int, dim: int, case: str = "") -> World:
    """``case`` keeps apart what cases of the same size build: contenders that train change it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(n, dim, generator=generator)
    return World(keys_of(0, n), values, slots, keys_of(n, 2 * n))


def keys_of(begin: int, end: int) -> Tensor:
    """The numbers of a range mixed to 64 bits, one to one (the finaliser of SplitMix64)."""
    z = np.arange(begin, end, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((z ^ (z >> np.uint64(31))).view(np.int64))


def built(x: Inputs, name: str, build: Callable[[World], T]) -> T:
    """What ``build`` makes of the world, made once; the judge starts afresh with ``fresh``."""
    made: dict[str, T] = x["built"]
    if name not in made:
        made[name] = build(x["world"])
    return made[name]


def fresh(x: Inputs) -> Inputs:
    """The same inputs for a contender that has built nothing yet."""
    return Inputs({**x.tensors, "built": {}}, x.wrt)


def lookups(seed: int, stored: World, queries: int, hits: float) -> Inputs:
    """``ids`` (q,), a share of which is stored, and the ``index`` of each, -1 for none."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(stored.keys), (queries,), generator=generator)
    ids = stored.keys[index]
    missing = torch.rand(queries, generator=generator) >= hits
    ids[missing] = stored.absent[index[missing]]
    index[missing] = -1
    return Inputs({"world": stored, "built": stored.built, "ids": ids, "index": index}, ())


def bags(seed: int, stored: World, batch: int, length: int, law: str) -> Inputs:
    """``batch`` bags of ``length`` ids each: ``dense`` are rows, ``ids`` their keys.

    "zipf" draws row number r with a probability as r^-1.05; which row has which number is random.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, count = len(stored.keys), batch * length
    if law == "zipf":
        sums = torch.arange(1, rows + 1, dtype=torch.float64).pow_(-ZIPF).cumsum(0)
        drawn = torch.rand(count, generator=generator, dtype=torch.float64) * sums[-1]
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        dense = order[torch.searchsorted(sums, drawn).clamp(max=rows - 1)]
    else:
        dense = torch.randint(rows, (count,), generator=generator)
    dim = stored.values.shape[1]
    return Inputs(
        {
            "world": stored,
            "built": stored.built,
            "dense": dense,
            "ids": stored.keys[dense],
            "offsets": torch.arange(0, count, length),
            "ends": torch.arange(0, count + 1, length),
            "upstream": torch.randn(batch, dim, generator=generator),
        },
        (),
    )


def gather_roof(count: int, nbytes: int, dim: int) -> Roof:
    """Reads ``count`` random rows of ``dim`` float32 out of ``nbytes`` in plain torch.

    They lie in huge pages where the system has them, as ours do: in small ones the translation of addresses
    is what is measured, and no roof.
    """

    def allocate() -> Callable[[], object]:
        rows = max(nbytes // (4 * dim), 1)
        memory = mmap.mmap(-1, 4 * rows * dim)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        table = torch.frombuffer(memory, dtype=torch.float32).view(rows, dim).fill_(1)
        index = torch.randint(len(table), (count,))
        # Into one buffer: a fresh one would cost a page fault for every few rows.
        out = torch.empty(count, dim)
        return lambda: torch.index_select(table, 0, index, out=out)

    return allocate


def line_roof(count: int, nbytes: int) -> Roof:
    """Reads as many random cache lines."""
    return gather_roof(count, nbytes, _LINE // 4)
