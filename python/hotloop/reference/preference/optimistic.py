"""DPO plus a term that is linear in the log-probability of a third answer."""

from __future__ import annotations

from torch import Tensor

from ._common import Row, columns, count, reduce, reduce_with, softplus

RPO_ETA = 0.005
"""Weight of the SFT term in the authors' Zephyr recipe."""


def vpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    policy_calibration_logps: Tensor,
    ref_calibration_logps: Row = 0.0,
    *,
    alpha: float,
    beta: float = 0.1,
    mode: str = "offline",
    reduction: str = "mean",
) -> Tensor:
    pc, pr, cal, rc, rr, ref_cal = columns(
        (policy_chosen_logps, policy_rejected_logps, policy_calibration_logps),
        (ref_chosen_logps, ref_rejected_logps, ref_calibration_logps),
    )
    sign = 1.0 if mode == "online" else -1.0
    pair = softplus(-beta * ((pc - rc) - (pr - rr)))
    return reduce_with(pair, sign * alpha * beta * (cal - ref_cal), reduction)


def selm_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    policy_generated_logps: Tensor,
    ref_generated_logps: Row = 0.0,
    *,
    beta: float = 0.01,
    alpha: float = 0.001,
    reduction: str = "mean",
) -> Tensor:
    return vpo_loss(
        policy_chosen_logps,
        policy_rejected_logps,
        ref_chosen_logps,
        ref_rejected_logps,
        policy_generated_logps,
        ref_generated_logps,
        alpha=alpha,
        beta=beta,
        mode="online",
        reduction=reduction,
    )


def xpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    policy_ref_sample_logps: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1e-5,
    link: str = "logistic",
    reduction: str = "mean",
) -> Tensor:
    pc, pr, sample, rc, rr = columns(
        (policy_chosen_logps, policy_rejected_logps, policy_ref_sample_logps),
        (ref_chosen_logps, ref_rejected_logps),
    )
    h = (pc - rc) - (pr - rr)
    pair = softplus(-beta * h) if link == "logistic" else (h - 1 / (2 * beta)) ** 2
    return reduce(pair + alpha * sample, reduction)


def rpo_sft_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    chosen_lengths: Row | None = None,
    *,
    beta: float = 0.01,
    eta: float | None = None,
    alpha: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr, nc = columns(
        (policy_chosen_logps, policy_rejected_logps),
        (ref_chosen_logps, ref_rejected_logps, count(chosen_lengths)),
    )
    pair = softplus(-beta * ((pc - rc) - (pr - rr)))
    if alpha is not None:
        return reduce(pair - alpha * pc / nc, reduction)
    return reduce(pair - (RPO_ETA if eta is None else eta) * beta * pc, reduction)


def hypo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    policy_online_logps: Tensor,
    ref_online_logps: Tensor,
    *,
    kl_weight: float,
    beta: float = 0.1,
    num_samples: int = 2,
    weight_clip: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, lo, rc, rr, ro = columns(
        (policy_chosen_logps, policy_rejected_logps, policy_online_logps),
        (ref_chosen_logps, ref_rejected_logps, ref_online_logps),
    )
    pair = softplus(-beta * ((pc - rc) - (pr - rr)))
    lo, ro = lo.reshape(-1, num_samples), ro.reshape(-1, num_samples)
    w = (lo - ro).detach()
    if weight_clip is not None:
        w = w.clamp(-weight_clip, weight_clip)
    if num_samples > 1:
        others = (w.sum(1, keepdim=True) - w) / (num_samples - 1)
        w = w - others
    return reduce_with(pair, kl_weight * (w * lo).mean(1), reduction)
