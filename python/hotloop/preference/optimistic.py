# SPDX-License-Identifier: Apache-2.0
"""DPO plus a term linear in the log-probability of a third answer: optimism, pessimism, a KL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from ..core import pointwise
from ..core.columns import add_term, check_rows, count, exact, tokens
from ..core.pointwise import Reduction, Row, softplus
from ..front import check, declare
from ..front.impl import Impl
from ..front.ranges import above, at_least
from ._pair import PAIR, REF, named

VpoMode = Literal["offline", "online"]
XpoLink = Literal["logistic", "ipo"]
RPO_ETA = 0.005
"""Weight of the SFT term in the authors' Zephyr recipe."""


def _xpo_head(beta: float, alpha: float, link: XpoLink) -> tuple[str, tuple[float, ...]]:
    return ("xpo", (beta, alpha)) if link == "logistic" else ("xpo_ipo", (1.0 / beta, alpha))


def _dpo(
    op: str,
    pair: Mapping[str, Tensor | None],
    refs: Mapping[str, Row],
    beta: float,
    reduction: Reduction,
    impl: Impl,
) -> Tensor:
    return pointwise.run(
        op,
        "preference.dpo",
        pair,
        refs,
        (beta,),
        reduction,
        impl,
        lambda pc, pr, rc, rr: softplus(-beta * ((pc - rc) - (pr - rr))),
    )


@declare.composed(ranges={"beta": above(0), "alpha": at_least(0)})
def vpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    policy_calibration_logps: Tensor,
    ref_calibration_logps: Row = 0.0,
    *,
    alpha: float,
    beta: float = 0.1,
    mode: VpoMode = "offline",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Value-incentivized preference optimization: DPO with the value of the implied reward.

    loss = mean_i softplus(-beta * h_i) + s * alpha * beta * mean_j (policy_calibration_j -
    ref_calibration_j), h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected), s = +1
    online (optimism: moves away from the calibration answers) and -1 offline (pessimism: an SFT
    term on them). Re-derived from the paper's objective, not read from code: its alpha and its
    calibration distribution are not confirmed. Online, the loss has no lower bound: watch
    policy_calibration_logps. Log-probabilities are sums over tokens, so long calibration answers
    dominate. SELM, XPO and RPO are this loss with other roles of the third answer.

    Args:
        policy_calibration_logps: log-probability under the policy of answers from the calibration
            distribution (offline the chosen ones, online reference or behaviour samples), shape
            (m,); m = n unless reduction="mean". Differentiable.
        ref_calibration_logps: the same under the reference, shape (m,) or a number; it only shifts
            the value. Default 0.
        alpha: weight of the value, >= 0, small. No default: the paper tunes it. For a paper-style
            loss summed over N pairs this alpha is that one's alpha / N.
        mode: "offline" or "online". Default "offline".

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(vpo_loss(z, z, z, z, torch.tensor([-4.0, -6.0, -2.0]), alpha=0.1)), 4)
        0.7331

    Reference:
        Cen et al. 2024, arXiv:2405.19320.
    """
    op = "vpo_loss"
    weight = (1.0 if mode == "online" else -1.0) * alpha * beta
    pair, refs = named(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    name = "policy_calibration_logps"
    calibration = check.float_tensor(op, name, policy_calibration_logps, ndim=1)
    first = check.float_tensor(op, "policy_chosen_logps", policy_chosen_logps, ndim=1)
    if calibration.shape == first.shape:
        return pointwise.run(
            op,
            "preference.dpo_plus_linear",
            {**pair, name: calibration},
            {**refs, "ref_calibration_logps": ref_calibration_logps},
            (beta, weight),
            reduction,
            impl,
            lambda pc, pr, e, rc, rr, er: (
                softplus(-beta * ((pc - rc) - (pr - rr))) + weight * (e - er)
            ),
        )
    if isinstance(ref_calibration_logps, Tensor):
        check_rows(
            op, ndim=1, **{name: calibration, "ref_calibration_logps": ref_calibration_logps}
        )
        shift: Row = exact(ref_calibration_logps).detach()
    else:
        shift = check.number(op, "ref_calibration_logps", ref_calibration_logps)
    loss = _dpo(op, pair, refs, beta, reduction, impl)
    term = weight * (exact(calibration) - shift)
    return add_term(op, loss, name, term, "policy_chosen_logps", first, reduction)


@pointwise.loss(
    grad=(*PAIR, "policy_generated_logps"),
    row=(*REF, "ref_generated_logps"),
    head=lambda beta, alpha: ("dpo_plus_linear", (beta, alpha * beta)),
    ranges={"beta": above(0), "alpha": at_least(0)},
)
def selm_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    policy_generated_logps: Tensor,
    ref_generated_logps: Row = 0.0,
    *,
    beta: float = 0.01,
    alpha: float = 0.001,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Self-exploring language models: DPO plus a push away from the policy's own answers.

    loss_i = softplus(-beta * h_i) + alpha * beta * (policy_generated_i - ref_generated_i), h =
    (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected). It has no lower bound: watch
    policy_generated_logps. The defaults are the authors' recipe; their trainer class defaults to
    beta = 0.1.

    Args:
        policy_generated_logps: log-probability under the policy of the answer it generated this
            round (one of the pair or a third), shape (n,). Differentiable.
        ref_generated_logps: the same under the reference, shape (n,) or a number; it only shifts
            the value. Default 0.
        alpha: weight of the exploration term, >= 0. Default 0.001.

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(selm_loss(z, z, z, z, torch.tensor([-4.0, -6.0]), beta=0.1, alpha=0.1)), 4)
        0.6431

    Reference:
        Zhang et al. 2024, arXiv:2405.19332; the authors' code.
    """
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return softplus(-beta * h) + alpha * beta * (policy_generated_logps - ref_generated_logps)


