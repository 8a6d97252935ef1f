# SPDX-License-Identifier: Apache-2.0
"""A scale from above meets the gradient of a head before the gradient is rounded to half precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_no_worse_than_torch
from hotloop.logprob import (
    forward_kl_distill,
    linear_cross_entropy,
    linear_kl,
    linear_logprob,
    token_logprob,
)
from hotloop.preference import dpo_loss
from logprob_cases import make_head
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid

HALF = [torch.float16, torch.bfloat16]
EXPONENTS = (-16, -8, 0, 8, 16)


def test_a_mean_over_65536_tokens_scaled_back() -> None:
    n = 65536
    h = torch.full((n, 1), 4.0, dtype=torch.float16, requires_grad=True)
    w = torch.tensor([[1.0], [-1.0]], dtype=torch.float16, requires_grad=True)
    y = torch.zeros(n, dtype=torch.int64)
    (linear_cross_entropy(h, w, y) * n).backward()
    # logits (4, -4): dz = -sigmoid(-8) and +sigmoid(-8), d h = -2 sigmoid(-8) = -6.707e-4.
    assert h.grad is not None
    assert w.grad is not None
    torch.testing.assert_close(h.grad.float(), torch.full((n, 1), -6.7070e-4), rtol=5e-4, atol=0)
    expected = torch.tensor([[-87.910], [87.910]])  # n * 4 * sigmoid(-8)
    torch.testing.assert_close(w.grad.float(), expected, rtol=5e-4, atol=0)


def gradients(loss: Tensor, inputs: list[Tensor], scale: float) -> list[Tensor]:
    """In float32 the scale is exact, and so is the product with the loss."""
    return list(torch.autograd.grad(loss, inputs, torch.full_like(loss, scale)))


def hold(
    call: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], scale: float
) -> None:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    other = [x.detach().clone().requires_grad_() for x in inputs]
    found = gradients(call(*leaves), leaves, scale)
    same = gradients(plain(*other), other, scale)
    truth = gradients(plain(*wide), wide, scale)
    info = torch.finfo(inputs[0].dtype)
    for a, b, c in zip(found, same, truth):
        size = float(c.abs().max())
        if size > info.max:
            continue
        # Half a spacing of the result, which below the smallest normal number is that of the subnormal ones.
        spacing = max(info.eps / 2 * size, info.smallest_normal * info.eps / 2)
        assert_no_worse_than_torch(a, b, c, 2.0, 2e-6 + spacing / size, floor=size)


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("n", [64, 65536])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(reduction: str, n: int, dtype: torch.dtype, exponent: int) -> None:
    head = make_head(n, 4, 9, dtype)
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1}
    hold(
        lambda h, w, b: linear_cross_entropy(h, w, head.labels, bias=b, **options),
        lambda h, w, b: cross_entropy((h @ w.t() + b).to(wider(h.dtype)), head.labels, **options),
        head.tensors(),
        2.0**exponent,
    )


def wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def picked(z: Tensor, y: Tensor) -> Tensor:
    rows = log_softmax(z.to(wider(z.dtype)), -1).gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1)
    return torch.where(y != -100, rows, 0.0)


N = 4096
HEAD = make_head(N, 4, 9)
TEACHER = make_head(N, 4, 9, seed=1, bias=False)
FORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
    "linear_logprob": (
        lambda h, w: linear_logprob(h, w, HEAD.labels).logps.mean(),
        lambda h, w: picked(h @ w.t(), HEAD.labels).mean(),
        [HEAD.hidden, HEAD.weight],
    ),
    "token_logprob": (
        lambda z: token_logprob(z, HEAD.labels).logps.mean(),
        lambda z: picked(z, HEAD.labels).mean(),
        [HEAD.hidden @ HEAD.weight.t()],
    ),
    "linear_kl": (
        lambda h, w: linear_kl(h, w, TEACHER.hidden.to(h.dtype), TEACHER.weight.to(h.dtype)),
        lambda h, w: plain_kl(h @ w.t(), TEACHER.hidden.to(h.dtype) @ TEACHER.weight.to(h.dtype).t()),
        [HEAD.hidden, HEAD.weight],
    ),
    "forward_kl_distill": (
        lambda z: forward_kl_distill(z, (TEACHER.hidden @ TEACHER.weight.t()).to(z.dtype)),
        lambda z: plain_kl(z, (TEACHER.hidden @ TEACHER.weight.t()).to(z.dtype)),
        [HEAD.hidden @ HEAD.weight.t()],
    ),
    "dpo_loss": (
        lambda a, b: dpo_loss(a, b, (0 * a).detach(), (0 * b).detach()),
        lambda a, b: -logsigmoid(0.1 * (a.to(wider(a.dtype)) - b.to(wider(b.dtype)))).mean(),
        [HEAD.hidden[:, 0], HEAD.hidden[:, 1]],
    ),
}  # fmt: skip


def plain_kl(s: Tensor, t: Tensor) -> Tensor:
    q, p = (log_softmax(x.to(wider(x.dtype)), -1) for x in (s, t))
    return kl_div(q, p, log_target=True, reduction="sum") / N


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_every_other_form(name: str, dtype: torch.dtype, exponent: int) -> None:
    call, plain, inputs = FORMS[name]
    hold(call, plain, [x.to(dtype) for x in inputs], 2.0**exponent)
