# SPDX-License-Identifier: Apache-2.0
"""NPO and its retain terms. The grid, the gradients and the errors run with all pointwise losses (tests/core)."""

from __future__ import annotations

import math

import torch
from hotloop.unlearn import npo_loss

LOGPS = torch.tensor([-3.0, -9.0, -5.0], dtype=torch.float64)
REF = torch.tensor([-4.0, -7.0, -5.0], dtype=torch.float64)


def test_weight_of_a_row_is_twice_a_sigmoid() -> None:
    leaf = LOGPS.clone().requires_grad_()
    (grad,) = torch.autograd.grad(npo_loss(leaf, REF, beta=0.7, reduction="sum"), leaf)
    torch.testing.assert_close(grad, 2 * torch.sigmoid(0.7 * (LOGPS - REF)), rtol=1e-12, atol=0)


def test_simnpo_form() -> None:
    lengths = torch.tensor([3, 9, 5])
    ours = npo_loss(LOGPS, sequence_lengths=lengths, beta=2.5, gamma=0.3, reduction="none")
    expected = 2 / 2.5 * torch.log1p(torch.exp(2.5 * LOGPS / lengths + 0.3))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_retain_terms_are_means_of_their_own() -> None:
    nll = torch.rand(7, dtype=torch.float64, requires_grad=True)
    kl = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    base = npo_loss(LOGPS, REF)
    full = npo_loss(
        LOGPS, REF, retain_nll=nll, retain_kl=kl, retain_nll_weight=2.0, retain_kl_weight=0.5
    )
    torch.testing.assert_close(full, base + 2 * nll.mean() + 0.5 * kl.mean(), rtol=1e-12, atol=0)
    a, b = torch.autograd.grad(full, (nll, kl))
    torch.testing.assert_close(a, torch.full_like(nll, 2 / 7), rtol=1e-12, atol=0)
    torch.testing.assert_close(b, torch.full_like(kl, 0.5 / 6), rtol=1e-12, atol=0)


def test_forgetting_stops_by_itself() -> None:
    far = torch.tensor([-300.0])
    assert float(npo_loss(far, torch.zeros(1), beta=1.0)) < 1e-30
    assert math.isclose(float(npo_loss(-far, torch.zeros(1), beta=1.0)), 600.0)
