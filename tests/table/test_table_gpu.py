# SPDX-License-Identifier: Apache-2.0
"""Tables on a CUDA device: the content of the CPU's where nobody is evicted, the laws of buckets where somebody is."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hotloop.front import native
from hotloop.table import (
    FTRL,
    SGD,
    Adagrad,
    Adam,
    CountFilter,
    GroupAdagrad,
    HashEmbedding,
    HashEmbeddingBag,
    Normal,
    ProbabilisticFilter,
    RowwiseAdagrad,
    Table,
    TableFullError,
)
from table_checks import assert_rows, refused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(native.cuda is None, reason="hotloop._cuda is not compiled"),
]

RULES = [
    SGD(lr=0.1),
    RowwiseAdagrad(lr=0.1, weight_decay=0.01),
    Adagrad(lr=0.1),
    Adam(lr=0.1),
    Adam(lr=0.1, rowwise=True, nesterov=True),
    FTRL(l1=0.01),
    FTRL(l1=0.01, group=True),
    GroupAdagrad(l2=0.01),
]
ODD = [0, -1, -(2**63), 2**63 - 1, 1]


def pair(dim: int, **settings: Any) -> tuple[Table, Table]:
    return Table(dim, **settings), Table(dim, device="cuda", **settings)


def draw(generator: torch.Generator, n: int, most: int = 3000) -> torch.Tensor:
    keys = torch.randint(most, (n,), generator=generator) * 0x61C8864680B583EB
    keys[: len(ODD)] = torch.tensor(ODD)[: len(keys)]
    return keys


def assert_same(cpu: Table, gpu: Table, rtol: float = 1e-5) -> None:
    ours, theirs = gpu.export(), cpu.export()
    assert len(gpu) == len(cpu) == len(ours.keys)
    np.testing.assert_array_equal(ours.keys, theirs.keys)
    np.testing.assert_allclose(ours.values, theirs.values, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(ours.state, theirs.state, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(ours.last_use, theirs.last_use)


@pytest.mark.parametrize("dim", [1, 6, 64, 130])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_same_verbs_give_the_same_rows(dim, dtype):
    cpu, gpu = pair(dim, dtype=dtype, initializer=Normal(seed=3), track=("use", "changes"))
    generator = torch.Generator().manual_seed(dim)
    for step in range(40):
        keys = draw(generator, 0 if step == 7 else 1 + step * 11)
        values = torch.randn(len(keys), dim, generator=generator)
        if dtype == "float32":
            values = values.round(decimals=2)
        verb = step % 6
        for table in (cpu, gpu):
            k, v = (keys, values) if table is cpu else (keys.cuda(), values.cuda())
            if verb == 0:
                done = [table.insert_or_assign(k, v, time=step)]
            elif verb == 1:
                done = list(table.find_or_insert(k, time=step))
            elif verb == 2:
                done = [table.assign(k, v, time=step)]
            elif verb == 3:
                mask = table.contains(k)
                done = [table.accum_or_assign(k, v, mask, time=step)]
            elif verb == 4:
                done = [table.erase(k[: len(k) // 3])]
            else:
                done = [*table.find(k), table.contains(k)]
            if table is cpu:
                wanted = done
        for ours, theirs in zip(done, wanted):
            assert ours.is_cuda
            # Half types round after every addition on the CPU, once on the GPU.
            torch.testing.assert_close(
                ours.cpu(), theirs, rtol=1e-2 if dtype != "float32" else 1e-5, atol=1e-2
            )
    assert_same(cpu, gpu, rtol=1e-5 if dtype == "float32" else 2e-2)
    assert gpu.expire(30) == cpu.expire(30) > 0
    assert_same(cpu, gpu, rtol=1e-5 if dtype == "float32" else 2e-2)
    gpu.clear()
    assert len(gpu) == 0 and not gpu.contains(draw(generator, 100).cuda()).any()


def test_first_rows_are_the_same_bits():
    for dtype in ("float32", "float16", "bfloat16"):
        cpu, gpu = pair(37, dtype=dtype, initializer=Normal(seed=9))
        keys = draw(torch.Generator().manual_seed(0), 500)
        ours, theirs = gpu.find_or_insert(keys.cuda()), cpu.find_or_insert(keys)
        assert torch.equal(ours.values.cpu(), theirs.values)
        assert torch.equal(ours.found.cpu(), theirs.found)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_updates_are_those_of_the_cpu(rule, dtype):
    cpu, gpu = pair(48, optimizer=rule, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for n in (1, 200, 5000):
        keys = draw(generator, n, 400)
        keys[n // 2 :] = 77  # a hot id: its run is cut
        grads = torch.randn(n, 48, generator=generator) / n**0.5
        assert gpu.update(keys.cuda(), grads.cuda()) == cpu.update(keys, grads) == 0
    assert_same(cpu, gpu, rtol=1e-3 if dtype == "float32" else 3e-2)


def test_updates_do_not_depend_on_the_run():
    keys = draw(torch.Generator().manual_seed(2), 100_000, 50).cuda()
    grads = torch.randn(100_000, 16, device="cuda")
    found = []
    for _ in range(3):
        table = Table(16, optimizer=Adagrad(lr=0.1), device="cuda")
        table.update(keys, grads)
        found.append(table.export())
    for other in found[1:]:
        assert_rows(other, found[0])


def test_nothing_is_written_where_a_gradient_is_not_finite():
    _, gpu = pair(4, optimizer=SGD())
    grads = torch.ones(2, 4, device="cuda")
    grads[1, 2] = float("nan")
    with refused("[Table.update] grads: expected finite numbers, got nan"):
        gpu.update(torch.tensor([1, 2], device="cuda"), grads)
    assert len(gpu) == 0


def test_a_full_bucket_keeps_its_highest_scores():
    table = Table(2, max_capacity=128, capacity=128, evict_strategy="custom", device="cuda")
    generator = torch.Generator().manual_seed(3)
    scores = torch.randperm(4000, generator=generator) + 1
    for part in scores.split(500):
        table.insert_or_assign(
            part.cuda() * 13, torch.zeros(len(part), 2, device="cuda"), scores=part.cuda()
        )
    rows = table.export()
    assert sorted(rows.scores.tolist()) == list(range(4000 - 127, 4001))
    assert (rows.keys == rows.scores * 13).all()


@pytest.mark.parametrize("strategy", ["lru", "lfu", "epoch_lru", "epoch_lfu", "custom"])
def test_who_is_evicted_is_inserted_less_kept(strategy):
    table = Table(3, max_capacity=5000, evict_strategy=strategy, device="cuda")
    generator = torch.Generator().manual_seed(4)
    held: dict[int, list[float]] = {}
    for step in range(12):
        keys = draw(generator, 2000, 200_000).unique()
        values = torch.randn(len(keys), 3, generator=generator)
        scores = torch.randint(1, 50, (len(keys),), generator=generator).cuda()
        gone = table.insert_and_evict(keys.cuda(), values.cuda(), scores=scores, epoch=step)
        before = dict(held)
        for key, row in zip(keys.tolist(), values.tolist()):
            held[key] = row
        for key, row in zip(gone.keys.tolist(), gone.values.tolist()):
            assert row in (held[key], before.get(key))
        there = set(table.export().keys.tolist())
        assert there <= set(held) and len(there) == len(table) <= 5000
        assert not there & (set(gone.keys.tolist()) - set(keys.tolist()))
        held = {key: row for key, row in held.items() if key in there}
    rows = table.export()
    for key, row in zip(rows.keys.tolist(), rows.values.tolist()):
        assert row == held[key]


def test_a_full_table_says_so_and_writes_nothing():
    table = Table(2, max_capacity=100, device="cuda")
    keys = torch.arange(100, device="cuda")
    table.insert_or_assign(keys, torch.ones(100, 2, device="cuda"))
    with pytest.raises(TableFullError, match="got 100 rows of 100 in use"):
        table.insert_or_assign(keys + 1, torch.zeros(100, 2, device="cuda"))
    assert bool((table.find(keys).values == 1).all()) and len(table) == 100


@pytest.mark.parametrize(("there", "back"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_saved_on_one_and_loaded_on_the_other(tmp_path, there, back):
    table = Table(5, optimizer=Adam(lr=0.1), track=("use", "changes"), device=there)
    keys = draw(torch.Generator().manual_seed(5), 3000).to(there)
    table.update(
        keys, torch.randn(len(keys), 5, generator=torch.Generator().manual_seed(6)).to(there)
    )
    table.save(tmp_path / "snapshot")
    replica = Table.load(tmp_path / "snapshot", device=back)
    assert replica.device.startswith(back)
    assert_rows(replica, table)
    mark = replica._position
    table.erase(keys[:50])
    table.insert_or_assign(keys[40:60], torch.ones(20, 5, device=keys.device))
    delta = table.delta(mark)
    assert replica.apply(delta.to_bytes()) and not replica.apply(delta)
    assert_rows(replica, table)


def test_copies_keep_rows_and_device():
    _, table = pair(3, optimizer=SGD())
    table.find_or_insert(torch.arange(50, device="cuda"))
    for other in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert other.device == table.device
        np.testing.assert_array_equal(other.export().values, table.export().values)
    assert table.quantized().device == "cpu" and table.quantized("float16").device == table.device


@pytest.mark.parametrize(
    "filter_of", [lambda: CountFilter(1000, threshold=2), lambda: ProbabilisticFilter(3.0, seed=4)]
)
def test_filters_let_in_whom_they_let_in_on_the_cpu(filter_of):
    cpu, gpu = Table(2, admission=filter_of()), Table(2, admission=filter_of(), device="cuda")
    generator = torch.Generator().manual_seed(7)
    for _ in range(8):
        keys = draw(generator, 300, 500)
        ours, theirs = gpu.find_or_insert(keys.cuda()), cpu.find_or_insert(keys)
        assert torch.equal(ours.found.cpu(), theirs.found)
        assert torch.equal(ours.values.cpu(), theirs.values)
    assert_same(cpu, gpu)


def modules(kind: Any, *args: Any, **settings: Any) -> tuple[Any, Any]:
    return kind(*args, **settings), kind(*args, device="cuda", **settings)


@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_train_as_on_the_cpu(mode, update):
    cpu, gpu = modules(
        HashEmbeddingBag, 24, mode=mode, optimizer=Adagrad(lr=0.1), update=update, padding_idx=7
    )
    generator = torch.Generator().manual_seed(8)
    for _ in range(4):
        ids = draw(generator, 300, 80)
        offsets = torch.tensor([0, 0, 5, 100, 100, 299])
        weights = torch.rand(300, generator=generator).requires_grad_() if mode == "sum" else None
        there = None if weights is None else weights.detach().cuda().requires_grad_()
        grad = torch.randn(6, 24, generator=generator)
        out, ours = cpu(ids, offsets, weights), gpu(ids.cuda(), offsets.cuda(), there)
        torch.testing.assert_close(ours.cpu(), out)
        out.backward(grad)
        ours.backward(grad.cuda())
        if weights is not None:
            torch.testing.assert_close(there.grad.cpu(), weights.grad, rtol=1e-4, atol=1e-4)
        if update == "step":
            assert gpu.step() == cpu.step() == 0
    assert_same(cpu.table, gpu.table, rtol=1e-4)


def test_embeddings_compile_whole():
    layer = HashEmbedding(8, optimizer=SGD(lr=0.1), device="cuda")
    other = HashEmbedding(8, optimizer=SGD(lr=0.1), device="cuda")
    compiled = torch.compile(layer, fullgraph=True)
    for n in (3, 50, 50):
        ids = torch.arange(n, device="cuda").reshape(1, n)
        for each in (compiled, other):
            each(ids).square().sum().backward()
    torch.testing.assert_close(layer(ids), other(ids))
    assert len(layer.table) == 50


def test_streams_follow_each_other():
    table = Table(32, device="cuda")
    keys = torch.arange(20_000, device="cuda")
    values = torch.randn(20_000, 32, device="cuda")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for i in range(30):
        with torch.cuda.stream(streams[i % 3]):
            table.insert_or_assign(keys, values + i)
    with torch.cuda.stream(streams[1]):
        found = table.find(keys)
    torch.cuda.synchronize()
    torch.testing.assert_close(found.values, values + 29)


def test_keys_elsewhere_are_refused():
    table = Table(2, device="cuda")
    with refused("[Table.find] keys: expected an array on cuda:0 like the table, got cpu"):
        table.find(torch.tensor([1]))
    with refused(
        "[Table.find] keys: expected an array on the CPU, got cuda:0", NotImplementedError
    ):
        Table(2).find(torch.tensor([1], device="cuda"))
    layer = HashEmbedding(2, device="cuda", optimizer=SGD())
    with refused("[HashEmbedding] input: expected a tensor on cuda:0 like the table"):
        layer(torch.tensor([1]))


def test_growth_without_memory_keeps_the_rows():
    table = Table(4096, device="cuda")
    keys = torch.arange(1000, device="cuda")
    table.find_or_insert(keys)
    before = table.find(keys).values
    with pytest.raises(RuntimeError, match=r"\[Table\] memory: expected \d+ free bytes on cuda:0"):
        table.reserve(2**30)
    assert torch.equal(table.find(keys).values, before) and len(table) == 1000


@pytest.mark.big
def test_rows_beyond_2_31_elements():
    table = Table(256, capacity=9_000_000, device="cuda")  # slots times dim: 4.1e9
    for part in torch.arange(9_000_000, device="cuda").split(1_000_000):
        table.insert_or_assign(part, part[:, None].expand(-1, 256).float().contiguous())
    probe = torch.randint(9_000_000, (100_000,), device="cuda")
    found = table.find(probe)
    assert bool(found.found.all()) and bool((found.values == probe[:, None]).all())
