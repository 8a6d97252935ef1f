# SPDX-License-Identifier: Apache-2.0
"""The router written again: the choice by Python's sort, token by token, and its numbers in float64 torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hotloop import moe
from torch import Tensor


class Numbers(NamedTuple):
    weights: Tensor
    prob_sums: Tensor
    logsumexp: Tensor


OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sums": {"renormalize": False},
    "late": {"order": "topk_then_softmax"},
    "sigmoid": {"scoring": "sigmoid"},
    "sigmoid-sums": {"scoring": "sigmoid", "renormalize": False},
    "scaled": {"routed_scale": 2.5, "scoring": "sigmoid"},
    "late-scaled": {"routed_scale": 0.5, "order": "topk_then_softmax"},
}
"""Ways to score that choose by the logits: no rounding shows in the ids."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (2 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)


def tied(tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Logits of few values, some -inf and some zeros of either sign; the last of every token is finite."""
    g = torch.Generator().manual_seed(seed + experts)
    x = torch.randint(-2, 3, (tokens, experts), generator=g).float()
    x = torch.where(x == -2, -torch.inf, torch.where(x == -1, -0.0, x))
    x[:, -1] = 0.0
    return x


DEEPSEEK: dict[str, Any] = {
    "scoring": "sigmoid", "n_group": 8, "topk_group": 4, "routed_scale": 2.5, "bias": normal(256, seed=3) / 20
}  # fmt: skip


def compared(x: Tensor, options: dict[str, Any]) -> Tensor:
    """What experts are compared by, in float64."""
    x = x.detach().double()
    if options.get("order") != "topk_then_softmax":
        x = x.sigmoid() if options.get("scoring") == "sigmoid" else x.softmax(-1)
    bias = options.get("bias")
    return x if bias is None else x + bias.double()


def chosen(
    c: Tensor, k: int, n_group: int = 1, topk_group: int | None = None, group_score: str = "top2"
) -> Tensor:
    rows = []
    size = c.shape[1] // n_group
    for row in c.tolist():
        groups = [sorted(row[g * size : (g + 1) * size])[::-1] for g in range(n_group)]
        worth = [sum(g[:2]) if group_score == "top2" else g[0] for g in groups]
        best = sorted(range(n_group), key=lambda g: (-worth[g], g))[:topk_group]
        kept = [e for e in range(len(row)) if e // size in best]
        rows.append(sorted(kept, key=lambda e: (-row[e], e))[:k])
    return torch.tensor(rows, dtype=torch.int64).view(c.shape[0], k)


def numbers(
    x: Tensor,
    ids: Tensor,
    *,
    scoring: str = "softmax",
    order: str = "softmax_then_topk",
    renormalize: bool = True,
    routed_scale: float = 1.0,
    **_choice: Any,
) -> Numbers:
    """Of tokens that all count; differentiable."""
    z = x.logsumexp(-1)
    s = 1 / (1 + (-x).exp()) if scoring == "sigmoid" else (x - z[:, None]).exp()
    shares = s / s.sum(-1, keepdim=True)
    weights = s.gather(1, ids)
    if order == "topk_then_softmax":
        weights = (x.gather(1, ids) - x.gather(1, ids).logsumexp(-1, keepdim=True)).exp()
    elif renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Numbers(routed_scale * weights, shares.sum(0), z)


def joint_loss(*values: Tensor) -> Tensor:
    """Of all that is given, every number by a factor of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for value in values:
        factors = torch.linspace(-1, 1.5, value.numel(), dtype=torch.float64).cos()
        total = total + (value.double().reshape(-1) * factors).sum()
    return total


def truth(
    x: Tensor, ids: Tensor, options: dict[str, Any], dtype: torch.dtype = torch.float64
) -> tuple[Numbers, Tensor]:
    """The numbers of a choice in float64, or another dtype, and the gradient of ``joint_loss``."""
    wide = x.detach().to(dtype).requires_grad_()
    found = numbers(wide, ids, **options)
    (slope,) = torch.autograd.grad(joint_loss(*found), wide)
    return Numbers(*(v.detach() for v in found)), slope


def joint(x: Tensor, found: moe.Routing) -> Tensor:
    """The gradient of ``joint_loss`` through a routing."""
    return torch.autograd.grad(joint_loss(found.topk_weights, found.prob_sums, found.logsumexp), x)[
        0
    ]


def assert_same(a: Any, b: Any, rtol: float = 0, atol: float = 0) -> None:
    for x, y in zip(a, b, strict=True):
        if isinstance(x, Tensor) and not x.is_floating_point():
            assert torch.equal(x, y)
        elif isinstance(x, Tensor):
            torch.testing.assert_close(x, y, rtol=rtol, atol=atol)
        else:
            assert_same(x, y) if isinstance(x, tuple) else None
