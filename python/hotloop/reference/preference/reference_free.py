"""Losses that need no reference model."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import Row, columns, count, logistic, reduce, softplus

LOG_ODDS_CAP = -(2.0**-24)


def _log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) by whichever form does not cancel."""
    near = a > -math.log(2)
    left = torch.log(-torch.expm1(torch.where(near, a, -0.1)))
    return torch.where(near, left, torch.log1p(-torch.exp(torch.where(near, -1.0, a))))


def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_nll: Tensor,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    ac, ar, nll = columns((policy_chosen_logps, policy_rejected_logps, chosen_nll))
    ac, ar = ac.clamp(max=LOG_ODDS_CAP), ar.clamp(max=LOG_ODDS_CAP)
    odds = (ac - _log1mexp(ac)) - (ar - _log1mexp(ar))
    return reduce(nll + beta * softplus(-odds), reduction)


def cpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_nll: Tensor | None = None,
    chosen_lengths: Row | None = None,
    rejected_lengths: Row | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: Row = 0.0,
    cpo_alpha: float = 1.0,
    alpha: float = 0.0,
    gamma: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, nll, nc, nr, eps = columns(
        (policy_chosen_logps, policy_rejected_logps, chosen_nll),
        (count(chosen_lengths), count(rejected_lengths), label_smoothing),
    )

    def reward(u: Tensor) -> Tensor:
        return u if alpha == 0 else -torch.expm1(-alpha * u) / alpha

    x = beta * (reward(pc / nc) - reward(pr / nr)) - gamma
    return reduce(logistic(x, 1 - eps) + cpo_alpha * nll, reduction)


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Row | None = None,
    rejected_lengths: Row | None = None,
    chosen_nll: Tensor | None = None,
    *,
    beta: float = 2.5,
    gamma: float = 1.25,
    label_smoothing: Row = 0.0,
    cpo_alpha: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    return cpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        chosen_nll,
        chosen_lengths,
        rejected_lengths,
        beta=beta,
        label_smoothing=label_smoothing,
        cpo_alpha=cpo_alpha,
        gamma=gamma,
        reduction=reduction,
    )


def _advantage(logps: Tensor, ref: Tensor, alpha: float, gamma: float) -> Tensor:
    if logps.ndim == 1:
        return logps
    steps = torch.arange(logps.shape[1], dtype=logps.dtype, device=logps.device)
    return alpha * ((logps - ref) * gamma**steps).sum(1)


def cpl_loss(
    segment_logps_1: Tensor,
    segment_logps_2: Tensor,
    ref_logps_1: Tensor | None = None,
    ref_logps_2: Tensor | None = None,
    label: Row = 1.0,
    *,
    alpha: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.5,
    bc_coeff: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    l1, l2, r1, r2, y = columns(
        (segment_logps_1, segment_logps_2), (ref_logps_1, ref_logps_2, label)
    )
    a1, a2 = _advantage(l1, r1, alpha, gamma), _advantage(l2, r2, alpha, gamma)
    loss = y * softplus(lam * a1 - a2) + (1 - y) * softplus(lam * a2 - a1)
    if bc_coeff:
        loss = loss - bc_coeff * 0.5 * (l1.mean(1) + l2.mean(1))
    return reduce(loss, reduction)


def cpl_dense_loss(
    segment_logps: Tensor,
    scores: Tensor,
    ref_logps: Tensor | None = None,
    *,
    alpha: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.5,
    bc_coeff: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    l, r = columns((segment_logps,), (ref_logps,))
    a = _advantage(l, r, alpha, gamma)[torch.argsort(scores, stable=True)]
    worse, better = torch.triu_indices(len(a), len(a), offset=1, device=a.device)
    loss = reduce(softplus(lam * a[worse] - a[better]), reduction)
    return loss - bc_coeff * l.mean() if bc_coeff else loss
