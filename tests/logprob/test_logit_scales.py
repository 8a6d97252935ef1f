# SPDX-License-Identifier: Apache-2.0
"""Temperatures, logit scales and caps at both ends of their range, against torch's own softmax in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hotloop.logprob import (
    LogitMap,
    forward_kl_distill,
    generalized_jsd_distill,
    linear_logprob,
    log_cosh_logit_distill,
    reverse_kl_distill,
    token_logprob,
)
from hotloop.preference import linear_preference_loss
from logprob_cases import by_impl
from torch import Tensor
from torch.nn import functional as F

ENDS = (1e-18, 1.0, 1e18)
STATISTICS = ("lse", "mean_logit", "sum_p2", "entropy")


def mapped(u: Tensor, temperature: float, scale: float, cap: float | None) -> Tensor:
    z = scale * u
    return (z if cap is None else cap * torch.tanh(z / cap)) / temperature


def truth(z: Tensor, labels: Tensor) -> dict[str, Tensor]:
    logp = F.log_softmax(z, -1)
    p = logp.exp()
    return {
        "logps": logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1),
        "lse": torch.logsumexp(z, -1),
        "mean_logit": z.mean(-1),
        "sum_p2": (p * p).sum(-1),
        "entropy": -(p * logp).sum(-1),
    }


@by_impl
@pytest.mark.parametrize(
    ("temperature", "scale", "cap"),
    [
        *itertools.product(ENDS, ENDS, (None, *ENDS)),
        *itertools.product(ENDS, (-1e-18, -1e18, 0.0), (None, 1.0)),
    ],
)
def test_every_statistic_and_gradient_at_the_ends(
    temperature: float, scale: float, cap: float | None, impl: str
) -> None:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(5, 8, generator=g).requires_grad_()
    w = torch.randn(11, 8, generator=g).requires_grad_()
    y = torch.randint(0, 11, (5,), generator=g)
    kw = {"temperature": temperature, "logit_scale": scale, "softcap": cap, "impl": impl}
    exact = (h.detach().double().requires_grad_(), w.detach().double().requires_grad_())
    z = mapped(exact[0] @ exact[1].T, temperature, scale, cap)
    right = truth(z, y)
    right_grads = torch.autograd.grad(right["logps"].sum(), exact)
    logits = (h @ w.T).detach().requires_grad_()
    for found, leaves in (
        (linear_logprob(h, w, y, statistics=STATISTICS, **kw), (h, w)),
        (token_logprob(logits, y, statistics=STATISTICS, **kw), (logits,)),
    ):
        largest = float(z.detach().abs().max())
        for name, value in right.items():
            of = max(largest, 1.0) if name in ("logps", "lse", "mean_logit", "entropy") else 1.0
            torch.testing.assert_close(
                getattr(found, name).double(), value.detach(), rtol=1e-5, atol=1e-5 * of
            )
        grads = torch.autograd.grad(found.logps.sum(), leaves)
        if len(leaves) == 2:
            for a, b in zip(grads, right_grads):
                torch.testing.assert_close(
                    a.double(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max())
                )
        assert all(bool(x.isfinite().all()) for x in grads)


@by_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-18, 1e-3, 1.0, 30.0, 1e3])
def test_divergences_lose_what_numerics_says(
    temperature: float, dtype: torch.dtype, impl: str
) -> None:
    """What docs/numerics.md allows every statistic, and T^2 eps for the value, T eps for the gradient."""
    g = torch.Generator().manual_seed(1)
    s, t = (2 * torch.randn(6, 50, generator=g, dtype=torch.float64) for _ in range(2))
    if dtype is torch.float32:
        s, t = s.float().double(), t.float().double()
    eps, slack = float(torch.finfo(dtype).eps), 2e-6 if dtype is torch.float32 else 1e-13
    leaf = s.clone().requires_grad_()
    q, p = F.log_softmax(leaf / temperature, -1), F.log_softmax(t / temperature, -1)
    hot = max(temperature, 1.0)
    oracles = {
        forward_kl_distill: F.kl_div(q, p, log_target=True, reduction="none").sum(-1),
        reverse_kl_distill: F.kl_div(p, q, log_target=True, reduction="none").sum(-1),
    }
    for call, rows in oracles.items():
        (right_grad,) = torch.autograd.grad(rows.sum(), leaf, retain_graph=True)
        x = s.to(dtype).requires_grad_()
        kw = {"scale_by_temperature": False, "temperature": temperature, "impl": impl}
        found = call(x, t.to(dtype), reduction="none", **kw)
        (grad,) = torch.autograd.grad(found.sum(), x)
        scale = float(rows.detach().abs().max())
        worst = float((found.detach().double() - rows.detach()).abs().max()) / scale
        assert worst <= slack + hot**2 * eps, call
        # Of a cold softmax every weight is 0 or 1, and the gradient a difference of numbers of the size of rows / T.
        steepest = max(float(right_grad.abs().max()), scale / temperature)
        worst = float((grad.double() - right_grad).abs().max()) / steepest
        assert worst <= slack + hot * eps, call


def test_a_float64_divergence_may_be_hotter() -> None:
    s, t = torch.randn(2, 3, 9, dtype=torch.float64)
    limit = ((s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))).square().mean(1) / 2
    for call in (forward_kl_distill, generalized_jsd_distill, log_cosh_logit_distill):
        hot = call(s, t, temperature=1e5, reduction="none")
        assert bool(hot.isfinite().all())
    torch.testing.assert_close(
        forward_kl_distill(s, t, temperature=1e5, reduction="none"), limit, rtol=1e-3, atol=0
    )
    with pytest.raises(ValueError, match=r"temperature: expected at most 1e\+07 for float64"):
        forward_kl_distill(s, t, temperature=2e7)


@by_impl
def test_the_map_of_a_preference_loss_is_that_of_policy_and_reference(impl: str) -> None:
    g = torch.Generator().manual_seed(3)
    h, r = (3 * torch.randn(4, 3, 6, generator=g, dtype=torch.float64) for _ in range(2))
    w = torch.randn(9, 6, generator=g, dtype=torch.float64).requires_grad_()
    y = torch.randint(0, 9, (4, 3), generator=g)

    def answers(hidden: Tensor) -> Tensor:
        z = mapped(hidden @ w.T, 1.7, 0.6, 2.5)
        return truth(z, y)["logps"].sum(-1)

    policy, reference = answers(h), answers(r).detach()
    x = (policy - reference)[:2] - (policy - reference)[2:]
    right = -F.logsigmoid(0.1 * x).mean()
    logit = LogitMap(temperature=1.7, logit_scale=0.6, softcap=2.5)
    found, _ = linear_preference_loss(h, w, y, ref_hidden=r, logit=logit, impl=impl)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(torch.autograd.grad(found, w), torch.autograd.grad(right, w))


def test_errors_of_the_map() -> None:
    h, w = torch.randn(2, 3, 4), torch.randn(5, 4)
    y = torch.zeros(2, 3, dtype=torch.int64)
    start = r"^\[linear_preference_loss\] "
    with pytest.raises(ValueError, match=start + "temperature: expected a magnitude from 1e-18"):
        linear_preference_loss(h, w, y, loss="simpo", logit=LogitMap(temperature=1e-39))
    with pytest.raises(TypeError, match=start + r"logit: expected LogitMap, got dict\. Pass"):
        linear_preference_loss(h, w, y, loss="simpo", logit={"softcap": 30.0})  # type: ignore[arg-type]
