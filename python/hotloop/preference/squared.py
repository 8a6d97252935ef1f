# SPDX-License-Identifier: Apache-2.0
"""Squared errors of a log-ratio or a margin: IPO, the Nash methods, SPPO, SRPO."""

from __future__ import annotations

from torch import Tensor

from ..core import pointwise
from ..core.columns import count, probability, tokens
from ..core.pointwise import Reduction, Row
from ..front import check
from ..front.impl import Impl
from ..front.ranges import above, at_least
from ._pair import PAIR, REF


def _inpo_head(eta: float, tau: float) -> tuple[str, tuple[float, ...]]:
    tau = check.number(
        "inpo_loss", "tau", tau, at_least=0, at_most=eta, hint="tau may not exceed eta."
    )
    return "inpo", (tau / eta, 1.0 / eta)


def _srpo_head(
    beta: float, alpha: float, joint_weight: float | None, improvement_weight: float | None
) -> tuple[str, tuple[float, ...]]:
    joint = 1 - alpha if joint_weight is None else joint_weight
    return "srpo", (beta, joint, alpha if improvement_weight is None else improvement_weight)


@pointwise.loss(
    grad=PAIR,
    row=(*REF, "chosen_lengths", "rejected_lengths"),
    head=lambda tau: ("ipo", (1.0 / tau,)),
    ranges={"tau": above(0), "chosen_lengths": tokens, "rejected_lengths": tokens},
    together=(("chosen_lengths", "rejected_lengths"),),
)
def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Row | None = None,
    rejected_lengths: Row | None = None,
    *,
    tau: float = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Identity preference optimization: the margin is regressed on 1 / (2 tau).

    loss_i = (dw_i / nc_i - dl_i / nr_i - 1 / (2 tau))^2, dw = policy_chosen - ref_chosen, dl =
    policy_rejected - ref_rejected, lengths 1 where left out (the paper's equation). TRL divides by
    the lengths, which its authors say the paper's results used: pass them for parity. Values reach
    25 at tau = 0.1.

    Args:
        tau: strength of the regularisation, > 0; TRL calls it beta. Default 0.1.

    Examples:
        >>> z = torch.zeros(2)
        >>> float(ipo_loss(z, z, z, z, tau=0.25))
        4.0

    Reference:
        Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    chosen = (policy_chosen_logps - ref_chosen_logps) / count(chosen_lengths)
    rejected = (policy_rejected_logps - ref_rejected_logps) / count(rejected_lengths)
    return (chosen - rejected - 1 / (2 * tau)) ** 2


@pointwise.loss(
    grad=("policy_logps_1", "policy_logps_2"),
    row=("ref_logps_1", "ref_logps_2", "lengths_1", "lengths_2", "preference"),
    head=lambda tau: ("online_ipo", (1.0 / tau,)),
    ranges={"tau": above(0), "preference": probability, "lengths_1": tokens, "lengths_2": tokens},
    together=(("lengths_1", "lengths_2"),),
)
def online_ipo_loss(
    policy_logps_1: Tensor,
    policy_logps_2: Tensor,
    ref_logps_1: Tensor,
    ref_logps_2: Tensor,
    preference: Row = 1.0,
    lengths_1: Row | None = None,
    lengths_2: Row | None = None,
    *,
    tau: float = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """IPO on two samples and the probability that the first is preferred (online IPO, IPO-MD).

    loss_i = (d1_i / n1_i - d2_i / n2_i - (preference_i - 1/2) / tau)^2, d = policy - reference
    log-probability, lengths 1 where left out. Where the answers come from is the method: from the
    policy (online IPO) or from a geometric mixture of policy and reference (IPO-MD); no gradient
    flows through the sampling.

    Args:
        preference: P(first preferred to second) in [0, 1], shape (n,) or a number; a tensor's range
            is not checked. Default 1.
        lengths_1: tokens of the first answer, shape (n,) or a number, or None. Default None.
        lengths_2: tokens of the second answer, given together with lengths_1. Default None.
        tau: strength of the regularisation, > 0. Default 0.1.

    Examples:
        >>> z = torch.zeros(2)
        >>> float(online_ipo_loss(z, z, z, z, torch.tensor([0.5, 1.0]), tau=0.25))
        2.0

    Reference:
        Calandriello et al. 2024, arXiv:2403.08635.
    """
    first = (policy_logps_1 - ref_logps_1) / count(lengths_1)
    second = (policy_logps_2 - ref_logps_2) / count(lengths_2)
    return (first - second - (preference - 0.5) / tau) ** 2


@pointwise.loss(
    grad=PAIR,
    row=(*REF, "iterate_chosen_logps", "iterate_rejected_logps", "label"),
    head=_inpo_head,
    ranges={"eta": above(0), "label": probability},
)
def inpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    iterate_chosen_logps: Tensor,
    iterate_rejected_logps: Tensor,
    label: Row = 1.0,
    *,
    eta: float = 0.0075,
    tau: float = 0.0025,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Iterative Nash policy optimization: IPO against a blend of reference and current iterate.

    h_i = (policy_chosen - policy_rejected) - tau / eta * (ref_chosen - ref_rejected) - (eta - tau)
    / eta * (iterate_chosen - iterate_rejected), loss_i = (h_i - (label_i - 1/2) / eta)^2. tau = eta
    is IPO against the reference, tau = 0 IPO against the iterate. The defaults (eta, and tau a
    third of it) are from memory of the authors' recipe, not confirmed. One public trainer of this
    name computes a loss per answer instead (SPPO's): this is the paper's.

    Args:
        iterate_chosen_logps: log-probability of the preferred answer under the frozen current
            iterate, the policy of the last round, shape (n,).
        iterate_rejected_logps: the same of the other answer, shape (n,).
        label: P(chosen preferred) in [0, 1], shape (n,) or a number. Default 1.
        eta: inverse step of mirror descent, > 0. Default 0.0075.
        tau: strength of the KL to the reference, in [0, eta]. Default 0.0025.

    Examples:
        >>> z = torch.zeros(2)
        >>> float(inpo_loss(z, z, z, z, z, z, eta=0.5, tau=0.25))
        1.0

    Reference:
        Zhang et al. 2024, arXiv:2407.00617.
    """
    anchor = tau / eta * (ref_chosen_logps - ref_rejected_logps)
    anchor = anchor + (eta - tau) / eta * (iterate_chosen_logps - iterate_rejected_logps)
    return (policy_chosen_logps - policy_rejected_logps - anchor - (label - 0.5) / eta) ** 2


@pointwise.loss(
    grad=("policy_logps",),
    row=("ref_logps", "win_rate"),
    ranges={"eta": above(0), "win_rate": probability},
)
def sppo_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    win_rate: Row,
    *,
    eta: float = 1e3,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Self-play preference optimization of single answers with estimated win rates.

    loss_i = (policy_i - ref_i - eta * (win_rate_i - 1/2))^2, the reference being the previous
    iterate. Targets reach eta / 2 = 500 nats by default and losses their square: scale the loss,
    keep float32.

    Args:
        ref_logps: the same under the previous iterate, which drew the answer, shape (n,).
        win_rate: estimate of P(answer beats the previous iterate) in [0, 1], shape (n,) or a
            number. On CUDA the range is read under HOTLOOP_CHECK=1 only.
        eta: step, > 0; the inverse of TRL's beta. Default 1000.

    Examples:
        >>> z = torch.zeros(2)
        >>> float(sppo_loss(z, z, torch.tensor([0.5, 1.0]), eta=2.0))
        0.5

    Reference:
        Wu et al. 2024, arXiv:2405.00675, eq. 4.7.
    """
    return (policy_logps - ref_logps - eta * (win_rate - 0.5)) ** 2


@pointwise.loss(
    grad=PAIR, row=REF, head=lambda beta: ("sppo_hard", (1.0 / beta,)), ranges={"beta": above(0)}
)
def sppo_hard_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 1e-3,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Self-play preference optimization of a pair with win rates 1 and 0 (``sppo_hard`` in TRL).

    loss_i = (policy_chosen - ref_chosen - 1 / (2 beta))^2 + (policy_rejected - ref_rejected + 1 /
    (2 beta))^2: ``sppo_loss`` of both answers with eta = 1 / beta, added.

    Args:
        beta: inverse of the step eta, > 0. Default 0.001.

    Examples:
        >>> z = torch.zeros(2)
        >>> float(sppo_hard_loss(z, z, z, z, beta=0.5))
        2.0

    Reference:
        Wu et al. 2024, arXiv:2405.00675, eq. 4.7.
    """
    chosen = policy_chosen_logps - ref_chosen_logps - 0.5 / beta
    return chosen**2 + (policy_rejected_logps - ref_rejected_logps + 0.5 / beta) ** 2


@pointwise.loss(
    grad=(
        "chosen_given_rejected_logratios",
        "rejected_given_chosen_logratios",
        "rejected_given_rejected_logratios",
        "chosen_given_chosen_logratios",
        "chosen_logratios",
        "rejected_logratios",
    ),
    row=("label",),
    head=_srpo_head,
    ranges={
        "beta": above(0),
        "alpha": above(0, below=1),
        "joint_weight": at_least(0),
        "improvement_weight": at_least(0),
        "label": probability,
    },
)
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
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Self-improving robust preference optimization: a policy and its improver in one network.

    With q = label - 1/2: improvement_i = [(q - beta * (t_wl - t_ll))^2 + (q + beta * (t_lw -
    t_ww))^2] / 2, joint_i = (q - beta / 2 * (t_wl - t_lw + g_w - g_l))^2, loss_i = (1 - alpha)
    joint_i + alpha improvement_i. All six inputs are log-ratios, policy minus reference, summed
    over tokens: t_ab of answer a after a prompt that shows answer b, g_a of answer a after the
    plain prompt (w chosen, l rejected). Re-derived from the paper's min-max objective, not read
    from its code: which of the two terms alpha weighs, and the values of beta and alpha, are not
    confirmed (the minimiser is the same for every alpha inside (0, 1)).

    Args:
        chosen_given_rejected_logratios: t_wl, shape (n,), nats. Differentiable, like all six.
        rejected_given_chosen_logratios: t_lw, shape (n,).
        rejected_given_rejected_logratios: t_ll, repeating the rejected answer, shape (n,).
        chosen_given_chosen_logratios: t_ww, repeating the chosen answer, shape (n,).
        chosen_logratios: g_w, shape (n,).
        rejected_logratios: g_l, shape (n,).
        label: P(chosen preferred) in [0, 1], shape (n,) or a number. Default 1.
        beta: strength of the regularisation, > 0. No default: the paper tunes it.
        alpha: share of the improvement term, in (0, 1). Default 0.5.
        joint_weight: weight of the joint term, >= 0. Default 1 - alpha.
        improvement_weight: weight of the improvement term, >= 0. Default alpha.

    Examples:
        >>> z = torch.zeros(2)
        >>> float(srpo_loss(z, z, z, z, z, z, beta=0.1))
        0.25

    Reference:
        Choi et al. 2024, arXiv:2406.01660.
    """
    y = label - 0.5
    better = chosen_given_rejected_logratios - rejected_given_rejected_logratios
    worse = rejected_given_chosen_logratios - chosen_given_chosen_logratios
    improvement = 0.5 * ((y - beta * better) ** 2 + (y + beta * worse) ** 2)
    gap = chosen_given_rejected_logratios - rejected_given_chosen_logratios
    joint = (y - beta / 2 * (gap + chosen_logratios - rejected_logratios)) ** 2
    w_joint = 1 - alpha if joint_weight is None else joint_weight
    w_improvement = alpha if improvement_weight is None else improvement_weight
    return w_joint * joint + w_improvement * improvement
