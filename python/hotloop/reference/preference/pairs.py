"""A logistic link on the margin of a pair."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._common import Row, columns, count, logistic, reduce, softplus


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    *,
    beta: float = 0.1,
    f_divergence: str = "reverse_kl",
    alpha: float = 0.5,
    conditional_reference: bool = False,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr = columns(
        (policy_chosen_logps, policy_rejected_logps), (ref_chosen_logps, ref_rejected_logps)
    )
    if conditional_reference:
        return reduce(softplus(-beta * ((pc - pr) - torch.clamp(rc - rr, min=0))), reduction)

    def score(u: Tensor) -> Tensor:
        if f_divergence == "forward_kl":
            return -torch.expm1(torch.clamp(-u, max=80))
        if f_divergence == "js":
            return math.log(2) - softplus(-u)
        if f_divergence == "alpha":
            return torch.expm1(torch.clamp((alpha - 1) * u, max=80)) / (alpha - 1)
        return u

    return reduce(softplus(-beta * (score(pc - rc) - score(pr - rr))), reduction)


def conservative_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    *,
    beta: float = 0.1,
    label_smoothing: Row = 0.1,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr, eps = columns(
        (policy_chosen_logps, policy_rejected_logps),
        (ref_chosen_logps, ref_rejected_logps, label_smoothing),
    )
    return reduce(logistic(beta * ((pc - rc) - (pr - rr)), 1 - eps), reduction)


def robust_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    *,
    beta: float = 0.1,
    label_smoothing: Row = 0.1,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr, eps = columns(
        (policy_chosen_logps, policy_rejected_logps),
        (ref_chosen_logps, ref_rejected_logps, label_smoothing),
    )
    x = beta * ((pc - rc) - (pr - rr))
    return reduce(((1 - eps) * softplus(-x) - eps * softplus(x)) / (1 - 2 * eps), reduction)


def dpo_norm_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    chosen_lengths: Row,
    rejected_lengths: Row,
    *,
    beta: float = 5.0,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr, nc, nr = columns(
        (policy_chosen_logps, policy_rejected_logps),
        (ref_chosen_logps, ref_rejected_logps, count(chosen_lengths), count(rejected_lengths)),
    )
    return reduce(softplus(-beta * ((pc - rc) / nc - (pr - rr) / nr)), reduction)


def flex_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    *,
    beta_chosen: float = 0.1,
    beta_rejected: float = 0.08,
    sft_weight: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr = columns(
        (policy_chosen_logps, policy_rejected_logps), (ref_chosen_logps, ref_rejected_logps)
    )
    return reduce(
        softplus(-(beta_chosen * (pc - rc) - beta_rejected * (pr - rr))) - sft_weight * pc,
        reduction,
    )


def dno_loss(
    policy_logps_1: Tensor,
    policy_logps_2: Tensor,
    ref_logps_1: Row,
    ref_logps_2: Row,
    win_rate_gap: Row | None = None,
    *,
    label: Row | None = None,
    eta: float = 0.1,
    gap_scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    p1, p2, r1, r2, gap, q = columns(
        (policy_logps_1, policy_logps_2), (ref_logps_1, ref_logps_2, win_rate_gap, label)
    )
    if label is None:
        q = torch.sigmoid(gap_scale * gap)
    return reduce(logistic(eta * ((p1 - r1) - (p2 - r2)), q), reduction)


def drift_iterative_dpo_loss(
    policy_fresh_logps: Tensor,
    policy_dissatisfied_logps: Tensor,
    ref_fresh_logps: Row,
    ref_dissatisfied_logps: Row,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    return dpo_loss(
        policy_fresh_logps,
        policy_dissatisfied_logps,
        ref_fresh_logps,
        ref_dissatisfied_logps,
        beta=beta,
        reduction=reduction,
    )
