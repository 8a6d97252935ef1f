"""One answer at a time, marked good or bad."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import Row, columns, reduce, softplus


def kto_loss(
    policy_logps: Tensor,
    ref_logps: Row,
    is_desirable: Tensor,
    policy_kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    *,
    kl: Row | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    l, r, y, lk, rk, z0 = columns(
        (policy_logps,), (ref_logps, is_desirable, policy_kl_logps, ref_kl_logps, kl)
    )
    if kl is None:
        z0 = (lk - rk).mean().clamp(min=0)
    x = beta * (l - r - z0)
    good = desirable_weight * torch.sigmoid(-x)
    bad = undesirable_weight * torch.sigmoid(x)
    return reduce(torch.where(y == 1, good, bad), reduction)


def bco_loss(
    policy_logps: Tensor,
    ref_logps: Row,
    is_desirable: Tensor,
    density_weights: Row = 1.0,
    *,
    delta: Row = 0.0,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    l, r, y, rho, shift = columns(
        (policy_logps,), (ref_logps, is_desirable, density_weights, delta)
    )
    x = beta * (l - r) - shift
    return reduce(torch.where(y == 1, softplus(-x), rho * softplus(x)), reduction)


def bco_pair_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    *,
    delta: Row = 0.0,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr, shift = columns(
        (policy_chosen_logps, policy_rejected_logps), (ref_chosen_logps, ref_rejected_logps, delta)
    )
    chosen, rejected = beta * (pc - rc) - shift, beta * (pr - rr) - shift
    return reduce(softplus(-chosen) + softplus(rejected), reduction)
