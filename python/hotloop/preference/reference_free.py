# SPDX-License-Identifier: Apache-2.0
"""Losses that need no reference model: ORPO, CPO, SimPO, and CPL of behaviour segments."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core import pointwise
from ..core.columns import check_rows, count, exact, probability, tokens
from ..core.pointwise import Reduction, Row, given, logistic, softplus
from ..front import check, declare
from ..front.impl import Impl
from ..front.ranges import above, at_least, number
from ._pair import PAIR

LOG_ODDS_CAP = -(2.0**-24)
"""Mean log-probability at which the log-odds stop growing; at 0 they are infinite."""
_MARGIN: dict[str, declare.Range] = {
    "beta": above(0),
    "gamma": at_least(0),
    "cpo_alpha": at_least(0),
    "label_smoothing": probability,
    "chosen_lengths": tokens,
    "rejected_lengths": tokens,
}
_CPL: dict[str, declare.Range] = {
    "alpha": above(0),
    "gamma": above(0, at_most=1),
    "lam": above(0, at_most=1),
    "bc_coeff": at_least(0),
}


def _cpo_head(
    beta: float, cpo_alpha: float, alpha: float, gamma: float
) -> tuple[str, tuple[float, ...]]:
    if alpha != 0:
        return "alpha_po", (beta, cpo_alpha, alpha, gamma)
    return "simpo", (beta, gamma, cpo_alpha)


def _log1mexp(a: Tensor) -> Tensor:
    """log(1 - exp(a)) by whichever form does not cancel."""
    near = a > -math.log(2)
    left = torch.log(-torch.expm1(torch.where(near, a, -0.1)))
    return torch.where(near, left, torch.log1p(-torch.exp(torch.where(near, -1.0, a))))


@pointwise.loss(grad=(*PAIR, "chosen_nll"), batch=("chosen_nll",), ranges={"beta": at_least(0)})
def orpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_nll: Tensor,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Odds ratio preference optimization: likelihood of the chosen answer plus a log odds ratio.

    odds(a) = a - log(1 - exp(a)), loss_i = nll_i + beta * softplus(-(odds(chosen_i) -
    odds(rejected_i))). The log-probabilities here are means over tokens, not sums, and must be
    below 0; from -2^-24 on they are taken as -2^-24, with no gradient, so that an answer of
    probability 1 does not end in NaN. log(1 - exp(a)) is computed by whichever of two forms does
    not cancel (Liger's loses its digits near 0). TRL returns the odds term negated.

    Args:
        policy_chosen_logps: mean log-probability per token of the preferred answer under the
            policy, shape (n,), nats. Differentiable.
        chosen_nll: negative log-likelihood of the preferred answer (with or without its prompt),
            shape (n,), or one value for the batch. Differentiable.
        beta: weight of the odds ratio, >= 0; lambda in the paper. Default 0.1.

    Examples:
        >>> logps = torch.tensor([-1.0, -2.0])
        >>> round(float(orpo_loss(logps, logps, -logps)), 4)
        1.5693

    Reference:
        Hong et al. 2024, arXiv:2403.07691, eqs. 4 and 7.
    """
    chosen, rejected = (
        x.clamp(max=LOG_ODDS_CAP) for x in (policy_chosen_logps, policy_rejected_logps)
    )
    odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return chosen_nll + beta * softplus(-odds)


