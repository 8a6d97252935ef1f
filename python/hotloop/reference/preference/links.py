"""Other links: hinge, reverse KL, sigmoids, sorted margins."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._common import Row, columns, logistic, reduce, softplus


def slic_hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row | None = None,
    ref_rejected_logps: Row | None = None,
    target_logps: Tensor | None = None,
    *,
    beta: float | None = None,
    delta: float = 1.0,
    sft_weight: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, target, rc, rr = columns(
        (policy_chosen_logps, policy_rejected_logps, target_logps),
        (ref_chosen_logps, ref_rejected_logps),
    )
    if beta is None:
        beta = 1.0 if ref_chosen_logps is None else 0.1
    hinge = torch.relu(delta - beta * ((pc - rc) - (pr - rr)))
    return reduce(
        hinge if target_logps is None else hinge - (sft_weight or 0.0) * target, reduction
    )


def exo_pair_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr = columns(
        (policy_chosen_logps, policy_rejected_logps), (ref_chosen_logps, ref_rejected_logps)
    )
    x = beta * ((pc - rc) - (pr - rr))
    chosen = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-label_smoothing))
    rejected = torch.sigmoid(-x) * (logsigmoid(-x) - math.log(label_smoothing))
    return reduce(chosen + rejected, reduction)


def apo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    *,
    variant: str = "zero",
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr = columns(
        (policy_chosen_logps, policy_rejected_logps), (ref_chosen_logps, ref_rejected_logps)
    )
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    if variant == "zero":
        return reduce(torch.sigmoid(-chosen) + torch.sigmoid(rejected), reduction)
    return reduce(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), reduction)


def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    paired: bool = True,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr = columns(
        (policy_chosen_logps, policy_rejected_logps), (ref_chosen_logps, ref_rejected_logps)
    )
    better, worse = (pc - pr, rc - rr) if paired else (pc - rc, pr - rr)
    gap = torch.sort(better).values - torch.sort(worse).values
    return reduce(logistic(beta * gap, 1 - label_smoothing), reduction)


def nca_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr = columns(
        (policy_chosen_logps, policy_rejected_logps), (ref_chosen_logps, ref_rejected_logps)
    )
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    return reduce(softplus(-chosen) + 0.5 * softplus(chosen) + 0.5 * softplus(rejected), reduction)