@pointwise.loss(
    grad=(*PAIR, "policy_ref_sample_logps"),
    row=REF,
    head=_xpo_head,
    ranges={"beta": above(0), "alpha": at_least(0)},
)
def xpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    policy_ref_sample_logps: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1e-5,
    link: XpoLink = "logistic",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Exploratory preference optimization: online DPO that moves away from reference samples.

    loss_i = link(h_i) + alpha * policy_ref_sample_i, h = (policy_chosen - ref_chosen) -
    (policy_rejected - ref_rejected), link(h) = softplus(-beta * h) or (h - 1 / (2 beta))^2. The
    pair is one sample of the policy and one of the reference, ordered by a judge. alpha multiplies
    the log-probability as it is, as in TRL: it is VPO's alpha times beta.

    Args:
        policy_ref_sample_logps: log-probability under the policy of the answer that the reference
            drew, shape (n,). Differentiable.
        alpha: weight of the exploration term, >= 0. Default 1e-5.
        link: "logistic" or "ipo". Default "logistic".

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(xpo_loss(z, z, z, z, torch.tensor([-4.0, -6.0]), alpha=0.01)), 4)
        0.6431

    Reference:
        Xie et al. 2024, arXiv:2405.21046, Algorithm 1.
    """
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    pair = softplus(-beta * h) if link == "logistic" else (h - 1 / (2 * beta)) ** 2
    return pair + alpha * policy_ref_sample_logps


@declare.composed(ranges={"beta": above(0), "eta": at_least(0), "alpha": at_least(0)})
def rpo_sft_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Row | None = None,
    *,
    beta: float = 0.01,
    eta: float | None = None,
    alpha: float | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """DPO with an SFT term on the chosen answer, against over-optimisation (RPO).

    loss_i = softplus(-beta * h_i) - eta * beta * policy_chosen_i, as the authors' code, or with
    ``alpha`` the form averaged over tokens that is common elsewhere: loss_i = softplus(-beta * h_i)
    - alpha * policy_chosen_i / length_i. h = (policy_chosen - ref_chosen) - (policy_rejected -
    ref_rejected). The average here is per answer; TRL's sum of the losses "sigmoid" and "sft"
    averages over all chosen tokens of the batch instead.

    Args:
        chosen_lengths: tokens of the preferred answer, shape (n,) or a number. Counts below 1 count
            as 1. Needed with alpha, unused otherwise. Default None.
        eta: weight of the summed form, >= 0; the authors' recipe has 0.005. Default 0.005 without
            alpha.
        alpha: weight of the averaged form, >= 0; 0.2 to 1 is usual. Default None.

    Examples:
        >>> z, chosen = torch.zeros(1), torch.tensor([-20.0])
        >>> round(float(rpo_sft_loss(chosen, z, chosen, z, torch.tensor([10]), alpha=0.2)), 4)
        1.0931

    Reference:
        Liu et al. 2024, arXiv:2405.16436; the authors' code.
    """
    op = "rpo_sft_loss"
    if eta is not None and alpha is not None:
        raise ValueError(
            f"[{op}] alpha: expected None beside eta, got {alpha!r}. Pass one of the two."
        )
    pair, refs = named(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    if alpha is not None and chosen_lengths is None:
        raise ValueError(
            f"[{op}] chosen_lengths: expected a value with alpha, got None. Pass the token counts."
        )
    summed = (RPO_ETA if eta is None else eta) * beta
    weight = summed if alpha is None else alpha
    lengths = tokens(op, "chosen_lengths", None if alpha is None else chosen_lengths)
    return pointwise.run(
        op,
        "preference.rpo_average",
        pair,
        {**refs, "chosen_lengths": lengths},
        (beta, weight),
        reduction,
        impl,
        lambda pc, pr, rc, rr, n: (
            softplus(-beta * ((pc - rc) - (pr - rr))) - weight * pc / count(n)
        ),
    )


@declare.composed(ranges={"beta": above(0), "kl_weight": at_least(0), "weight_clip": above(0)})
def hypo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    policy_online_logps: Tensor,
    ref_online_logps: Tensor,
    *,
    kl_weight: float,
    beta: float = 0.1,
    num_samples: int = 2,
    weight_clip: float | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Hybrid preference optimization: offline DPO plus the KL to the reference on online samples.

    loss = mean_i softplus(-beta * h_i) + kl_weight * mean_j [w_j - b_j] policy_online_j, h =
    (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected), w = policy_online - ref_online,
    b_j the mean of w over the other samples of the prompt (0 for one sample), the bracket without
    gradient. The value of the second term means nothing; its expected gradient is kl_weight times
    that of KL(policy || reference). Not the HyPO of arXiv:2602.11902, which is
    dpo_loss(conditional_reference=True). The paper's kl_weight and number of samples are not
    confirmed.

    Args:
        policy_online_logps: log-probability under the policy of answers it just sampled, summed
            over tokens, shape (m,), the num_samples answers of a prompt side by side; m = n *
            num_samples unless reduction="mean". Differentiable.
        ref_online_logps: the same under the reference, shape (m,).
        kl_weight: lambda, >= 0, small. No default: the paper tunes it.
        num_samples: answers per prompt, >= 1. Default 2.
        weight_clip: bound on |w| for very long answers, > 0; it biases the gradient. Default None.

    Examples:
        >>> z = torch.zeros(1)
        >>> online = torch.tensor([-4.0, -6.0])
        >>> round(float(hypo_loss(z, z, z, z, online, torch.full((2,), -5.0), kl_weight=0.1)), 4)
        0.8931

    Reference:
        Song et al. 2024, arXiv:2406.01462.
    """
    op = "hypo_loss"
    k = check.integer(op, "num_samples", num_samples, at_least=1)
    check_rows(op, policy_online_logps=policy_online_logps, ref_online_logps=ref_online_logps)
    m = policy_online_logps.shape[0]
    if m % k:
        raise ValueError(
            f"[{op}] policy_online_logps: expected a multiple of num_samples={k} rows, got {m}. "
            "Pass the samples of a prompt side by side."
        )
    pair, refs = named(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    loss = _dpo(op, pair, refs, beta, reduction, impl)
    online = exact(policy_online_logps).reshape(-1, k)
    w = online.detach() - exact(ref_online_logps).detach().reshape(-1, k)
    if weight_clip is not None:
        w = w.clamp(-weight_clip, weight_clip)
    if k > 1:
        w = w - (w.sum(1, keepdim=True) - w) / (k - 1)
    term = kl_weight * (w * online).mean(1)
    return add_term(
        op, loss, "policy_online_logps", term, "policy_chosen_logps", policy_chosen_logps, reduction
    )
