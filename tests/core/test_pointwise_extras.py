# SPDX-License-Identifier: Apache-2.0
"""Group columns, weights, extra values and heads without a gradient: the two heads of the loop itself.

The oracle is float64 NumPy, written from the definitions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import with_threads
from hotloop.core import pointwise
from hotloop.core.pointwise_loop import handles
from hotloop.front import native
from torch import Tensor

LENGTHS = (3, 0, 1, 300, 0, 256, 17)  # empty groups, one longer than a block, one as long
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12, torch.float16: 2e-5, torch.bfloat16: 2e-5}


def surrogate_in_numpy(
    logp: Any, old: Any, advantage: Any, low: float, high: float
) -> tuple[Any, Any, Any]:
    """Loss, slope in logp, and the extra values of every row; advantage per row."""
    ratio = np.exp(logp - old)
    clipped = np.clip(ratio, 1 - low, 1 + high)
    loss = np.maximum(-ratio * advantage, -clipped * advantage)
    bound = -clipped * advantage > -ratio * advantage
    slope = np.where(bound, 0.0, -ratio * advantage)
    return loss, slope, np.stack((ratio, bound, np.exp(old - logp) - 1 - (old - logp)))


def tensors(n: int, groups: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n)
    logp = -2 + torch.randn(n, generator=g)
    old = logp + 0.3 * torch.randn(n, generator=g)
    weight = torch.rand(n, generator=g) * (torch.rand(n, generator=g) < 0.7)
    advantage = torch.randn(groups, generator=g)
    return (
        logp.to(dtype).requires_grad_(), old.to(dtype), advantage.to(dtype), weight.to(dtype),
    )  # fmt: skip


def call(
    logp: Tensor,
    old: Tensor,
    advantage: Tensor,
    reduction: Any = "sum",
    impl: Any = "cpu",
    **how: Any,
) -> tuple[Tensor, pointwise.Outs]:
    def reference() -> Any:
        raise AssertionError("the loop was asked for")

    return pointwise.run_grouped(
        "clipped_surrogate", "core.clipped_surrogate", {"logps": logp}, {"old_logps": old},
        {"advantages": advantage}, (0.2, 0.28), reduction, impl, reference, outs=3, **how,
    )  # fmt: skip


def ragged() -> tuple[Tensor, Any]:
    offsets = np.concatenate(([0], np.cumsum(LENGTHS)))
    return torch.from_numpy(offsets), np.repeat(np.arange(len(LENGTHS)), LENGTHS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", ["int64", "int32", "rows"])
def test_groups_weights_and_extra_values(kind: str, weighted: bool, dtype: torch.dtype) -> None:
    if kind == "rows":
        n, groups, of_row = 7 * 41, 41, np.repeat(np.arange(41), 7)
        spec: Any = 7
    else:
        offsets, of_row = ragged()
        spec = offsets.to(getattr(torch, kind))
        n, groups = len(of_row), len(LENGTHS)
    logp, old, advantage, weight = tensors(n, groups, dtype)
    loss, outs = call(logp, old, advantage, groups=spec, weight=weight if weighted else None)
    (grad,) = torch.autograd.grad(loss, logp)
    x = [t.detach().double().numpy() for t in (logp, old, advantage, weight)]
    rows, slope, extra = surrogate_in_numpy(x[0], x[1], x[2][of_row], 0.2, 0.28)
    w = x[3] if weighted else np.ones(n)
    tolerance = TOLERANCE[dtype]
    np.testing.assert_allclose(loss.item(), (w * rows).sum(), rtol=tolerance, atol=tolerance)
    half = dtype.itemsize == 2
    np.testing.assert_allclose(
        grad.double().numpy(), w * slope, rtol=2.0**-8 if half else 1e-4 if dtype == torch.float32 else 1e-12,
        atol=1e-6,
    )  # fmt: skip
    counts = w != 0
    assert outs.rows.item() == counts.sum()
    for k in range(3):
        v = extra[k][counts]
        np.testing.assert_allclose(outs.sum[k].item(), v.sum(), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(outs.least[k].item(), v.min(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(outs.largest[k].item(), v.max(), rtol=1e-5, atol=1e-5)


def test_a_row_of_weight_zero_is_left_out_whatever_it_holds() -> None:
    logp, old, advantage, _ = tensors(8, 2, torch.float32)
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    clean, _ = call(logp, old, advantage, groups=4, weight=weight)
    with torch.no_grad():
        logp[1], logp[4] = float("nan"), float("inf")
    loss, outs = call(logp, old, advantage, groups=4, weight=weight)
    (grad,) = torch.autograd.grad(loss, logp)
    assert torch.equal(loss, clean)
    assert grad[1] == grad[4] == 0
    assert bool(grad.isfinite().all())
    assert outs.rows.item() == 6
    assert bool(torch.stack(outs[1:]).isfinite().all())


def test_nan_stays_in_the_extra_values_and_no_rows_have_their_own() -> None:
    logp, old, advantage, _ = tensors(600, 2, torch.float32)
    with torch.no_grad():
        logp[300] = float("nan")
    _, outs = call(logp, old, advantage, groups=300)
    assert all(bool(values[0].isnan()) for values in outs[1:])
    _, outs = call(logp[:0], old[:0], advantage[:0], groups=300)
    assert outs.rows == 0
    assert (outs.sum[0], outs.least[0], outs.largest[0]) == (0, float("inf"), -float("inf"))


def test_the_same_bits_on_one_and_on_two_threads() -> None:
    logp, old, advantage, weight = tensors(40_000, 400, torch.float32)

    def all_of_it() -> Tensor:
        loss, outs = call(logp, old, advantage, groups=100, weight=weight)
        return torch.cat([loss.detach().double()[None], outs.rows[None], *outs[1:]])

    one, two, three = (with_threads(threads, all_of_it) for threads in (1, 2, 3))
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_equals_eager(dynamic: bool) -> None:
    offsets, of_row = ragged()
    logp, old, advantage, weight = tensors(len(of_row), len(LENGTHS), torch.float32)

    def step(logp: Tensor, old: Tensor, advantage: Tensor, weight: Tensor, offsets: Tensor) -> Any:
        return call(logp, old, advantage, impl="auto", groups=offsets, weight=weight)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    ours, expected = (f(logp, old, advantage, weight, offsets) for f in (compiled, step))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    a, b = (torch.autograd.grad(loss, logp)[0] for loss, _ in (ours, expected))
    assert torch.equal(a, b)


def test_an_advantage_or_a_weight_in_float64_is_not_narrowed() -> None:
    logp, old, advantage, weight = tensors(8, 2, torch.float32)
    fine = 1 + 2.0**-40
    for wide in ("advantage", "weight"):
        a, w = advantage.double(), torch.ones(8, dtype=torch.float64)
        (a if wide == "advantage" else w)[0] *= fine
        given = (a, weight) if wide == "advantage" else (advantage, w)
        loss, _ = call(logp, old, given[0], groups=4, weight=given[1])
        assert loss.dtype == torch.float64
        x = [t.detach().double().numpy() for t in (logp, old, *given)]
        rows, _, _ = surrogate_in_numpy(x[0], x[1], np.repeat(x[2], 4), 0.2, 0.28)
        np.testing.assert_allclose(loss.item(), (x[3] * rows).sum(), rtol=1e-14)


def test_opcheck_with_groups() -> None:
    offsets, of_row = ragged()
    logp, old, advantage, weight = tensors(len(of_row), len(LENGTHS), torch.float64)
    torch.library.opcheck(
        torch.ops.hotloop.pointwise.default,
        (
            [logp],
            [old],
            "core.clipped_surrogate",
            [0.2, 0.2],
            "sum",
            [advantage],
            1,
            offsets,
            weight,
            3,
        ),
    )


def test_a_head_without_a_gradient() -> None:
    g = torch.Generator().manual_seed(5)
    p, q = -torch.rand(2, 1000, generator=g, dtype=torch.float64)
    out = torch.empty(1000, dtype=torch.float64)
    handle = handles("cpu")["core.k3"]
    run = native.core.pointwise.run
    total = run(handle, 1000, [p, q], [], out, [], 1.0, True, True)
    expected = np.expm1((q - p).numpy()) - (q - p).numpy()
    np.testing.assert_allclose(out.numpy(), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-12)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"groups": 5}, "groups: expected a divisor of 8 rows, got 5"),
    ({"groups": 0}, "groups: expected an integer >= 1, got 0"),
    (
        {"groups": torch.zeros(3)},
        r"groups: expected offsets \(groups \+ 1,\), int32 or int64, got \(3,\) float32",
    ),
    ({"groups": torch.tensor([0, 4, 9])}, "groups: expected ascending offsets from 0 to 8"),
    ({"groups": torch.tensor([0, 9, 8])}, "groups: expected ascending offsets from 0 to 8"),
    ({"groups": torch.tensor([1, 4, 8])}, "groups: expected ascending offsets from 0 to 8"),
    ({"groups": 2}, r"advantages: expected shape \(4,\), one value per group, got \(2,\)"),
    (
        {"groups": 4, "weight": torch.ones(7)},
        r"weight: expected shape \(8,\) like logps, got \(7,\)",
    ),
]


@pytest.mark.parametrize(("how", "text"), WRONG, ids=lambda x: str(x)[:30])
def test_errors(how: dict[str, Any], text: str) -> None:
    logp, old, advantage, _ = tensors(8, 2, torch.float32)
    with pytest.raises(ValueError, match=text):
        call(logp, old, advantage, **how)
