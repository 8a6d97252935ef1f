# SPDX-License-Identifier: Apache-2.0
"""The CUDA pair loop on a GPU: every loss, as on the CPU; in graphs, without a wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, captured, no_waiting, on_gpu
from helpers import assert_gradient_close, assert_no_worse_than_torch, misaligned, strided
from hotloop.front import impl, native
from hotloop.preference import dpo_loss
from pointwise_cases import BY_ID, CASES, Case
from test_pointwise_grid import (
    DTYPES,
    EPS,
    FLOOR,
    GRADIENT_EPS,
    GRADIENT_TOLERANCE,
    doubled,
    forward_backward,
)
from torch import Tensor

pytestmark = on_gpu
IMPL = DEVICE
# Nothing; one row; a warp less one; a block and one; more rows than one wave of blocks has threads.
ROWS = (0, 1, 31, 257, 300_001)
by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def there(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(DEVICE) for name, x in tensors.items()}


def rows_of(case: Case) -> tuple[int, ...]:
    return ROWS if case.id == "dpo" else ROWS[:-1]


@by_dtype
@by_case
def test_no_worse_than_torch(case: Case, dtype: torch.dtype) -> None:
    for n in rows_of(case):
        grad, const = (there(x) for x in case.inputs(n, dtype, seed=n))
        how: dict[str, Any] = {"reduction": case.reduction}
        ours, our_grads = forward_backward(case.fn, case, grad, const, **how, impl=IMPL)
        assert impl.last_impl(case.op) in (IMPL, None)
        other, other_grads = forward_backward(case.reference, case, grad, const, **how)
        truth, true_grads = forward_backward(
            case.reference, case, doubled(grad), doubled(const), **how
        )
        assert ours.device.type == DEVICE
        assert_no_worse_than_torch(ours, other, truth, eps=EPS.get(dtype, 1e-6))
        for x, a, b, c in zip(grad.values(), our_grads, other_grads, true_grads):
            assert (a.dtype, a.shape) == (dtype, x.shape)
            assert_no_worse_than_torch(a, b, c, 2.0, GRADIENT_EPS.get(dtype, 1e-6), floor=1e-2)
            assert_gradient_close(a, c, GRADIENT_TOLERANCE[dtype], FLOOR[dtype])


@by_case
def test_reductions_and_layouts(case: Case) -> None:
    if case.only_mean:
        pytest.skip("these inputs have other numbers of rows")
    grad, const = (there(x) for x in case.inputs(257, torch.float32, seed=3))
    call = {**const, **case.kwargs, "impl": IMPL}
    rows = case.fn(**grad, **call, reduction="none")
    torch.testing.assert_close(
        case.fn(**grad, **call, reduction="sum"), rows.sum(), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(case.fn(**grad, **call), rows.mean(), rtol=1e-5, atol=1e-5)
    for lay in (strided, misaligned):
        laid = {name: lay(x) for name, x in grad.items()}
        torch.testing.assert_close(case.fn(**laid, **call, reduction="none"), rows, rtol=0, atol=0)


def test_every_head_that_is_compiled_in_is_that_of_the_cpu() -> None:
    module = native.cuda
    assert module is not None, "hotloop._cuda is not compiled, or cannot be loaded"
    assert module.pointwise.heads() == native.core.pointwise.heads()


def test_the_same_bits_twice() -> None:
    """Sums are taken in a fixed order, whatever the blocks do."""
    case = BY_ID["dpo"]
    grad, const = (there(x) for x in case.inputs(300_001, torch.float32))
    first = case.fn(**grad, **const, impl=IMPL)
    assert all(torch.equal(first, case.fn(**grad, **const, impl=IMPL)) for _ in range(5))


@by_case
def test_nothing_waits_for_the_device(case: Case) -> None:
    grad, const = (there(x) for x in case.inputs(257, torch.float32, seed=1))
    how: dict[str, Any] = {"reduction": case.reduction, "impl": IMPL}
    forward_backward(case.fn, case, grad, const, **how)
    torch.cuda.synchronize()
    with no_waiting():
        leaves = {name: x.detach().requires_grad_() for name, x in grad.items()}
        loss = case.fn(**leaves, **const, **case.kwargs, **how)
        torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)


def test_a_captured_step_follows_its_inputs() -> None:
    grad, const = (there(x) for x in BY_ID["dpo"].inputs(257, torch.float32))
    leaves = [x.requires_grad_() for x in grad.values()]

    def step() -> list[Tensor]:
        loss = dpo_loss(*leaves, *const.values(), impl=IMPL)
        return [loss, *torch.autograd.grad(loss, leaves)]

    graph, filled = captured(step)
    for scale in (0.5, 2.0):
        with torch.no_grad():
            leaves[0].mul_(scale)
        graph.replay()
        found = [x.clone() for x in filled]
        torch.testing.assert_close(found, step(), rtol=0, atol=0)