@pointwise.loss(
    grad=(*PAIR, "chosen_nll"),
    row=("chosen_lengths", "rejected_lengths", "label_smoothing"),
    head=_cpo_head,
    batch=("chosen_nll",),
    ranges={**_MARGIN, "alpha": number},
    together=(("chosen_lengths", "rejected_lengths"),),
)
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
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Contrastive preference optimization, with AlphaPO's reward shape as an option.

    u = log-probability / length (length 1 where left out), r(u) = u for alpha = 0, else (1 -
    exp(-alpha * u)) / alpha; x_i = beta * (r(chosen_i) - r(rejected_i)) - gamma; loss_i = (1 - e_i)
    softplus(-x_i) + e_i softplus(x_i) + cpo_alpha * nll_i. TRL's alpha exponentiates sums over
    tokens, which leaves the range of float32 for answers of ordinary length: here it is an expm1 of
    the log-probability, and lengths should be given, as in the AlphaPO paper. CPO itself uses sums
    (no lengths) in TRL and in the paper, means in Liger.

    Args:
        label_smoothing: e in [0, 1], a number or shape (n,). Default 0.
        cpo_alpha: weight of chosen_nll, >= 0. Default 1.
        alpha: shape of the reward; 0 is CPO. Default 0.
        gamma: margin to reach, >= 0. Default 0.

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(cpo_loss(z, z, torch.ones(2))), 4)
        1.6931

    Reference:
        Xu et al. 2024, arXiv:2401.08417. Reward shape: Gupta et al. 2025, arXiv:2501.03884.
    """

    def reward(u: Tensor) -> Tensor:
        return u if alpha == 0 else -torch.expm1(-alpha * u) / alpha

    chosen = reward(policy_chosen_logps / count(chosen_lengths))
    rejected = reward(policy_rejected_logps / count(rejected_lengths))
    x = beta * (chosen - rejected) - gamma
    return logistic(x, 1 - label_smoothing) + cpo_alpha * given(chosen_nll)


@pointwise.loss(
    grad=(*PAIR, "chosen_nll"),
    row=("chosen_lengths", "rejected_lengths", "label_smoothing"),
    batch=("chosen_nll",),
    ranges=_MARGIN,
    together=(("chosen_lengths", "rejected_lengths"),),
)
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
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Simple preference optimization: log-probabilities per token, a margin, no reference.

    x_i = beta * (chosen_i / nc_i - rejected_i / nr_i) - gamma, loss_i = (1 - e_i) softplus(-x_i) +
    e_i softplus(x_i) + cpo_alpha * nll_i. gamma is the margin after beta, as in the paper's
    equation; TRL's simpo_gamma and Liger's gamma are this number, the authors' gamma_beta_ratio is
    gamma / beta. The default beta is the paper's, not TRL's or Liger's 0.1. With nll it is CPO-SimPO.

    Args:
        policy_chosen_logps: log-probability of the preferred answer under the policy, summed over
            its tokens (or already a mean, without lengths), shape (n,), nats. Differentiable.
        beta: inverse temperature, > 0; the paper uses 2 to 10. Default 2.5.
        gamma: margin to reach, >= 0; the authors start tuning from half of beta. Default 1.25.
        label_smoothing: e in [0, 1], a number or shape (n,). Default 0.
        cpo_alpha: weight of chosen_nll, >= 0. Default 1.

    Examples:
        >>> chosen, rejected = torch.tensor([-10.0]), torch.tensor([-30.0])
        >>> lengths = torch.tensor([20])
        >>> round(float(simpo_loss(chosen, rejected, lengths, lengths)), 4)
        0.2519

    Reference:
        Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    gap = policy_chosen_logps / count(chosen_lengths) - policy_rejected_logps / count(
        rejected_lengths
    )
    return logistic(beta * gap - gamma, 1 - label_smoothing) + cpo_alpha * given(chosen_nll)


def _segments(
    op: str, name: str, logps: Tensor, ref_name: str, ref: Tensor | None, alpha: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities in float32 or better, and the advantages they add up to."""
    if ref is not None:
        check_rows(op, ndim=None, **{name: logps, ref_name: ref})
    steps = exact(check.float_tensor(op, name, logps))
    if steps.ndim == 1 and ref is None:
        return steps, steps
    if steps.ndim != 2:
        wanted = "(n, steps)" if ref is not None else "(n, steps), or advantages (n,)"
        raise ValueError(
            f"[{op}] {name}: expected shape {wanted}, got {tuple(logps.shape)}. "
            "Pass one row per segment."
        )
    x = steps if ref is None else steps - exact(ref).detach()
    if gamma != 1:
        x = x * gamma ** torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    return steps, alpha * x.sum(1)


