# SPDX-License-Identifier: Apache-2.0
"""One rank of the sharded example of docs/table.md, run as a program.

``python table_shards.py PAGE DIRECTORY RANK WORLD`` trains three steps and writes what it saw and owns.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from hotloop.table import SGD, Constant
from torch import nn

DIM, BAGS, STEPS = 4, 5, 3


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bags of 0 to 6 ids, many of them on both ranks; one rank's second batch has none at all."""
    rng = np.random.default_rng(10 * step + rank)
    lengths = rng.integers(0, 7, BAGS) * (0 if (step, rank) == (1, 1) else 1)
    ids = torch.from_numpy(rng.integers(-20, 20, lengths.sum()))
    return ids, torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))


def head() -> nn.Linear:
    layer = nn.Linear(DIM, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(2 * DIM).reshape(2, DIM) / 4 - 1)
    return layer


def rows_start() -> dict:
    # Halves and quarters: every sum is exact in float32, in any order, so that results must be equal.
    return {"optimizer": SGD(lr=0.25), "initializer": Constant(0.5)}


def loss_of(out: torch.Tensor, step: int, rank: int, world: int) -> torch.Tensor:
    """Times the number of ranks, so that the mean over them is exact too."""
    out = out * world
    return (out * (torch.arange(out.numel()).reshape(out.shape) % 5 - 1 + step + rank)).sum()


def main(page: str, directory: str, rank: int, world: int) -> None:
    method = f"file://{directory}/meet"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world)
    blocks = re.findall(r"```python\n(.*?)```", Path(page).read_text(encoding="utf-8"), re.S)
    (block,) = [block for block in blocks if "class ShardedBag" in block]
    names: dict = {}
    exec(compile(block.split("\n# One process here")[0], page, "exec"), names)
    bags = names["ShardedBag"](DIM, dist.new_group(), **rows_start())
    dense = nn.parallel.DistributedDataParallel(head())
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.25)
    outs = []
    for step in range(STEPS):
        optimizer.zero_grad()
        pooled = bags(*batch(step, rank))
        loss_of(dense(pooled), step, rank, world).backward()
        optimizer.step()
        outs.append(pooled.detach().numpy())
    rows = bags.mine.table.export()
    np.savez(
        f"{directory}/{rank}.npz",
        keys=rows.keys,
        values=rows.values,
        outs=np.stack(outs),
        weight=dense.module.weight.detach().numpy(),
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
