# SPDX-License-Identifier: Apache-2.0
"""Losses that make a model forget."""

from __future__ import annotations

from torch import Tensor

from ..core import pointwise
from ..core.columns import add_term, count, exact, tokens
from ..core.pointwise import Reduction, Row, softplus
from ..front import check, declare
from ..front.impl import Impl
from ..front.ranges import above, at_least, number


@declare.composed(
    ranges={
        "beta": above(0),
        "gamma": number,
        "retain_nll_weight": at_least(0),
        "retain_kl_weight": at_least(0),
        "sequence_lengths": tokens,
    }
)
def npo_loss(
    policy_logps: Tensor,
    ref_logps: Tensor | None = None,
    sequence_lengths: Row | None = None,
    retain_nll: Tensor | None = None,
    retain_kl: Tensor | None = None,
    *,
    beta: float = 0.1,
    gamma: float = 0.0,
    retain_nll_weight: float = 1.0,
    retain_kl_weight: float = 1.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Negative preference optimization of forget sequences, with optional retain terms.

    loss = 2 / beta * mean_i softplus(beta * (policy_i - ref_i) / length_i + gamma) +
    retain_nll_weight * mean(retain_nll) + retain_kl_weight * mean(retain_kl). Without lengths this
    is NPO (sums over tokens, as in the authors' code); without a reference, with lengths and gamma,
    it is SimNPO. As beta goes to 0 it becomes gradient ascent on the forget sequences.

    Args:
        policy_logps: log-probability of the forget sequence under the policy, summed over its
            tokens, shape (n,), nats. Differentiable.
        ref_logps: the same under the model to start from, shape (n,), or None. Default None.
        sequence_lengths: tokens of the sequence, shape (n,) or a number, or None. Counts below 1
            count as 1. Default None: 1.
        retain_nll: negative log-likelihood of retain sequences, any number of values; for
            reductions other than "mean" shape (n,). Differentiable. Default None.
        retain_kl: KL(reference || policy) on retain sequences, likewise. The authors average it
            over all token rows, padding included; pass the mean you want. Differentiable. Default
            None.
        gamma: margin of SimNPO, added inside the softplus. Default 0.
        retain_nll_weight: weight of retain_nll, >= 0. Default 1.
        retain_kl_weight: weight of retain_kl, >= 0. Default 1.

    Examples:
        >>> logps = torch.tensor([-3.0, -5.0])
        >>> round(float(npo_loss(logps, logps, beta=2.0)), 4)
        0.6931

    Reference:
        Zhang et al. 2024, arXiv:2404.05868. SimNPO: Fan et al. 2024, arXiv:2410.07163.
    """
    op = "npo_loss"
    loss = pointwise.run(
        op,
        "unlearn.npo",
        {"policy_logps": policy_logps},
        {
            "ref_logps": 0.0 if ref_logps is None else ref_logps,
            "sequence_lengths": 1.0 if sequence_lengths is None else sequence_lengths,
        },
        (beta, gamma),
        reduction,
        impl,
        lambda l, r, n: 2 / beta * softplus(beta * (l - r) / count(n) + gamma),
    )
    for name, term, weight in (
        ("retain_nll", retain_nll, retain_nll_weight),
        ("retain_kl", retain_kl, retain_kl_weight),
    ):
        if term is not None:
            value = weight * exact(check.float_tensor(op, name, term))
            loss = add_term(op, loss, name, value, "policy_logps", policy_logps, reduction)
    return loss
