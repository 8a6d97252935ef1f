# SPDX-License-Identifier: Apache-2.0
"""A logistic link on the margin of a pair, with a reference: DPO and its nearest relatives."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..core import pointwise
from ..core.columns import Probability, count, exact, probability, tokens
from ..core.pointwise import Reduction, Row, logistic, softplus
from ..front import check, declare
from ..front.impl import Impl
from ..front.ranges import above, at_least, number
from ._pair import PAIR, REF

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
_HEAD_OF_DIVERGENCE = {
    "reverse_kl": "dpo",
    "forward_kl": "dpo_forward_kl",
    "js": "dpo_js",
    "alpha": "dpo_alpha",
}


def _dpo_head(
    beta: float, f_divergence: Divergence, alpha: float, conditional_reference: bool
) -> tuple[str, tuple[float, ...]]:
    if f_divergence == "alpha" and alpha == 1:
        raise ValueError(
            "[dpo_loss] alpha: expected a number other than 1, got 1. Use 'reverse_kl'."
        )
    if conditional_reference:
        if f_divergence != "reverse_kl":
            raise ValueError(
                "[dpo_loss] conditional_reference: expected f_divergence='reverse_kl', got "
                f"{f_divergence!r}. Set one of the two."
            )
        return "dpo_conditional", (beta,)
    params = (beta, alpha - 1.0) if f_divergence == "alpha" else (beta,)
    return _HEAD_OF_DIVERGENCE[f_divergence], params


@pointwise.loss(grad=PAIR, row=REF, head=_dpo_head, ranges={"beta": above(0), "alpha": number})
def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    f_divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    conditional_reference: bool = False,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Direct preference optimization.

    loss_i = softplus(-beta * (s(dw_i) - s(dl_i))), dw = policy_chosen - ref_chosen, dl =
    policy_rejected - ref_rejected, and s(u) = u (reverse KL, the paper), 1 - exp(-u) (forward KL),
    log sigma(u) + log 2 (js) or (exp((alpha - 1) u) - 1) / (alpha - 1). With
    ``conditional_reference`` the reference margin counts only where it agrees with the label:
    loss_i = softplus(-beta * (policy margin - max(0, reference margin))). Exponents are capped at
    80, as TRL does for the alpha divergence; here the cap is there for the forward KL too.

    Args:
        beta: inverse temperature, > 0; the paper uses 0.1 to 0.5. Default 0.1.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha". Default "reverse_kl".
        alpha: order of the alpha divergence, not 1. Default 0.5.
        conditional_reference: see above; only with f_divergence="reverse_kl". Default False.

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(dpo_loss(z, z, z, z)), 4)
        0.6931

    Reference:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7. f-divergences: Wang et al. 2023,
        arXiv:2309.16240. Conditional reference: arXiv:2602.11902.
    """

    def score(u: Tensor) -> Tensor:
        if f_divergence == "forward_kl":
            return -torch.expm1(torch.clamp(-u, max=80))
        if f_divergence == "js":
            return math.log(2) - softplus(-u)
        if f_divergence == "alpha":
            return torch.expm1(torch.clamp((alpha - 1) * u, max=80)) / (alpha - 1)
        return u

    if conditional_reference:
        agreed = torch.clamp(ref_chosen_logps - ref_rejected_logps, min=0)
        return softplus(-beta * (policy_chosen_logps - policy_rejected_logps - agreed))
    chosen = score(policy_chosen_logps - ref_chosen_logps)
    return softplus(-beta * (chosen - score(policy_rejected_logps - ref_rejected_logps)))


@pointwise.loss(
    grad=PAIR,
    row=(*REF, "label_smoothing"),
    ranges={"beta": above(0), "label_smoothing": probability},
)
def conservative_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: Row = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """DPO with labels that may be wrong (cDPO): cross-entropy against a soft label.

    loss_i = (1 - e_i) softplus(-beta * h_i) + e_i softplus(beta * h_i), h = (policy_chosen -
    ref_chosen) - (policy_rejected - ref_rejected). A tensor of smoothings, one per pair, gives the
    losses of MCTS-DPO (e from visit counts) and UPO (e from uncertainty). TRL dropped label
    smoothing from its plain DPO loss.

    Args:
        label_smoothing: e, the probability that the label is wrong: a number in [0, 1], or shape
            (n,). On CUDA the range is read under HOTLOOP_CHECK=1 only. Default 0.1.

    Examples:
        >>> chosen, z = torch.tensor([3.0, -1.0]), torch.zeros(2)
        >>> e = torch.tensor([0.0, 0.5])
        >>> conservative_dpo_loss(chosen, z, z, z, beta=1.0, label_smoothing=e, reduction="none")
        tensor([0.0486, 0.8133])

    Reference:
        Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO". Per-pair
        smoothing: Xie et al. 2024, arXiv:2405.00451.
    """
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return logistic(beta * h, 1 - label_smoothing)