@declare.composed(
    ranges={**_CPL, "label": probability},
    together=(("ref_logps_1", "ref_logps_2"),),
)
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
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Contrastive preference learning of two behaviour segments.

    A_k = alpha * sum_t gamma^t logps_k,t (minus the reference's log-probabilities, where given),
    loss_i = y_i softplus(-(A_2 - lam * A_1)) + (1 - y_i) softplus(-(A_1 - lam * A_2)) - bc_coeff *
    mean_t logps_i,t. y is the probability that the SECOND segment is preferred, as in the authors'
    code. lam < 1 discounts the loser and pulls towards the data. The authors' code defaults to lam
    = 1; the default here is the paper's 0.5.

    Args:
        segment_logps_1: log-probability of every action of the first segment, shape (n, steps),
            nats; or its advantage A_1, shape (n,), and then alpha and gamma do nothing.
            Differentiable.
        segment_logps_2: the same of the second segment. Differentiable.
        ref_logps_1: the same under a reference policy, shape (n, steps). Default None.
        ref_logps_2: the same of the second segment, given together with ref_logps_1. Default None.
        label: y in [0, 1], shape (n,) or a number. Default 1.
        alpha: temperature, > 0; 0.2 with a reference. Default 0.1.
        gamma: discount, in (0, 1]. Default 1.
        lam: bias on the loser, in (0, 1]; 0.75 with a reference. Default 0.5.
        bc_coeff: weight of behaviour cloning of both segments, >= 0; needs shape (n, steps).
            Default 0.

    Examples:
        >>> z = torch.zeros(2, 3)
        >>> round(float(cpl_loss(z, z)), 4)
        0.6931

    Reference:
        Hejna et al. 2023, arXiv:2310.13639.
    """
    op = "cpl_loss"
    names = ("segment_logps_1", "segment_logps_2")
    steps_1, first = _segments(
        op, names[0], segment_logps_1, "ref_logps_1", ref_logps_1, alpha, gamma
    )
    steps_2, second = _segments(
        op, names[1], segment_logps_2, "ref_logps_2", ref_logps_2, alpha, gamma
    )
    if bc_coeff and (segment_logps_1.ndim != 2 or segment_logps_2.ndim != 2):
        raise ValueError(
            f"[{op}] bc_coeff: expected 0 for advantages of shape (n,), got {bc_coeff!r}. "
            "Pass log-probabilities (n, steps)."
        )
    loss = pointwise.run(
        op,
        "preference.cpl",
        {names[0]: first, names[1]: second},
        {"label": label},
        (lam,),
        reduction,
        impl,
        lambda a1, a2, y: y * softplus(lam * a1 - a2) + (1 - y) * softplus(lam * a2 - a1),
    )
    if not bc_coeff:
        return loss
    cloning = -0.5 * bc_coeff * (steps_1.mean(1) + steps_2.mean(1))
    return loss + (cloning if reduction == "none" else getattr(cloning, reduction)())


@declare.composed(ranges=_CPL)
def cpl_dense_loss(
    segment_logps: Tensor,
    scores: Tensor,
    ref_logps: Tensor | None = None,
    *,
    alpha: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.5,
    bc_coeff: float = 0.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Contrastive preference learning of all pairs of scored segments.

    A as in ``cpl_loss``; segments are sorted by score and the loss is the mean over all n (n - 1) /
    2 pairs of softplus(-(A_better - lam * A_worse)), minus bc_coeff * mean(logps). Equal scores are
    ordered by position, as the authors' sort does, rather than left out. n (n - 1) / 2 rows are
    formed in memory.

    Args:
        segment_logps: log-probability of every action of each segment, shape (n, steps), nats; or
            advantages, shape (n,), and then alpha and gamma do nothing. Differentiable.
        scores: how good each segment is, larger is better, shape (n,).
        ref_logps: log-probabilities under a reference policy, shape (n, steps). Default None.
        alpha: temperature, > 0; 0.2 with a reference. Default 0.1.
        gamma: discount, in (0, 1]. Default 1.
        lam: bias on the loser, in (0, 1]; 0.75 with a reference. Default 0.5.
        bc_coeff: weight of behaviour cloning, >= 0; needs shape (n, steps) and reduction="mean".
            Default 0.

    Returns:
        Scalar for "mean" and "sum", shape (n * (n - 1) / 2,) for "none"; float32, or float64 if any
        input is float64.

    Examples:
        >>> advantages = torch.tensor([0.0, 2.0, 1.0])
        >>> cpl_dense_loss(advantages, advantages, lam=1.0, reduction="none")
        tensor([0.3133, 0.1269, 0.3133])

    Reference:
        Hejna et al. 2023, arXiv:2310.13639; the dense form: the authors' code.
    """
    op = "cpl_dense_loss"
    steps, advantage = _segments(
        op, "segment_logps", segment_logps, "ref_logps", ref_logps, alpha, gamma
    )
    n = advantage.shape[0]
    check.float_like(op, "scores", check.tensor(op, "scores", scores))
    if n == 1 and reduction == "mean":
        raise ValueError(
            f"[{op}] segment_logps: expected at least 2 segments, got 1. A mean over no pairs is NaN."
        )
    if scores.shape != (n,):
        raise ValueError(
            f"[{op}] scores: expected shape ({n},), one per segment, got {tuple(scores.shape)}. "
            "Pass one score per segment."
        )
    check.same_place(op, "scores", scores, "segment_logps", segment_logps)
    if bc_coeff and (segment_logps.ndim != 2 or reduction != "mean"):
        raise ValueError(
            f"[{op}] bc_coeff: expected 0 for advantages or reduction={reduction!r}, got "
            f"{bc_coeff!r}. Pass log-probabilities (n, steps) and reduction='mean'."
        )
    ranked = advantage[torch.argsort(scores, stable=True)]
    worse, better = torch.triu_indices(n, n, offset=1, device=advantage.device)
    loss = pointwise.run(
        op,
        "preference.cpl",
        {"worse": ranked[worse], "better": ranked[better]},
        {"label": 1.0},
        (lam,),
        reduction,
        impl,
        lambda worse, better, _: softplus(lam * worse - better),
    )
    return loss - bc_coeff * steps.mean() if bc_coeff else loss
