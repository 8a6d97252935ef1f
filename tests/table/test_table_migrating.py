# SPDX-License-Identifier: Apache-2.0
"""Every row of "Coming from" in docs/table.md, against the library itself or its documented rule."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hotloop.table import (
    Adam,
    CountFilter,
    HashEmbeddingBag,
    Normal,
    ProbabilisticFilter,
    RowwiseAdagrad,
    Table,
)
from torch import Tensor, nn

pytestmark = pytest.mark.source
PAGE = Path(__file__).resolve().parents[2] / "docs" / "table.md"
DIM = 3
CHECKS: dict[str, Callable[[], None]] = {}


def row(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS[name] = check
        return check

    return add


def keys(*found: int) -> np.ndarray:
    return np.array(found, np.int64)


def of(*found: float) -> np.ndarray:
    return np.repeat(np.array(found, np.float32)[:, None], DIM, 1)


@row("`nn.EmbeddingBag`")
def _() -> None:
    """A step with every row in it is SparseAdam's; a row that was away counts its own steps, theirs all of them."""

    def run(batches: list[list[int]]) -> tuple[Tensor, Tensor]:
        ours = HashEmbeddingBag(
            DIM, mode="sum", optimizer=Adam(lr=0.1, eps_mode="tensorflow"), initializer=Normal()
        ).train()
        every = torch.arange(4)
        ours.table.find_or_insert(every)
        theirs = nn.EmbeddingBag(4, DIM, mode="sum", sparse=True)
        with torch.no_grad():
            theirs.weight.copy_(ours.table.find(every).values)
        optimizer = torch.optim.SparseAdam(theirs.parameters(), lr=0.1)
        for batch in batches:
            ids, offsets = torch.tensor(batch), torch.tensor([0, 1])
            for module in (ours, theirs):
                optimizer.zero_grad()
                module(ids, offsets).square().sum().backward()
            optimizer.step()
        return ours.table.find(every).values, theirs.weight.detach()

    full = run([[0, 1, 2, 3], [3, 2, 1, 0, 0]] * 3)
    torch.testing.assert_close(*full, rtol=1e-4, atol=1e-6)
    # Row 3 comes for the first time in the third step: its first step here, so of size lr; the third there.
    ours, theirs = run([[0, 1], [1, 2], [0, 3]])
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours[3], theirs[3], rtol=1e-2)


@row("HierarchicalKV")
def _() -> None:
    """find_or_insert fills what is new; accum_or_assign adds where found, else assigns; LRU: the oldest use leaves."""
    table = Table(DIM, max_capacity=4, evict_strategy="lru")
    model: dict[int, float] = {}
    used: dict[int, int] = {}
    for tick, key in enumerate([1, 2, 3, 1, 4, 2]):
        table.insert_or_assign(keys(key), of(10 * key))
        model[key], used[key] = 10 * key, tick
    found = table.find_or_insert(keys(1, 4)).values
    np.testing.assert_array_equal(found, of(10, 40))
    used |= {1: 6, 4: 6}
    table.accum_or_assign(keys(2), of(5.0), np.array([True]))
    model[2], used[2] = model[2] + 5, 7
    gone = min(used, key=lambda k: (used[k], k))
    out = table.insert_and_evict(keys(9), of(90))
    assert list(out.keys) == [gone] == [3]
    del model[gone]
    model[9] = 90
    there = table.export()
    assert dict(zip(there.keys.tolist(), there.values[:, 0].tolist(), strict=True)) == model
    # No key is reserved; theirs keeps the largest ones for itself.
    for key in (-1, -2, -(2**63), 2**63 - 1, 0):
        table.insert_or_assign(keys(key), of(1))
        assert table.contains(keys(key)).all()


@row("Monolith")
def _() -> None:
    """A key gets a row after n sightings, or with probability 1 / n at each; rows without use expire."""
    table = Table(DIM, admission=CountFilter(1000, threshold=3), track="use")
    for sighting in range(1, 6):
        table.find_or_insert(keys(7), time=10 * sighting)
        assert bool(table.contains(keys(7))[0]) == (sighting > 3)
    table.insert_or_assign(keys(8), of(1), time=15)
    assert table.expire(20) == 1
    assert table.contains(keys(7, 8)).tolist() == [True, False]
    n = 20_000
    admitted = Table(DIM, admission=ProbabilisticFilter(4.0))
    admitted.find_or_insert(np.arange(n))
    assert abs(len(admitted) / n - 0.25) < 5 * (0.25 * 0.75 / n) ** 0.5


@row("FBGEMM")
def _() -> None:
    """Exact row-wise Adagrad: one sum of squares per row, of the mean over the row of the summed gradient."""
    lr, eps, rows_of = 0.1, 1e-8, torch.arange(5)
    ids, offsets = torch.tensor([0, 1, 1, 4, 2]), torch.tensor([0, 3])
    upstream = torch.tensor([[1.0, -2, 3], [0.5, 0, 1]])
    bags = HashEmbeddingBag(
        DIM, mode="sum", optimizer=RowwiseAdagrad(lr=lr, eps=eps), initializer=Normal()
    ).train()
    bags.table.find_or_insert(rows_of)
    weight = bags.table.find(rows_of).values.clone()
    state = torch.zeros(5)
    for _ in range(3):
        bags(ids, offsets).backward(upstream)
        gradient = torch.zeros(5, DIM)
        gradient.index_add_(0, ids, upstream[torch.tensor([0, 0, 0, 1, 1])])
        state += gradient.square().mean(1)
        touched = gradient.abs().sum(1) > 0
        step = lr * gradient / (state.sqrt() + eps).unsqueeze(1)
        weight = torch.where(touched.unsqueeze(1), weight - step, weight)
    torch.testing.assert_close(bags.table.find(rows_of).values, weight, rtol=1e-5, atol=1e-6)


def titles() -> list[str]:
    text = PAGE.read_text(encoding="utf-8").split("## Coming from")[1].split("\n## ")[0]
    return [t for t in re.findall(r"^\| (.*?) \| ", text, re.M) if t != "there"]


def test_every_row_of_the_page_has_its_check() -> None:
    assert len(titles()) == len(CHECKS)
    for name in CHECKS:
        assert sum(name.strip("`") in title for title in titles()) == 1, name


@pytest.mark.parametrize("name", CHECKS)
def test_row(name: str) -> None:
    CHECKS[name]()


@pytest.mark.peer
def test_fbgemm_itself() -> None:
    """Its own kernel, where it is installed (`make rivals`)."""
    training = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    configs = pytest.importorskip("fbgemm_gpu.split_embedding_configs")
    bags = HashEmbeddingBag(
        DIM + 1, mode="sum", optimizer=RowwiseAdagrad(lr=0.1, eps=1e-8), initializer=Normal()
    ).train()
    every = torch.arange(6)
    bags.table.find_or_insert(every)
    theirs = training.SplitTableBatchedEmbeddingBagsCodegen(
        [(6, DIM + 1, common.EmbeddingLocation.HOST, training.ComputeDevice.CPU)],
        optimizer=configs.EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.1, eps=1e-8,
    )  # fmt: skip
    theirs.split_embedding_weights()[0].copy_(bags.table.find(every).values)
    ids, offsets = torch.tensor([0, 1, 1, 5]), torch.tensor([0, 3, 4])
    for _ in range(3):
        bags(ids, offsets[:-1]).square().sum().backward()
        theirs(ids, offsets).square().sum().backward()
    torch.testing.assert_close(
        bags.table.find(every).values, theirs.split_embedding_weights()[0], rtol=1e-5, atol=1e-6
    )
