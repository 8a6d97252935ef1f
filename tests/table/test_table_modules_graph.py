# SPDX-License-Identifier: Apache-2.0
"""Several lookups of a table in one graph: gradients are those at the rows of forward, as torch's modules say."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hotloop.table import SGD, Adagrad, CountFilter, Table
from hotloop.table.modules import HashEmbedding, HashEmbeddingBag
from module_cases import DIM, UNIVERSE, dense_ids, dense_like, draw, filled, rows_of, seeded
from table_checks import refused
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IDS, ROWS = torch.tensor([[0, 1]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def small(**settings: object) -> HashEmbeddingBag:
    module = HashEmbeddingBag(2, mode="sum", optimizer=SGD(lr=0.1), **settings)
    module.table.insert_or_assign(IDS[0], ROWS)
    return module


def ones() -> Tensor:
    return torch.ones(1, 2, requires_grad=True)


@pytest.mark.parametrize("route", ["eager", "compiled", "two modules"])
@pytest.mark.parametrize("update", ["backward", "step"])
def test_weights_of_two_lookups_in_one_graph(update, route):
    """out = [4, 6] twice; d/dw_i of 2 |out|^2 is 4 <row_i, out>: [64, 144] whatever has moved meanwhile."""
    torch._dynamo.reset()
    module = small(update=update)
    other = module
    if route == "two modules":
        other = HashEmbeddingBag(2, mode="sum", table=module.table, update=update)

    def loss(w):
        return (
            module(IDS, per_sample_weights=w).square().sum()
            + other(IDS, per_sample_weights=w).square().sum()
        )

    call = torch.compile(loss, fullgraph=True, backend="aot_eager") if route == "compiled" else loss
    w = ones()
    call(w).backward()
    assert w.grad.tolist() == [[64.0, 144.0]]
    if update == "step":
        assert module.step() == 0 and (other is module or other.step() == 0)
    # Two gradients of 2 out = [8, 12], each moved by SGD: 0.1 * 16 and 0.1 * 24.
    torch.testing.assert_close(rows_of(module, IDS[0]), ROWS - torch.tensor([1.6, 2.4]))


def test_a_retained_graph_gives_the_same_gradient_again(compiled):
    module = small()
    call = compiled(module, backend="eager")
    w = ones()
    loss = call(IDS, per_sample_weights=w).square().sum()
    for _ in range(3):
        w.grad = None
        loss.backward(retain_graph=True)
        assert w.grad.tolist() == [[32.0, 72.0]]
    torch.testing.assert_close(rows_of(module, IDS[0]), ROWS - 3 * torch.tensor([0.8, 1.2]))


@pytest.mark.parametrize("what", ["backward", "update", "assign", "erase", "clear"])
@pytest.mark.parametrize("frozen", [False, True])
def test_whatever_moves_rows_between_forward_and_backward(frozen, what):
    """A frozen module, too, may share its table with one that trains."""
    trained = small()
    module = trained
    if frozen:
        module = HashEmbeddingBag(2, mode="sum", table=trained.table).eval()
    w = ones()
    loss = module(IDS, per_sample_weights=w).square().sum()
    if what == "backward":
        trained(IDS).sum().backward()
    elif what == "clear":
        trained.table.clear()
    elif what == "erase":
        trained.table.erase(IDS[0])
    else:
        getattr(trained.table, what)(IDS[0], torch.full((2, 2), 9.0))
    loss.backward()
    assert w.grad.tolist() == [[32.0, 72.0]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_kept_rows_of_other_types(dtype):
    exact = torch.tensor([[0.25, -0.5], [0.75, 0.5]])  # in steps of 1/128
    module = HashEmbeddingBag(2, mode="sum", dtype=dtype if dtype != "int8" else "float32")
    module.table.insert_or_assign(IDS[0], exact)
    table = module.table.quantized("int8", value_range=1.0) if dtype == "int8" else module.table
    module = HashEmbeddingBag(2, mode="sum", table=table).eval()
    w = ones()
    out = module(IDS, per_sample_weights=w)
    table.clear()
    (out.float() * torch.tensor([[2.0, 4.0]])).sum().backward()
    assert w.grad.tolist() == [[-1.5, 3.5]]


@pytest.mark.parametrize("mode", ["weighted", "sum", "mean", "max", "rows"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_looks_up_the_rows_of_forward(reentrant, mode):
    """Two checkpointed segments and a plain lookup, nonlinear: without a checkpoint is the truth, and so is torch."""
    ids = draw(12).reshape(4, 3)
    grown = torch.rand(4, 3, generator=seeded(2)) if mode == "weighted" else None

    def run(checkpointed, dense=False):
        settings = {"optimizer": SGD(lr=0.5), "initializer": None}
        kind = "sum" if mode == "weighted" else mode
        made = (
            HashEmbedding(DIM, **settings)
            if mode == "rows"
            else HashEmbeddingBag(DIM, mode=kind, **settings)
        )
        module = filled(made)
        call, named = module, ids
        if dense:
            call = dense_like(module, torch.float32, **({} if mode == "rows" else {"mode": kind}))
            named = dense_ids(ids)
        head = nn.Linear(DIM, DIM)
        with torch.no_grad():
            head.weight.copy_(torch.randn(DIM, DIM, generator=seeded(1)))
            head.bias.zero_()
        w = None if grown is None else grown.clone().requires_grad_()
        args = () if mode == "rows" else (None, w)

        def segment(x):
            out = call(named, *args)
            out = out.sum(1) if mode == "rows" else out
            return (head(out) + x).tanh()

        x = torch.full((4, DIM), 0.1, requires_grad=True)
        for part in range(3):
            if checkpointed and part != 1:
                x = checkpoint(segment, x, use_reentrant=reentrant)
            else:
                x = segment(x)
        x.square().sum().backward()
        if dense:
            with torch.no_grad():
                call.weight -= 0.5 * call.weight.grad
            rows = call.weight.detach()
        else:
            rows = rows_of(module)
        return [rows, head.weight.grad] + ([] if w is None else [w.grad])

    ours, plain, torchs = run(True), run(False), run(False, dense=True)
    for a, b, c in zip(ours, plain, torchs):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(a, c, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad"
)  # torch's, inside the outer one
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_checkpoints(reentrant):
    def run(checkpointed):
        module = filled(HashEmbedding(DIM, optimizer=SGD(lr=0.5)))

        def again(call, x):
            return checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)

        def inner(x):
            return (module(UNIVERSE) * x).tanh()

        def outer(x):
            return again(inner, x) + again(inner, (module(UNIVERSE) + x).tanh())

        x = torch.full((len(UNIVERSE), DIM), 0.7, requires_grad=True)
        (again(outer, x) + again(outer, x * 2)).square().sum().backward()
        return rows_of(module), x.grad

    for a, b in zip(run(True), run(False)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_one_sighting_and_one_use(reentrant):
    counter = CountFilter(1000, 2, splits=1)
    module = HashEmbedding(DIM, optimizer=SGD(lr=0.5), admission=counter)
    module.table.insert_or_assign(torch.tensor([1]), torch.ones(1, DIM))
    uses = HashEmbedding(DIM, optimizer=SGD(lr=0.5), max_capacity=9, evict_strategy="lfu")
    x = torch.ones((), requires_grad=True)
    for sighting in range(2):
        for one in (module, uses):
            out = checkpoint(
                lambda y, one=one: (one(torch.tensor([1, 7])) * y).tanh(),
                x,
                use_reentrant=reentrant,
            )
            out.sum().backward()
        assert module.table.contains(torch.tensor([1, 7])).tolist() == [True, False]
        assert uses.table.scores(torch.tensor([1, 7])).tolist() == [sighting + 1] * 2


@pytest.mark.parametrize("update", ["backward", "step"])
def test_a_backward_that_raises_moves_nothing(update):
    """Nor does it keep anything, and the next backward is one like any other."""
    module = filled(HashEmbedding(DIM, optimizer=SGD(lr=1.0), update=update))
    before = rows_of(module)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("mine")

    for plain in (False, True):
        x = module(UNIVERSE)
        loss = (x + module(Fails.apply(x * 0).long()[:, 0] * 0 + UNIVERSE)).sum()
        bad = Fails.apply(torch.ones((), requires_grad=True))
        with pytest.raises(ValueError, match="mine"):
            (loss * bad if plain else loss + bad).backward()
        if update == "step":
            assert module.step() == 0
        assert torch.equal(rows_of(module), before)
    module(UNIVERSE).sum().backward()
    module.step()
    torch.testing.assert_close(before - rows_of(module), torch.ones_like(before))


def test_an_error_inside_a_checkpoint_moves_nothing_and_leaves_nothing_behind():
    module = filled(HashEmbedding(DIM, optimizer=SGD(lr=1.0)))
    before = rows_of(module)
    x = torch.ones((), requires_grad=True)
    scale = torch.tensor(float("inf"))
    out = checkpoint(lambda y: module(UNIVERSE) * y, x, use_reentrant=True)
    with pytest.raises(ValueError, match="expected finite numbers"):
        (out * scale + module(UNIVERSE)).sum().backward()
    assert torch.equal(rows_of(module), before)
    module(UNIVERSE).sum().backward()
    torch.testing.assert_close(before - rows_of(module), torch.ones_like(before))


@pytest.mark.parametrize("update", ["backward", "step"])
def test_gradients_of_others_move_no_rows(update):
    """torch.autograd.grad and backward(inputs=...) leave every other .grad alone, so they leave the rows alone."""
    module = small(update=update)
    w = ones()
    loss = module(IDS, per_sample_weights=w).square().sum()
    (found,) = torch.autograd.grad(loss, w, retain_graph=True)
    assert found.tolist() == [[32.0, 72.0]]
    loss.backward(inputs=[w], retain_graph=True)
    module.step()
    assert torch.equal(rows_of(module, IDS[0]), ROWS)
    loss.backward()
    module.step()
    torch.testing.assert_close(rows_of(module, IDS[0]), ROWS - torch.tensor([0.8, 1.2]))


@pytest.mark.parametrize("weighted", [False, True])
def test_a_second_derivative_is_refused(weighted, compiled):
    """The gradient of the weights is <row, g>: its own gradient would have to reach the rows."""
    module = small()
    call = compiled(module, backend="eager")
    w = ones() if weighted else None
    loss = call(IDS, per_sample_weights=w).sum()
    text = "[HashEmbedding.backward] create_graph: expected False, got True: a lookup has no second"
    with refused(text, NotImplementedError):
        loss.backward(create_graph=True)
    assert torch.equal(rows_of(module, IDS[0]), ROWS)


def test_the_first_derivative_of_a_penalty_beside_a_lookup():
    """A second derivative that does not go through a lookup is torch's affair, and what follows reaches the rows."""
    module, x = small(), torch.tensor([[0.3, 0.4]], requires_grad=True)
    out = module(IDS)
    (slope,) = torch.autograd.grad((out * x.square()).sum(), x, create_graph=True)  # 2 x out
    slope.square().sum().backward()  # d/d out = 2 * (2 x)^2 * out
    moved = 0.1 * 8 * x.detach().square()[0] * torch.tensor([4.0, 6.0])
    torch.testing.assert_close(rows_of(module, IDS[0]), ROWS - moved)


