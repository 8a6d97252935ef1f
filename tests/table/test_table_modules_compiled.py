# SPDX-License-Identifier: Apache-2.0
"""HashEmbedding and HashEmbeddingBag: one set of bits for any route, threads or torch.compile."""

from __future__ import annotations

import pytest
import torch
from hotloop.table import SGD, Adagrad
from hotloop.table.modules import HashEmbedding, HashEmbeddingBag
from module_cases import (
    DIM,
    PAD,
    UNIVERSE,
    draw,
    filled,
    rows_of,
    seeded,
)
from table_checks import assert_rows
from torch import Tensor, nn


def bits_after(call, steps: int = 3) -> Tensor:
    """Rows, outputs and weight gradients of a run whose batches are worth several threads."""
    module = HashEmbeddingBag(8, mode="sum", optimizer=Adagrad(lr=0.1))
    run = call(module)
    kept = []
    for step in range(steps):
        generator = seeded(step)
        ids = torch.randint(-900, 900, (4001,), generator=generator)
        offsets = torch.arange(0, 4001, 7)
        weights = torch.randn(4001, generator=generator).requires_grad_()
        out = run(ids, offsets, weights)
        out.square().sum().backward()
        kept += [out.detach(), weights.grad]
    rows = module.table.export()
    kept += [torch.from_numpy(x).double() for x in (rows.keys, rows.values, rows.state)]
    return torch.cat([x.double().reshape(-1) for x in kept])


def test_threads_do_not_change_the_bits(level):
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(bits_after(lambda module: module))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_gives_the_bits_of_eager(backend, dynamic):
    torch._dynamo.reset()
    compiled = bits_after(
        lambda m: torch.compile(m, fullgraph=True, backend=backend, dynamic=dynamic)
    )
    assert torch.equal(compiled, bits_after(lambda module: module))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("padding", [None, PAD])
@pytest.mark.parametrize("mode", [None, "sum", "mean", "max"])
def test_compiled_for_changing_batches(mode, padding, backend, dynamic):
    """Batches that grow, shrink and are empty; padding is the mask."""
    torch._dynamo.reset()

    def make() -> nn.Module:
        settings = {"optimizer": Adagrad(lr=0.2), "padding_idx": padding}
        kind = HashEmbedding(DIM, **settings)
        return kind if mode is None else HashEmbeddingBag(DIM, mode=mode, **settings)

    plain, module = make(), make()
    # Part of a larger graph; padding makes shapes that depend on data, which need the flag.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        call = torch.compile(
            lambda *args: module(*args).tanh() * 2, fullgraph=True, backend=backend, dynamic=dynamic
        )
        for step, n in enumerate((6, 9, 2, 0, 31)):
            ids = draw(n, step)
            args = (ids,) if mode is None else (ids, torch.tensor([0, 0, n // 2, n // 2]))
            a, b = call(*args), plain(*args).tanh() * 2
            assert torch.equal(a, b)
            a.square().sum().backward()
            b.square().sum().backward()
            assert_rows(module.table, plain.table)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("frozen", ["eval", "no optimizer"])
def test_frozen_rows_in_a_compiled_model_that_trains(frozen, backend):
    torch._dynamo.reset()
    module = filled(HashEmbedding(DIM, optimizer=SGD(lr=1.0))).eval()
    if frozen == "no optimizer":
        module = HashEmbedding(DIM, table=module.table.quantized("float16"))
    before, head = rows_of(module), nn.Linear(DIM, 1)
    call = torch.compile(lambda x: head(module(x).float()), fullgraph=True, backend=backend)
    call(UNIVERSE).sum().backward()
    torch.testing.assert_close(head.weight.grad[0], before.float().sum(0), atol=1e-5, rtol=0)
    assert torch.equal(before, rows_of(module))
    assert not call(torch.tensor([888])).sub(head.bias).any()


def test_compiled_step_mode_and_eval():
    torch._dynamo.reset()
    module = filled(HashEmbedding(DIM, optimizer=SGD(lr=1.0), update="step"))
    call = torch.compile(module, fullgraph=True, backend="aot_eager")
    before = rows_of(module)
    call(UNIVERSE).sum().backward()
    assert torch.equal(before, rows_of(module))
    assert module.step() == 0
    torch.testing.assert_close(before - rows_of(module), torch.ones_like(before))
    module.eval()
    with torch.no_grad():
        assert torch.equal(call(UNIVERSE), rows_of(module))
    assert not call(torch.tensor([888])).any()
    assert len(module.table) == len(UNIVERSE)


# All of the default ones. The operators keep their state outside the graph, which no schema says, and opcheck calls
# them several times and expects one answer: that holds where backward moves nothing, so the rule has lr = 0 and the
# rows are there before.
UTILITIES = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_static",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("utility", UTILITIES)
@pytest.mark.parametrize("case", ["bags", "weights", "max", "rows", "empty", "frozen"])
def test_opcheck(case, utility):
    mode = "max" if case == "max" else "sum"
    module = filled(HashEmbeddingBag(DIM, mode=mode, optimizer=Adagrad(lr=0.0)))
    ids = draw(0 if case == "empty" else 9)
    offsets = None if case == "rows" else torch.tensor([0, len(ids) // 3, len(ids)])
    weights = torch.rand(len(ids)).requires_grad_() if case in ("weights", "frozen") else None
    number, insert, keep = module._held.number, case != "frozen", weights is not None
    anchor = module._held.anchor if insert else module._held.anchor.detach()
    look_up, update = torch.ops.hotloop.table_lookup, torch.ops.hotloop.table_update
    args = (anchor, ids, offsets, weights, number, insert, keep)
    torch.library.opcheck(look_up.default, args, test_utils=utility)
    out, rows, sizes, largest, kept = look_up(*args)
    held = None if weights is None else weights.detach()
    grad = torch.randn(out.shape)
    args = (
        grad,
        anchor.detach(),
        ids,
        offsets,
        held,
        rows,
        sizes,
        largest,
        kept,
        number,
        0,
        held is not None,
    )
    torch.library.opcheck(update.default, args, test_utils=utility)