@pointwise.loss(
    grad=PAIR,
    row=(*REF, "label_smoothing"),
    ranges={"beta": above(0), "label_smoothing": Probability(below=0.5)},
)
def robust_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: Row = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """DPO that is unbiased under labels flipped at a known rate (rDPO).

    loss_i = [(1 - e) softplus(-beta * h_i) - e softplus(beta * h_i)] / (1 - 2 e), h =
    (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected); computed as softplus(-beta * h)
    - e / (1 - 2 e) * beta * h, which is the same number. Averaged over flips it is the DPO loss of
    the true labels. It has no lower bound in h: the slope never falls below beta * e / (1 - 2 e).

    Args:
        label_smoothing: e, the rate of flipped labels: a number in [0, 0.5), or shape (n,). On
            CUDA the range is read under HOTLOOP_CHECK=1 only. Default 0.1.

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(robust_dpo_loss(z, z, z, z)), 4)
        0.6931

    Reference:
        Ray Chowdhury et al. 2024, arXiv:2403.00409.
    """
    e = label_smoothing
    x = beta * (
        (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    )
    return ((1 - e) * softplus(-x) - e * softplus(x)) / (1 - 2 * e)


@pointwise.loss(
    grad=PAIR,
    row=(*REF, "chosen_lengths", "rejected_lengths"),
    ranges={"beta": above(0), "chosen_lengths": tokens, "rejected_lengths": tokens},
)
def dpo_norm_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Row,
    rejected_lengths: Row,
    *,
    beta: float = 5.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """DPO on log-ratios averaged over tokens (Tulu 3; ``sigmoid_norm`` in TRL).

    loss_i = softplus(-beta * (dw_i / nc_i - dl_i / nr_i)), dw = policy_chosen - ref_chosen, dl =
    policy_rejected - ref_rejected. Token counts below 1 count as 1.

    Args:
        beta: inverse temperature, > 0; of the order of the answers' length times a DPO beta.
            Default 5.

    Examples:
        >>> chosen, z = torch.tensor([10.0]), torch.zeros(1)
        >>> round(float(dpo_norm_loss(chosen, z, z, z, torch.tensor([20]), torch.tensor([30]))), 4)
        0.0789

    Reference:
        Lambert et al. 2024, arXiv:2411.15124 (length-normalized DPO).
    """
    chosen = (policy_chosen_logps - ref_chosen_logps) / count(chosen_lengths)
    rejected = (policy_rejected_logps - ref_rejected_logps) / count(rejected_lengths)
    return softplus(-beta * (chosen - rejected))


@pointwise.loss(
    grad=PAIR,
    row=REF,
    ranges={"beta_chosen": above(0), "beta_rejected": at_least(0), "sft_weight": at_least(0)},
)
def flex_dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta_chosen: float = 0.1,
    beta_rejected: float = 0.08,
    sft_weight: float = 0.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """DPO with a weaker push on the rejected answer (Flex-DPO).

    loss_i = softplus(-(beta_chosen * dw_i - beta_rejected * dl_i)) - sft_weight * policy_chosen_i,
    dw = policy_chosen - ref_chosen, dl = policy_rejected - ref_rejected. The paper calls the two
    betas adaptive but evaluates constants, and constants are what this is.

    Args:
        beta_chosen: strength on the preferred answer, > 0. Default 0.1.
        beta_rejected: strength on the other answer, >= 0; the best value reported is near 0.08.
            Default 0.08.
        sft_weight: weight of -policy_chosen_logps, >= 0. Default 0.

    Examples:
        >>> chosen, z = torch.tensor([5.0]), torch.zeros(1)
        >>> round(float(flex_dpo_loss(chosen, chosen, z, z)), 4)
        0.6444

    Reference:
        Yan et al. 2024, arXiv:2406.07327, sections 3.3 and 4.3.
    """
    chosen = beta_chosen * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta_rejected * (policy_rejected_logps - ref_rejected_logps)
    return softplus(rejected - chosen) - sft_weight * policy_chosen_logps


@declare.composed(ranges={"eta": above(0), "gap_scale": above(0), "label": probability})
def dno_loss(
    policy_logps_1: Tensor,
    policy_logps_2: Tensor,
    ref_logps_1: Tensor,
    ref_logps_2: Tensor,
    win_rate_gap: Row | None = None,
    *,
    label: Row | None = None,
    eta: float = 0.1,
    gap_scale: float = 1.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Direct Nash optimization: the gap of log-ratios is regressed on the gap of win rates.

    h_i = eta * ((policy_1 - ref_1) - (policy_2 - ref_2)), q_i = sigma(gap_scale * win_rate_gap_i)
    or the given label, loss_i = q_i softplus(-h_i) + (1 - q_i) softplus(h_i). The reference is the
    current iterate pi_t that the answers were drawn from, not the SFT model, and eta is a DPO beta,
    not its inverse. Win rates lie in [0, 1], so without gap_scale the label stays within sigma(-1)
    and sigma(1). label=1 is the paper's DNO-Prct on filtered pairs, which is DPO.

    Args:
        ref_logps_1: log-probability of the first answer under the frozen current iterate, shape
            (n,).
        win_rate_gap: win rate of the first answer against samples of the current iterate, minus
            that of the second, shape (n,) or a number. Give either this or ``label``.
        label: q itself in [0, 1], shape (n,) or a number. Default None.
        eta: inverse temperature, > 0. Default 0.1.
        gap_scale: multiplies win_rate_gap, > 0; a scale c together with eta * c keeps the fixed
            point and sharpens the labels. Default 1.

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(dno_loss(z, z, z, z, torch.tensor([0.5, -0.25]))), 4)
        0.6931

    Reference:
        Rosset et al. 2024, arXiv:2404.03715, eqs. 8, 9 and 11 to 13, Algorithms 1 and 2.
    """
    op = "dno_loss"
    if (label is None) == (win_rate_gap is None):
        raise ValueError(
            f"[{op}] label: expected either label or win_rate_gap, got "
            f"{'neither' if label is None else 'both'}. Pass one of them."
        )
    if label is not None:
        q = label
    elif isinstance(win_rate_gap, Tensor):
        q = torch.sigmoid(gap_scale * exact(check.float_like(op, "win_rate_gap", win_rate_gap)))
    else:
        gap = check.number(op, "win_rate_gap", win_rate_gap, at_least=-1, at_most=1)
        q = 0.5 + 0.5 * math.tanh(0.5 * gap_scale * gap)  # the sigmoid, without overflow
    return pointwise.run(
        op,
        "preference.soft_label_dpo",
        {"policy_logps_1": policy_logps_1, "policy_logps_2": policy_logps_2},
        {"ref_logps_1": ref_logps_1, "ref_logps_2": ref_logps_2, "label or win_rate_gap": q},
        (eta,),
        reduction,
        impl,
        lambda p1, p2, r1, r2, q: logistic(eta * ((p1 - r1) - (p2 - r2)), q),
    )


@pointwise.loss(
    grad=("policy_fresh_logps", "policy_dissatisfied_logps"),
    row=("ref_fresh_logps", "ref_dissatisfied_logps"),
    head="dpo",
    ranges={"beta": above(0)},
)
def drift_iterative_dpo_loss(
    policy_fresh_logps: Tensor,
    policy_dissatisfied_logps: Tensor,
    ref_fresh_logps: Tensor,
    ref_dissatisfied_logps: Tensor,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """DPO between a fresh answer of the policy and one a user was dissatisfied with (DRIFT).

    loss_i = softplus(-beta * ((policy_fresh - ref_fresh) - (policy_dissatisfied -
    ref_dissatisfied))). The arithmetic is DPO; the roles are the method: the preferred answer is
    sampled anew from the current policy each round, the other is a stored answer that drew a
    complaint (the mirror image of SPIN). Known only from reviews of the paper: whether the
    reference is refreshed every round, and its beta.

    Args:
        policy_fresh_logps: log-probability of the fresh answer under the policy, summed over its
            tokens, shape (n,), nats. Differentiable.
        policy_dissatisfied_logps: the same of the stored answer, shape (n,). Differentiable.
        ref_fresh_logps: log-probability of the fresh answer under the reference, shape (n,).
        ref_dissatisfied_logps: the same of the stored answer, shape (n,).
        beta: inverse temperature, > 0; the paper's value is not confirmed. Default 0.1.

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(drift_iterative_dpo_loss(z, z, z, z)), 4)
        0.6931

    Reference:
        "DRIFT: Learning from Abundant User Dissatisfaction in Real-World Preference Learning",
        2026.
    """
    fresh = policy_fresh_logps - ref_fresh_logps
    return softplus(-beta * (fresh - (policy_dissatisfied_logps - ref_dissatisfied_logps)))
