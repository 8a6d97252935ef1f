# SPDX-License-Identifier: Apache-2.0
"""The sharded example of docs/table.md in several processes: what one process with the whole batch would give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hotloop.table import HashEmbeddingBag, salted_hash_bucket
from table_shards import DIM, STEPS, batch, head, loss_of, rows_start

HERE = Path(__file__).resolve()
PAGE = HERE.parents[2] / "docs" / "table.md"

pytestmark = [
    pytest.mark.source,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch without gloo"),
]


def alone(world: int) -> tuple[list[np.ndarray], dict, np.ndarray]:
    """One table, one head; the loss is the mean of the ranks' losses, as DDP has it."""
    bags = HashEmbeddingBag(DIM, mode="sum", include_last_offset=True, **rows_start())
    dense = head()
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.25)
    outs = []
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = [batch(step, rank) for rank in range(world)]
        starts = np.cumsum([0, *(len(ids) for ids, _ in parts)])
        ends = [offsets[1:] + int(start) for (_, offsets), start in zip(parts, starts)]
        pooled = bags(
            torch.cat([ids for ids, _ in parts]), torch.cat([torch.zeros(1).long(), *ends])
        )
        out = dense(pooled).chunk(world)
        losses = [loss_of(part, step, rank, world) for rank, part in enumerate(out)]
        (sum(losses) / world).backward()
        optimizer.step()
        outs.append(pooled.detach().numpy())
    rows = bags.table.export()
    values = dict(zip(rows.keys.tolist(), rows.values.tolist()))
    return outs, values, dense.weight.detach().numpy()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_that_share_a_table_train_it_as_one_would(tmp_path, world):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                str(HERE.with_name("table_shards.py")),
                str(PAGE),
                str(tmp_path),
                str(rank),
                str(world),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=200)[0] for rank in ranks]  # 5 seconds on an idle machine
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)
    found = [np.load(tmp_path / f"{rank}.npz") for rank in range(world)]
    outs, values, weight = alone(world)
    for rank, part in enumerate(found):
        assert len(part["keys"]) > 3
        assert (salted_hash_bucket(part["keys"], world) == rank).all()
        np.testing.assert_array_equal(part["weight"], weight)
        for step in range(STEPS):
            np.testing.assert_array_equal(part["outs"][step], np.split(outs[step], world)[rank])
    keys = [key for part in found for key in part["keys"].tolist()]
    assert sorted(keys) == sorted(values)  # each once, with its owner
    for part in found:
        for key, row in zip(part["keys"].tolist(), part["values"].tolist()):
            assert row == values[key], key
    assert len({tuple(row) for row in values.values()}) > 10  # they moved, each its own way
