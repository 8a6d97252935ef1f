# SPDX-License-Identifier: Apache-2.0
"""Properties over drawn inputs, determinism over threads, and the ends of float32."""

from __future__ import annotations

import math
from typing import Any

import hotloop.preference as p
import pytest
import torch
from helpers import assert_same_non_finite, gradients, with_threads
from hypothesis import given, settings
from hypothesis import strategies as st
from pointwise_cases import BY_ID, CASES, Case
from torch import Tensor

drawn = settings(max_examples=30, deadline=None, database=None, derandomize=True)

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
logps = st.lists(st.tuples(*[st.floats(-300, -0.0625, width=32)] * 4), min_size=1, max_size=9).map(
    lambda rows: [torch.tensor(column) for column in zip(*rows)]
)
betas = st.floats(0.01, 5.0)


@drawn
@given(logps, betas)
def test_dpo_is_positive_and_falls_with_the_margin(rows: list[Tensor], beta: float) -> None:
    pc, pr, rc, rr = rows
    base = p.dpo_loss(pc, pr, rc, rr, beta=beta, reduction="none")
    assert bool((base >= 0).all())
    better = p.dpo_loss(pc + 1, pr, rc, rr, beta=beta, reduction="none")
    assert bool((better <= base).all())


@drawn
@given(logps, betas, st.floats(0, 0.49))
def test_soft_labels_lie_between_the_hard_ones(rows: list[Tensor], beta: float, eps: float) -> None:
    pc, pr, rc, rr = (x.double() for x in rows)
    one = p.dpo_loss(pc, pr, rc, rr, beta=beta, reduction="none")
    other = p.dpo_loss(pr, pc, rr, rc, beta=beta, reduction="none")
    soft = p.conservative_dpo_loss(pc, pr, rc, rr, beta=beta, label_smoothing=eps, reduction="none")
    torch.testing.assert_close(soft, (1 - eps) * one + eps * other, rtol=1e-9, atol=1e-12)
    robust = p.robust_dpo_loss(pc, pr, rc, rr, beta=beta, label_smoothing=eps, reduction="none")
    assert bool((robust <= one + 1e-9).logical_or(one > math.log(2)).all())


@drawn
@given(logps, betas)
def test_gradients_of_a_pair_point_apart(rows: list[Tensor], beta: float) -> None:
    pc, pr, rc, rr = rows
    for fn in (p.dpo_loss, p.nca_loss, p.bco_pair_loss):
        leaves = [pc.clone().requires_grad_(), pr.clone().requires_grad_()]
        chosen, rejected = gradients(fn(*leaves, rc, rr, beta=beta, reduction="none"), leaves)
        assert bool((rejected >= 0).all())
        if fn is not p.nca_loss:
            assert bool((chosen <= 0).all())


@drawn
@given(st.lists(st.floats(-20, -0.0625, width=32), min_size=1, max_size=8), st.floats(0, 2))
def test_orpo_of_equal_answers(values: list[float], beta: float) -> None:
    a = torch.tensor(values, dtype=torch.float64)
    loss = p.orpo_loss(a, a, -a, beta=beta, reduction="none")
    torch.testing.assert_close(loss, -a + beta * math.log(2), rtol=1e-12, atol=1e-12)


@drawn
@given(st.integers(0, 40), st.integers(0, 2**31))
def test_any_number_of_rows(n: int, seed: int) -> None:
    case = BY_ID["cpo"]
    grad, const = case.inputs(n, torch.float64, seed % 1000)
    rows = case.fn(**grad, **const, reduction="none")
    assert rows.shape == (n,)
    expected = case.reference(**grad, **const, reduction="none")
    torch.testing.assert_close(rows, expected, rtol=1e-11, atol=1e-12)


@by_case
def test_threads_do_not_change_a_bit(case: Case) -> None:
    # 20 blocks of the loop: enough for a second thread, with a tail.
    grad, const = case.inputs(256 * 20 + 7, seed=3)

    def run() -> Tensor:
        leaves = {name: x.detach().requires_grad_() for name, x in grad.items()}
        loss = case.fn(**leaves, **const, **case.kwargs, impl="cpu")
        return torch.cat(
            [loss.reshape(1), *(g.reshape(-1) for g in gradients(loss, list(leaves.values())))]
        )

    assert torch.equal(with_threads(1, run), with_threads(2, run))
    assert torch.equal(run(), run())


EXTREMES = torch.tensor([1e4, -1e4, 0.0, torch.inf, -torch.inf, torch.nan])
FINITE = torch.isfinite(EXTREMES)


def extreme_calls(case: Case) -> list[dict[str, Tensor]]:
    """One call per differentiable input, with the extremes in the first entry of its rows."""
    grad, _ = case.inputs(len(EXTREMES), seed=11)
    calls = []
    for name in grad:
        moved = dict(grad)
        x = grad[name].clone()
        x.view(len(EXTREMES), -1)[:, 0] = EXTREMES
        moved[name] = x
        calls.append(moved)
    return calls


@by_case
def test_extremes_end_where_torch_ends(case: Case) -> None:
    if not case.rowwise:
        pytest.skip("rows mix: a NaN in one is a NaN in all")
    _, const = case.inputs(len(EXTREMES), seed=11)
    for grad in extreme_calls(case):
        found: list[Any] = []
        for fn, extra in ((case.fn, {"impl": "cpu"}), (case.reference, {})):
            leaves = {name: x.clone().requires_grad_() for name, x in grad.items()}
            loss = fn(**leaves, **const, **case.kwargs, reduction="none", **extra)
            found.append((loss, gradients(loss, list(leaves.values()))))
        ours, torchs = found
        assert_same_non_finite(ours[0], torchs[0])
        torch.testing.assert_close(ours[0], torchs[0], rtol=3e-6, atol=1e-5, equal_nan=True)
        # Infinities and NaN may make the whole gradient of their row NaN where torch's is finite,
        # as all inputs of a row share one pass; the other rows must not notice.
        use = FINITE & torch.isfinite(torchs[0].view(len(EXTREMES), -1)).all(1)
        for a, b in zip(ours[1], torchs[1]):
            a, b = a.view(len(EXTREMES), -1), b.view(len(EXTREMES), -1)
            torch.testing.assert_close(a[use], b[use], rtol=1e-4, atol=1e-6)