def test_bags_without_a_gradient_of_weights_keep_no_rows():
    """What is kept for it costs (n, dim); only a gradient of the weights needs it."""
    module = small()
    saved: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        module(IDS, per_sample_weights=ones().detach())
        assert not [t for t in saved if t.is_floating_point() and t.shape == (2, 2)]
        module(IDS, per_sample_weights=ones())
        assert [t for t in saved if t.is_floating_point() and t.shape == (2, 2)]


def test_threads_train_one_table_each_with_its_own_backward():
    import threading

    table = Table(DIM, optimizer=SGD(lr=1.0))
    table.insert_or_assign(UNIVERSE, torch.zeros(len(UNIVERSE), DIM))
    modules = [HashEmbedding(DIM, table=table) for _ in range(3)]

    def work(module):
        x = torch.ones((), requires_grad=True)
        for _ in range(20):
            checkpoint(lambda y: module(UNIVERSE) * y, x, use_reentrant=True).sum().backward()

    threads = [threading.Thread(target=work, args=(m,)) for m in modules]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert torch.equal(table.find(UNIVERSE).values, torch.full((len(UNIVERSE), DIM), -60.0))


def test_copies_share_no_waiting_moves():
    module = filled(HashEmbedding(DIM, optimizer=Adagrad(lr=0.5)))
    twin = copy.deepcopy(module)
    (module(UNIVERSE) + twin(UNIVERSE)).sum().backward()
    assert np.array_equal(module.table.export().values, twin.table.export().values)
