# SPDX-License-Identifier: Apache-2.0
"""Every preference loss over impl x dtype x rows, against the float64 reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import (
    assert_gradient_close,
    assert_no_worse_than_torch,
    gradients,
    misaligned,
    strided,
)
from hotloop import catalog
from hotloop.front import impl as _impl
from pointwise_cases import CASES, Case
from torch import Tensor

IMPLS = ("cpu", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# 0: nothing to do. 1: one row, taken as a repeated scalar by a loop that asks for shape (1,). 7:
# less than a vector. 255, 256, 257: the loop's block less one, whole, and with a tail of one row.
# 1000: several blocks and a tail that is no multiple of a vector.
ROWS = (0, 1, 7, 255, 256, 257, 1000)
# Beyond what plain torch gets wrong: our exponentials are good to a few units in the last place.
EPS = {torch.float64: 1e-12}
# Half a spacing where torch is exact by luck.
GRADIENT_EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, **EPS}
# Half the spacing of the dtype, with room for the rounding of the loss's own float32.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
# A gradient below this is subnormal in float16, or what is left of larger ones that cancelled.
FLOOR = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 2e-3,
}

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def forward_backward(
    fn: Any, case: Case, grad: dict[str, Tensor], const: dict[str, Tensor], **extra: Any
) -> tuple[Tensor, list[Tensor]]:
    leaves = {name: x.detach().requires_grad_() for name, x in grad.items()}
    loss = fn(**leaves, **const, **case.kwargs, **extra)
    return loss, gradients(loss, list(leaves.values()))


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}


@by_dtype
@pytest.mark.parametrize("impl", IMPLS)
@by_case
def test_no_worse_than_torch(case: Case, impl: str, dtype: torch.dtype) -> None:
    eps = EPS.get(dtype, 1e-6)
    for n in ROWS:
        grad, const = case.inputs(n, dtype, seed=n)
        ours, our_grads = forward_backward(
            case.fn, case, grad, const, reduction=case.reduction, impl=impl
        )
        assert _impl.last_impl(case.op) in (impl, None)
        other, other_grads = forward_backward(
            case.reference, case, grad, const, reduction=case.reduction
        )
        truth, true_grads = forward_backward(
            case.reference, case, doubled(grad), doubled(const), reduction=case.reduction
        )
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_no_worse_than_torch(ours, other, truth, eps=eps)
        for x, a, b, c in zip(grad.values(), our_grads, other_grads, true_grads):
            assert a.dtype == dtype
            assert a.shape == x.shape
            assert_no_worse_than_torch(a, b, c, 2.0, GRADIENT_EPS.get(dtype, 1e-6), floor=1e-2)
            assert_gradient_close(a, c, GRADIENT_TOLERANCE[dtype], FLOOR[dtype])


@by_case
def test_reductions_agree(case: Case) -> None:
    if case.only_mean:
        pytest.skip("these inputs have other numbers of rows")
    for n in (1, 257):
        grad, const = case.inputs(n, torch.float64, seed=n)
        call = {**grad, **const, **case.kwargs, "impl": "cpu"}
        rows = case.fn(**call, reduction="none")
        torch.testing.assert_close(case.fn(**call, reduction="sum"), rows.sum(), rtol=1e-12, atol=0)
        torch.testing.assert_close(case.fn(**call), rows.mean(), rtol=1e-12, atol=0)
        for reduction, weight in (("mean", 1 / rows.numel()), ("sum", 1.0)):
            leaves = {name: x.detach().requires_grad_() for name, x in grad.items()}
            total = case.fn(**{**call, **leaves}, reduction=reduction)
            per_row = case.fn(**{**call, **leaves}, reduction="none")
            ours = torch.autograd.grad(3 * total, list(leaves.values()))
            theirs = torch.autograd.grad(3 * weight * per_row.sum(), list(leaves.values()))
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@by_case
def test_strides_and_alignment_do_not_matter(case: Case) -> None:
    grad, const = case.inputs(257, torch.float32)
    plain = forward_backward(case.fn, case, grad, const, reduction=case.reduction, impl="cpu")
    for change in (strided, misaligned):
        moved = {k: change(v) for k, v in grad.items()}, {k: change(v) for k, v in const.items()}
        other = forward_backward(case.fn, case, *moved, reduction=case.reduction, impl="cpu")
        # Sums over tokens may be taken in another order; everything else is the same arithmetic.
        torch.testing.assert_close(plain[0], other[0], rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(plain[1], other[1], rtol=3e-6, atol=3e-6)


@by_case
def test_reference_derivative_by_finite_differences(case: Case) -> None:
    if not case.derivative:
        pytest.skip("a weight is detached: the gradient is not the derivative of the value")
    grad, const = case.inputs(3, torch.float64, seed=5)

    def run(fn: Any, **extra: Any) -> Any:
        return lambda *xs: fn(
            **dict(zip(grad, xs)), **const, **case.kwargs, reduction=case.reduction, **extra
        )

    leaves = [x.requires_grad_() for x in grad.values()]
    assert torch.autograd.gradcheck(run(case.reference), leaves)
    assert torch.autograd.gradcheck(run(case.fn, impl="cpu"), leaves)


@by_case
def test_gradient_of_any_subset_of_inputs(case: Case) -> None:
    grad, const = case.inputs(9)
    call = {**const, **case.kwargs, "reduction": case.reduction}
    loss = case.fn(**grad, **call)
    assert not loss.requires_grad
    _, full = forward_backward(case.fn, case, grad, const, reduction=case.reduction)
    for k, name in enumerate(grad):
        leaf = grad[name].detach().requires_grad_()
        (one,) = gradients(case.fn(**{**grad, name: leaf}, **call), [leaf])
        assert torch.equal(one, full[k])
    with torch.no_grad():
        assert not case.fn(**{k: v.requires_grad_() for k, v in grad.items()}, **call).requires_grad


@by_case
def test_no_gradient_reaches_the_constants(case: Case) -> None:
    grad, const = case.inputs(5)
    floats = {k: v.requires_grad_() for k, v in const.items() if v.is_floating_point()}
    if not floats:
        pytest.skip("no constant rows")
    for fn in (case.fn, case.reference):
        leaves = {k: v.detach().requires_grad_() for k, v in grad.items()}
        loss = fn(**leaves, **{**const, **floats}, **case.kwargs, reduction="mean")
        found = torch.autograd.grad(loss, list(floats.values()), allow_unused=True)
        assert all(g is None for g in found)


@by_case
def test_rows_do_not_mix(case: Case) -> None:
    if not case.rowwise or case.id == "kto-rows":
        pytest.skip("this loss looks at the batch as a whole")
    grad, const = case.inputs(300)
    base = case.fn(**grad, **const, **case.kwargs, reduction="none")
    n = base.shape[0]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))

    def permuted(x: Tensor) -> Tensor:
        return x.reshape(n, -1)[order].reshape(x.shape)

    moved = case.fn(
        **{k: permuted(v) for k, v in grad.items()},
        **{k: permuted(v) for k, v in const.items()},
        **case.kwargs,
        reduction="none",
    )
    assert torch.equal(moved, base[order])


def test_every_public_loss_has_a_case() -> None:
    """In a room with cases. ``linear_preference_loss`` has a test file of its own."""
    rooms = {case.room for case in CASES}
    losses = {op.full_name for op in catalog() if op.room in rooms and op.name.endswith("_loss")}
    assert losses - {"preference.linear_preference_loss"} == {f"{c.room}.{c.op}" for c in CASES}
