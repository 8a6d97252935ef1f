# SPDX-License-Identifier: Apache-2.0
"""Layers of a residual stream with a state across depth, in plain torch: float32 inside, float64 for float64."""

from __future__ import annotations

import torch
from torch import Tensor

from .results import (
    AdamState,
    AdamStep,
    Dispatch,
    MomentumStep,
    Norm,
    ResidualStep,
    RobustMomentumCoefficients,
    RobustMomentumStep,
)
from .rows import weighted_sum

Number = float | Tensor


def residual_smoe_layer(
    x: Tensor,
    z: Tensor,
    topk_weights: Tensor | None = None,
    dispatch: Dispatch | None = None,
    *,
    shared: Tensor | None = None,
    norm: Norm | None = None,
    post_norm: bool = False,
) -> ResidualStep:
    h = _wide(x) + _mixture(z, topk_weights, dispatch, shared)
    return ResidualStep(*_finish(x, h, norm, post_norm))


def momentum_smoe_layer(
    x: Tensor,
    m: Tensor | None,
    z: Tensor,
    topk_weights: Tensor | None = None,
    dispatch: Dispatch | None = None,
    *,
    mu: Number = 0.7,
    gamma: Number = 1.0,
    shared: Tensor | None = None,
    norm: Norm | None = None,
    post_norm: bool = False,
) -> MomentumStep:
    step = _number(gamma, x) * _mixture(z, topk_weights, dispatch, shared)
    new = step if m is None else _number(mu, x) * m.to(step.dtype) + step
    out, normed = _finish(x, _wide(x) - new, norm, post_norm)
    return MomentumStep(out, _state(x, m, new), normed)


def adam_smoe_layer(
    x: Tensor,
    state: AdamState | None,
    z: Tensor,
    topk_weights: Tensor | None = None,
    dispatch: Dispatch | None = None,
    *,
    is_first: bool,
    betas: tuple[float, float] = (0.9, 0.999),
    gamma1: float = 1.0,
    mu: Number = 0.7,
    gamma2: Number = 1.0,
    kappa: float = 1.0,
    eps: float = 1e-8,
    shared: Tensor | None = None,
    norm: Norm | None = None,
    post_norm: bool = False,
) -> AdamStep:
    before = AdamState(None, None, None) if state is None else state
    if not is_first:
        step = momentum_smoe_layer(
            x, before.m, z, topk_weights, dispatch, mu=mu, gamma=gamma2, shared=shared, norm=norm, post_norm=post_norm
        )  # fmt: skip
        return AdamStep(step.x, AdamState(before.p, before.v, step.m), step.normed)
    found = _mixture(z, topk_weights, dispatch, shared)
    p, v, m = (torch.zeros_like(found) if s is None else s.to(found.dtype) for s in before)
    m = _number(mu, x) * m + _number(gamma2, x) * found
    p = betas[0] * p + (1 - betas[0]) * found
    v = betas[1] * v + (1 - betas[1]) * found**2
    h = (1 - kappa) * _wide(x) - gamma1 * p / torch.sqrt(v + eps)
    out, normed = _finish(x, h, norm, post_norm)
    p, v, m = (_state(x, old, new) for old, new in zip(before, (p, v, m)))
    return AdamStep(out, AdamState(p, v, m), normed)


def robust_momentum_smoe_layer(
    x: Tensor,
    d: Tensor | None,
    z: Tensor,
    topk_weights: Tensor | None = None,
    dispatch: Dispatch | None = None,
    *,
    mu: Number,
    gamma: Number,
    alpha: Number = 0.0,
    shared: Tensor | None = None,
    norm: Norm | None = None,
    post_norm: bool = False,
) -> RobustMomentumStep:
    step = _number(gamma, x) * _mixture(z, topk_weights, dispatch, shared)
    new = -step if d is None else _number(mu, x) * d.to(step.dtype) - step
    kept = _state(x, d, new)
    if post_norm or norm is None:
        out, normed = _finish(x, _wide(x) + new, norm, post_norm)
        return RobustMomentumStep(out, kept, normed)
    out = (_wide(x) + new).to(x.dtype)
    return RobustMomentumStep(out, kept, lookahead(out, kept, alpha, norm=norm))


def robust_momentum_coefficients(L: float, k: float, lam: float) -> RobustMomentumCoefficients:
    """p = lam (1 - 1/k) + (1 - lam) (1 - 1/sqrt(k)), and what follows from it."""
    p = lam * (1 - 1 / k) + (1 - lam) * (1 - k**-0.5)
    bend = (1 - p) ** 2 * (1 + p)
    return RobustMomentumCoefficients(k * bend / L, k * p**3 / (k - 1), p**3 / ((k - 1) * bend), p)


def lookahead(x: Tensor, d: Tensor | None, alpha: Number, *, norm: Norm | None = None) -> Tensor:
    ahead = _wide(x)
    if d is not None:
        ahead = ahead + _number(alpha, x) * d.to(ahead.dtype)
    return ahead.to(x.dtype) if norm is None else normalized(ahead, norm, x.dtype)


def normalized(h: Tensor, norm: Norm, dtype: torch.dtype) -> Tensor:
    """``norm`` of the rows of h, computed in its dtype."""
    if norm.kind == "layer":
        h = h - h.mean(-1, keepdim=True)
    out = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        out = out * norm.weight.to(h.dtype)
    if norm.bias is not None:
        out = out + norm.bias.to(h.dtype)
    return out.to(dtype)


def _finish(
    x: Tensor, h: Tensor, norm: Norm | None, post_norm: bool
) -> tuple[Tensor, Tensor | None]:
    """The new residual stream, and the norm of the numbers that are stored."""
    out = h.to(x.dtype)
    if norm is None:
        return out, None
    normed = normalized(_wide(out), norm, x.dtype)
    return (normed, None) if post_norm else (out, normed)


def _mixture(
    z: Tensor, topk_weights: Tensor | None, dispatch: Dispatch | None, shared: Tensor | None
) -> Tensor:
    """(T, D): z itself, or the weighted sum of expert rows; then the shared expert."""
    if topk_weights is None or dispatch is None:
        found = _wide(z)
    else:
        found = weighted_sum(z, topk_weights, dispatch)
    return found if shared is None else found + shared.to(found.dtype)


def _state(x: Tensor, old: Tensor | None, new: Tensor) -> Tensor:
    """A state in the dtype it came in, a first one in that of the arithmetic."""
    return new if old is None else new.to(old.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _number(value: Number, x: Tensor) -> Number:
    """A number, or a tensor of one in the dtype of the arithmetic."""
    if not isinstance(value, Tensor):
        return value
    return value.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
