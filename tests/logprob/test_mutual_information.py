# SPDX-License-Identifier: Apache-2.0
"""The interpolated bound on mutual information: limits, bounds, and Gaussians whose information is known."""

from __future__ import annotations

import math

import pytest
import torch
from hotloop import reference
from hotloop.logprob import mi_alpha_bound
from torch import Tensor


def scores(n: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, n, generator=g, dtype=torch.float64), torch.randn(
        n, generator=g, dtype=torch.float64
    )


def by_loops(f: Tensor, q: Tensor, alpha: float) -> float:
    """The definition, term by term."""
    n = len(f)
    joint = marginal = 0.0
    for i in range(n):
        a = [
            alpha * sum(math.exp(f[i, k]) for k in range(n) if k != j) / (n - 1)
            + (1 - alpha) * math.exp(q[i])
            for j in range(n)
        ]
        for j in range(n):
            if j != i:
                joint += float(f[i, i]) - math.log(a[j])
                marginal += math.exp(f[i, j]) / a[i]
    return 1 + (joint - marginal) / (n * (n - 1))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_the_definition_term_by_term(alpha: float) -> None:
    f, q = scores(7)
    assert float(mi_alpha_bound(f, q, alpha=alpha)) == pytest.approx(
        by_loops(f, q, alpha), rel=1e-12
    )


def test_alpha_one_is_info_nce_and_does_not_see_the_baseline() -> None:
    f, q = scores()
    n = len(f)
    eye = torch.eye(n, dtype=torch.bool)
    # One held-out column j per term; the positive stays inside the n - 1 samples.
    terms = [
        f[i, i] - torch.logsumexp(torch.cat((f[i, :j], f[i, j + 1 :])), 0) + math.log(n - 1)
        for i in range(n) for j in range(n) if i != j
    ]  # fmt: skip
    found = mi_alpha_bound(f, q, alpha=1.0)
    torch.testing.assert_close(found, torch.stack(terms).mean())
    torch.testing.assert_close(found, mi_alpha_bound(f, q + 5, alpha=1.0))
    assert float(mi_alpha_bound(50 * eye.double(), q, alpha=1.0)) <= math.log(n - 1) + 1e-9


def test_alpha_zero_is_the_single_sample_bound() -> None:
    f, q = scores()
    n = len(f)
    off = ~torch.eye(n, dtype=torch.bool)
    joint = (f.diagonal() - q).mean()
    marginal = torch.exp(f - q.unsqueeze(1))[off].mean()
    torch.testing.assert_close(mi_alpha_bound(f, q, alpha=0.0), 1 + joint - marginal)


def test_a_dominating_column_does_not_cancel() -> None:
    """Removing it from a whole log-sum-exp by subtraction would leave nothing of the others."""
    f, q = scores(6)
    f[2, 4] = 60.0
    assert float(mi_alpha_bound(f.float(), q.float(), alpha=1.0)) == pytest.approx(
        by_loops(f, q, 1.0), rel=1e-5
    )


def test_permutation_of_the_batch_changes_nothing() -> None:
    f, q = scores()
    order = torch.randperm(len(f), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mi_alpha_bound(f[order][:, order], q[order]), mi_alpha_bound(f, q))


def test_gaussians_whose_information_is_known() -> None:
    """D = 4, rho = 0.8: 2.043 nats. Exact critic, no baseline, batches of 32 (figures: the Poole et al. bounds).

    The figures carry a standard error of 0.02 and ours one of 400 batches: four of both together. The
    variance falls with alpha.
    """
    g = torch.Generator().manual_seed(0)
    rho, information = 0.8, -2 * math.log(1 - 0.64)
    values = {alpha: [] for alpha in (0.0, 0.1, 0.5, 0.9, 1.0)}
    for _ in range(400):
        x = torch.randn(32, 4, generator=g, dtype=torch.float64)
        y = rho * x + math.sqrt(1 - rho**2) * torch.randn(32, 4, generator=g, dtype=torch.float64)
        residual = y.unsqueeze(0) - rho * x.unsqueeze(1)
        f = (-(residual**2) / (2 * (1 - rho**2)) + y.unsqueeze(0) ** 2 / 2).sum(2) + information
        for alpha, found in values.items():
            found.append(
                float(mi_alpha_bound(f, torch.zeros(32, dtype=torch.float64), alpha=alpha))
            )
    deviations = []
    for (alpha, found), figure in zip(values.items(), (2.07, 2.02, 1.95, 1.85, 1.74)):
        t = torch.tensor(found)
        error = float(t.std()) / 20
        assert float(t.mean()) == pytest.approx(figure, abs=4 * (error + 0.02)), alpha
        assert float(t.mean()) <= information + 4 * error
        deviations.append(float(t.std()))
    assert deviations == sorted(deviations, reverse=True)


def test_gradient_and_dtypes() -> None:
    f, q = scores(5)
    assert torch.autograd.gradcheck(
        lambda a, b: mi_alpha_bound(a, b, alpha=0.6), (f.requires_grad_(), q.requires_grad_())
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert mi_alpha_bound(f.to(dtype), q.to(dtype)).dtype == torch.float32
    assert torch.equal(mi_alpha_bound(f, q), reference.logprob.mi_alpha_bound(f, q))
