"""Squared errors of a log-ratio or a margin."""

from __future__ import annotations

from torch import Tensor

from ._common import Row, columns, count, reduce


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    chosen_lengths: Row | None = None,
    rejected_lengths: Row | None = None,
    *,
    tau: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr, nc, nr = columns(
        (policy_chosen_logps, policy_rejected_logps),
        (ref_chosen_logps, ref_rejected_logps, count(chosen_lengths), count(rejected_lengths)),
    )
    return reduce(((pc - rc) / nc - (pr - rr) / nr - 1 / (2 * tau)) ** 2, reduction)


def online_ipo_loss(
    policy_logps_1: Tensor,
    policy_logps_2: Tensor,
    ref_logps_1: Row,
    ref_logps_2: Row,
    preference: Row = 1.0,
    lengths_1: Row | None = None,
    lengths_2: Row | None = None,
    *,
    tau: float = 0.1,
    reduction: str = "mean",
) -> Tensor:
    p1, p2, r1, r2, p, n1, n2 = columns(
        (policy_logps_1, policy_logps_2),
        (ref_logps_1, ref_logps_2, preference, count(lengths_1), count(lengths_2)),
    )
    return reduce(((p1 - r1) / n1 - (p2 - r2) / n2 - (p - 0.5) / tau) ** 2, reduction)


def inpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    iterate_chosen_logps: Row,
    iterate_rejected_logps: Row,
    label: Row = 1.0,
    *,
    eta: float = 0.0075,
    tau: float = 0.0025,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr, tc, tr, p = columns(
        (policy_chosen_logps, policy_rejected_logps),
        (ref_chosen_logps, ref_rejected_logps, iterate_chosen_logps, iterate_rejected_logps, label),
    )
    h = (pc - pr) - tau / eta * (rc - rr) - (eta - tau) / eta * (tc - tr)
    return reduce((h - (p - 0.5) / eta) ** 2, reduction)


def sppo_loss(
    policy_logps: Tensor,
    ref_logps: Row,
    win_rate: Row,
    *,
    eta: float = 1e3,
    reduction: str = "mean",
) -> Tensor:
    l, r, p = columns((policy_logps,), (ref_logps, win_rate))
    return reduce(((l - r) - eta * (p - 0.5)) ** 2, reduction)


def sppo_hard_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    *,
    beta: float = 1e-3,
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr = columns(
        (policy_chosen_logps, policy_rejected_logps), (ref_chosen_logps, ref_rejected_logps)
    )
    return reduce((pc - rc - 0.5 / beta) ** 2 + (pr - rr + 0.5 / beta) ** 2, reduction)


def srpo_loss(
    chosen_given_rejected_logratios: Tensor,
    rejected_given_chosen_logratios: Tensor,
    rejected_given_rejected_logratios: Tensor,
    chosen_given_chosen_logratios: Tensor,
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    label: Row = 1.0,
    *,
    beta: float,
    alpha: float = 0.5,
    joint_weight: float | None = None,
    improvement_weight: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    t_wl, t_lw, t_ll, t_ww, g_w, g_l, p = columns(
        (
            chosen_given_rejected_logratios,
            rejected_given_chosen_logratios,
            rejected_given_rejected_logratios,
            chosen_given_chosen_logratios,
            chosen_logratios,
            rejected_logratios,
        ),
        (label,),
    )
    p = p - 0.5
    improvement = 0.5 * ((p - beta * (t_wl - t_ll)) ** 2 + (p + beta * (t_lw - t_ww)) ** 2)
    joint = (p - beta / 2 * (t_wl - t_lw + g_w - g_l)) ** 2
    w_joint = 1 - alpha if joint_weight is None else joint_weight
    w_improvement = alpha if improvement_weight is None else improvement_weight
    return reduce(w_joint * joint + w_improvement * improvement, reduction)
