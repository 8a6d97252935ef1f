# SPDX-License-Identifier: Apache-2.0
"""HashEmbedding and HashEmbeddingBag: torch's dense modules are the truth, row by row, step by step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import assert_no_worse_than_torch, gradient_distance, misaligned, strided
from hotloop.table import SGD, Adagrad, Constant, CountFilter, RowwiseAdagrad
from hotloop.table.modules import HashEmbedding, HashEmbeddingBag
from module_cases import (
    DIM,
    PAD,
    RULES,
    UNIVERSE,
    bags,
    dense_ids,
    dense_like,
    draw,
    filled,
    pair,
    rows_of,
    seeded,
    target,
)
from table_checks import unchanged
from torch import Tensor, nn


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 4), (2, 0), (2, 3, 5), (701,)])
def test_embedding_forward_is_bit_for_bit_torchs(shape):
    module = filled(HashEmbedding(DIM, optimizer=SGD()))
    ids = draw(int(np.prod(shape))).reshape(shape)
    dense = dense_like(module, torch.float32)
    found = module(ids)
    assert found.shape == (*shape, DIM) and found.dtype == torch.float32 and found.requires_grad
    assert torch.equal(found, dense(dense_ids(ids)))
    small = ids[ids == ids.int()]
    assert torch.equal(module(small.int()), module(small))


@pytest.mark.parametrize("lay", [misaligned, strided, lambda x: x])
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
@pytest.mark.parametrize("n", [1, 7, 257, 1009])  # one, a prime, across a thread's share, many
def test_embedding_trains_as_torch_does(rule, n, lay):
    """Three steps; ids repeat, so gradients are summed before the rule sees them."""
    module, dense = pair(rule)
    for step in range(3):
        ids = draw(n, step)
        (module(lay(ids)) * target(ids.shape, torch.float32)).sum().backward()
        for dtype, (made, optimizer) in dense.items():
            optimizer.zero_grad()
            (made(dense_ids(ids)) * target(ids.shape, dtype)).sum().backward()
            optimizer.step()
    assert_no_worse_than_torch(
        rows_of(module), dense[torch.float32][0].weight, dense[torch.float64][0].weight, eps=2e-6
    )


@pytest.mark.parametrize("rule", ["adam", "adamw"])
def test_adam_is_torchs_for_rows_touched_every_step(rule):
    """A row counts its own steps, so only then; that rows left alone stay put is the difference."""
    module, dense = pair(rule)
    for step in range(4):
        ids = torch.cat((UNIVERSE, draw(30, step)))
        goal = torch.randn(len(ids), DIM, generator=seeded(step))
        (module(ids) * goal).sum().backward()
        for dtype, (made, optimizer) in dense.items():
            optimizer.zero_grad()
            (made(dense_ids(ids)) * goal.to(dtype)).sum().backward()
            optimizer.step()
    assert_no_worse_than_torch(
        rows_of(module), dense[torch.float32][0].weight, dense[torch.float64][0].weight, eps=4e-6
    )
    before = rows_of(module)
    module(UNIVERSE[:1]).sum().backward()
    assert torch.equal(before[1:], rows_of(module)[1:])
    assert not torch.equal(before[0], rows_of(module)[0])


@pytest.mark.parametrize("shape", [(9,), (3, 4), (0,)])
def test_padding_gives_zeros_and_takes_no_row(shape):
    module = HashEmbedding(DIM, optimizer=SGD(lr=1.0), padding_idx=PAD)
    ids = draw(int(np.prod(shape)), 3).reshape(shape)
    ids.reshape(-1)[::2] = PAD
    found = module(ids)
    assert not found[ids == PAD].any()
    assert not module.table.contains(torch.tensor([PAD])).any()
    assert torch.equal(found[ids != PAD], rows_of(module, ids[ids != PAD]))
    before = rows_of(module)
    found.sum().backward()
    counts = torch.bincount(dense_ids(ids[ids != PAD]), minlength=len(UNIVERSE))
    moved = before - rows_of(module)
    torch.testing.assert_close(moved, counts[:, None].expand(-1, DIM).float(), atol=1e-6, rtol=0)


def test_first_rows_are_a_function_of_the_id_alone():
    a, b = (HashEmbedding(DIM, optimizer=SGD()) for _ in range(2))
    order = torch.randperm(len(UNIVERSE), generator=seeded())
    a(UNIVERSE)
    for i in order:
        b(UNIVERSE[i])
    assert torch.equal(rows_of(a), rows_of(b))


def bag_case(mode: str, seed: int, weighted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    sizes = [3, 0, 1, 12, 0, 0, 300, 0]  # empty bags in the middle and at the end
    ids = draw(sum(sizes), seed)
    weights = torch.randn(len(ids), generator=seeded(seed)) if weighted else None
    return ids, bags(len(ids), sizes), weights


@pytest.mark.parametrize("padding", [None, PAD])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
def test_bags_train_as_torchs_do(mode, rule, last, padding):
    """Forward, the gradient of the weights, and the rows after each of two steps."""
    weighted = mode == "weighted"
    mode = "sum" if weighted else mode
    made = HashEmbeddingBag(
        DIM, mode=mode, optimizer=RULES[rule][0], include_last_offset=last, padding_idx=padding
    )
    module = filled(made)
    dense = {}
    for dtype in (torch.float32, torch.float64):
        other = dense_like(
            module,
            dtype,
            mode=mode,
            include_last_offset=last,
            padding_idx=None if padding is None else int(dense_ids(torch.tensor(padding))),
        )
        dense[dtype] = other, RULES[rule][1](other.parameters())
    for step in range(2):
        ids, offsets, weights = bag_case(mode, step, weighted)
        if last:
            offsets = torch.cat((offsets, torch.tensor([len(ids)])))
        outs, grads = {}, {}
        for dtype, (other, optimizer) in dense.items():
            optimizer.zero_grad()
            w = None if weights is None else weights.detach().to(dtype).clone().requires_grad_()
            outs[dtype] = other(dense_ids(ids), offsets, w)
            (outs[dtype] * target(outs[dtype].shape[:1], dtype)).sum().backward()
            optimizer.step()
            grads[dtype] = None if w is None else w.grad
        w = None if weights is None else weights.clone().requires_grad_()
        ours = module(ids, offsets, w)
        assert ours.shape == (8, DIM)
        assert not ours[[1, 4, 5, 7]].any()
        assert_no_worse_than_torch(ours, outs[torch.float32], outs[torch.float64], eps=4e-6)
        (ours * target(ours.shape[:1], torch.float32)).sum().backward()
        if w is not None:
            assert_no_worse_than_torch(w.grad, grads[torch.float32], grads[torch.float64], eps=4e-6)
            distance = gradient_distance(w.grad, grads[torch.float64], floor=1e-3)
            assert distance.cosine > 1 - 1e-6 and distance.row_ratio < 1e-3
        kept = slice(None) if padding is None else padding != UNIVERSE
        assert_no_worse_than_torch(
            rows_of(module)[kept],
            dense[torch.float32][0].weight[kept],
            dense[torch.float64][0].weight[kept],
            eps=1e-5,
        )


@pytest.mark.parametrize("shape", [(4, 6), (1, 1), (3, 0), (0, 3)])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_matrix_is_bags_of_one_length(mode, shape):
    module = filled(HashEmbeddingBag(DIM, mode=mode, optimizer=SGD(lr=0.5)))
    twin = copy.deepcopy(module)
    ids = draw(shape[0] * shape[1]).reshape(shape)
    offsets = torch.arange(shape[0]) * shape[1]
    weights = torch.rand(shape, generator=seeded()) if mode == "sum" else None
    a = module(ids, per_sample_weights=weights)
    b = twin(ids.reshape(-1), offsets, None if weights is None else weights.reshape(-1))
    assert a.shape == (shape[0], DIM) and torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(rows_of(module), rows_of(twin))


def test_ids_of_32_bits_and_offsets_of_32_bits():
    module = filled(HashEmbeddingBag(DIM, mode="sum", optimizer=SGD()))
    ids = torch.tensor([-7, -1, 0, 5])
    found = module(ids.int(), torch.tensor([0, 3], dtype=torch.int32))
    assert torch.equal(found, module(ids, torch.tensor([0, 3])))


def test_ids_that_may_not_enter_are_left_out_of_sum_mean_and_max():
    """Law: a bag with strangers is the bag without them."""
    for mode in ("sum", "mean", "max"):
        module = HashEmbeddingBag(DIM, mode=mode, optimizer=SGD())
        filled(module).eval()
        known, offsets = draw(6), torch.tensor([0, 2])
        mixed = torch.tensor([99, *known[:2], 98, 97, *known[2:], 96])
        assert torch.equal(module(known, offsets), module(mixed, torch.tensor([0, 3])))
        assert not module(torch.tensor([91, 92]), torch.tensor([0])).any()


def test_admission_keeps_rare_ids_at_zero_and_without_gradient():
    counter = CountFilter(1000, 2, splits=1)
    module = HashEmbedding(DIM, optimizer=SGD(lr=1.0), admission=counter, initializer=Constant(2.0))
    ids = torch.tensor([3, 4])
    for sighting in range(3):
        out = module(ids[: 1 + (sighting < 1)])
        assert bool(out.any()) == (sighting == 2)
        out.sum().backward()
    assert module.table.contains(ids).tolist() == [True, False]
    assert rows_of(module, ids[:1]).unique().tolist() == [1.0]


@pytest.mark.parametrize("rule", ["sgd", "adagrad", "adam"])
def test_step_does_what_backward_does(rule):
    fused = filled(HashEmbedding(DIM, optimizer=RULES[rule][0]))
    kept = filled(HashEmbedding(DIM, optimizer=RULES[rule][0], update="step"))
    for step in range(3):
        ids = draw(40, step)
        before = rows_of(kept)
        for module in (fused, kept):
            (module(ids) * target(ids.shape, torch.float32)).sum().backward()
        assert torch.equal(before, rows_of(kept))
        assert kept.step() == 0
        assert torch.equal(rows_of(fused), rows_of(kept))
    assert kept.step() == 0  # nothing is kept


def test_gradients_accumulate_one_update_per_backward_in_order():
    fused = filled(HashEmbedding(DIM, optimizer=Adagrad(lr=0.3)))
    kept = filled(HashEmbedding(DIM, optimizer=Adagrad(lr=0.3), update="step"))
    batches = [draw(20, s) for s in range(3)]
    for ids in batches:  # the gradient does not depend on the rows
        for module in (fused, kept):
            (module(ids) * target(ids.shape, torch.float32)).sum().backward()
    kept.step()
    assert torch.equal(rows_of(fused), rows_of(kept))


def test_two_lookups_in_one_graph_both_arrive():
    module = filled(HashEmbedding(DIM, optimizer=SGD(lr=1.0)))
    before = rows_of(module)
    (module(UNIVERSE) + 2 * module(UNIVERSE)).sum().backward()
    torch.testing.assert_close(before - rows_of(module), torch.full_like(before, 3.0))


def test_zero_grad_drops_and_so_does_load_state_dict():
    module = filled(HashEmbedding(DIM, optimizer=SGD(lr=1.0), update="step"))
    before = rows_of(module)
    module(UNIVERSE).sum().backward()
    module.zero_grad()
    module.step()
    assert torch.equal(before, rows_of(module))
    module(UNIVERSE).sum().backward()
    module.load_state_dict(module.state_dict())
    module.step()
    assert torch.equal(before, rows_of(module))


def test_zero_grad_of_a_model_reaches_the_module_only_by_itself():
    """nn.Module.zero_grad does not call that of its children: said in the docstring, so kept true here."""
    module = filled(HashEmbedding(DIM, optimizer=SGD(lr=1.0), update="step"))
    model = nn.Sequential(module, nn.Linear(DIM, 1))
    before = rows_of(module)
    model(UNIVERSE).sum().backward()
    model.zero_grad()
    module.step()
    assert not torch.equal(before, rows_of(module))


def test_step_takes_another_learning_rate():
    module = filled(HashEmbedding(DIM, optimizer=SGD(lr=1.0), update="step"))
    before = rows_of(module)
    module(UNIVERSE).sum().backward()
    module.step(optimizer=SGD(lr=0.25))
    torch.testing.assert_close(before - rows_of(module), torch.full_like(before, 0.25))


def test_rows_that_left_before_backward_take_no_gradient():
    """Whoever lives there now is not hit by a gradient meant for another id."""
    for update in ("backward", "step"):
        module = HashEmbedding(
            DIM, optimizer=SGD(lr=1.0), update=update, max_capacity=3, evict_strategy="lru"
        )
        out = module(torch.tensor([1, 2, 3]))
        module.table.find_or_insert(torch.tensor([11, 12, 13]))
        with unchanged(module.table):
            out.sum().backward()
            if update == "step":
                assert module.step() == 3


def test_zero_gradients_move_nothing():
    module = filled(HashEmbedding(DIM, optimizer=RowwiseAdagrad(lr=0.3)))
    before = rows_of(module)
    (module(UNIVERSE) * 0).sum().backward()
    assert torch.equal(before, rows_of(module))


@pytest.mark.parametrize("bag", [False, True])
def test_eval_changes_nothing(bag):
    module = HashEmbeddingBag(DIM, optimizer=SGD()) if bag else HashEmbedding(DIM, optimizer=SGD())
    module(UNIVERSE[None] if bag else UNIVERSE)
    module.eval()
    with unchanged(module.table):
        known = module(UNIVERSE[:, None] if bag else UNIVERSE)
        strange = module(torch.tensor([[77], [2**50]]))
    assert torch.equal(known, rows_of(module))
    assert not strange.any()
    assert not known.requires_grad


def test_no_grad_reads_without_a_graph_and_makes_rows_while_training():
    module = HashEmbedding(DIM, optimizer=SGD())
    with torch.no_grad():
        found = module(UNIVERSE)
    assert not found.requires_grad
    assert len(module.table) == len(UNIVERSE)
    assert torch.equal(found, rows_of(module))
    with torch.inference_mode():
        assert torch.equal(module.eval()(UNIVERSE), found)


@pytest.mark.filterwarnings("ignore:.*rows learn nothing")
def test_a_table_without_optimizer_is_frozen():
    module = HashEmbedding(DIM)
    assert not module(UNIVERSE).any() and len(module.table) == 0
    assert not filled(module)(UNIVERSE).requires_grad


@pytest.mark.filterwarnings("ignore:.*rows learn nothing")
@pytest.mark.parametrize("kind", ["eval", "no optimizer", "int8"])
def test_weights_of_frozen_rows_still_get_their_gradient(kind, compiled):
    trained = filled(HashEmbeddingBag(DIM, mode="sum", optimizer=SGD(lr=1.0)))
    module = trained.eval()
    if kind != "eval":
        table = trained.table.quantized("int8" if kind == "int8" else "bfloat16", value_range=0.5)
        module = HashEmbeddingBag(DIM, mode="sum", table=table)
    before = module.table.export().values
    call = compiled(module)
    ids = torch.tensor([0, 5, 12345, -1, 5])  # one of them unknown
    weights = torch.rand(5, generator=seeded()).requires_grad_()
    out = call(ids, torch.tensor([0, 3]), weights)
    goal = target(torch.Size([2]), torch.float32)
    (out.float() * goal).sum().backward()
    shown = module.table.find(ids).values.double()
    expected = (shown * goal.double()[[0, 0, 0, 1, 1]]).sum(1)
    assert float(weights.grad[2]) == 0.0
    # The gradient of a bfloat16 output is rounded to it.
    k = 2**-8 if kind == "no optimizer" else 1e-6
    torch.testing.assert_close(weights.grad.double(), expected, atol=k * 0.3, rtol=k)
    assert np.array_equal(before, module.table.export().values)


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_rows_give_half_outputs_and_train(dtype, bag):
    settings = {"optimizer": SGD(lr=1.0), "dtype": dtype}
    module = filled(
        HashEmbeddingBag(DIM, mode="sum", **settings) if bag else HashEmbedding(DIM, **settings)
    )
    half = getattr(torch, dtype)
    ids = torch.cat((UNIVERSE, UNIVERSE))
    before = rows_of(module).double()
    out = module(ids.reshape(2, -1).t()) if bag else module(ids)
    assert out.dtype == half
    truth = before * 2 if bag else torch.cat((before, before))
    assert torch.equal(out.double(), truth)  # a row, and twice a row, are exact
    goal = target(out.shape[:1], half)
    (out * goal).sum().backward()
    goal = goal.double()
    moved = 2 * goal if bag else goal[: len(UNIVERSE)] + goal[len(UNIVERSE) :]
    same_dtype = (before - moved).to(half)
    assert_no_worse_than_torch(rows_of(module), same_dtype, before - moved, k=1.0, eps=1e-6)


def test_int8_serves_what_quantized_says():
    module = filled(HashEmbedding(DIM, optimizer=SGD()))
    table = module.table.quantized("int8", value_range=0.05)
    for serving, ids in (
        (HashEmbedding(DIM, table=table), UNIVERSE),
        (HashEmbeddingBag(DIM, table=table, mode="mean"), UNIVERSE[:, None]),
    ):
        found = serving(ids)
        assert found.dtype == torch.float32
        assert torch.equal(found, table.find(UNIVERSE).values)
        # Half a step, but for values just below the upper end, which is clipped by one.
        assert float((found - rows_of(module)).abs().max()) <= 0.05 / 128
        assert not serving(torch.full_like(ids, 1234)).any()
