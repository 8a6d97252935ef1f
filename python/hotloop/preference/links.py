# SPDX-License-Identifier: Apache-2.0
"""Other links on a pair with a reference: hinge, reverse KL, sigmoids, sorted margins."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core import pointwise
from ..core.columns import check_rows, exact
from ..core.pointwise import Reduction, logistic, softplus
from ..front import declare
from ..front.impl import Impl
from ..front.ranges import Number, above, at_least
from ._pair import PAIR, REF, named

ApoVariant = Literal["zero", "down"]


def _exo_head(beta: float, label_smoothing: float) -> tuple[str, tuple[float, ...]]:
    return "exo_pair", (beta, math.log1p(-label_smoothing), math.log(label_smoothing))


@declare.composed(
    ranges={"beta": above(0), "delta": above(0), "sft_weight": at_least(0)},
    together=(("ref_chosen_logps", "ref_rejected_logps"), ("target_logps", "sft_weight")),
)
def slic_hinge_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    target_logps: Tensor | None = None,
    *,
    beta: float | None = None,
    delta: float = 1.0,
    sft_weight: float | None = None,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Hinge loss on the margin of a pair: SLiC-HF without a reference, TRL's ``hinge`` with one.

    loss_i = max(0, delta - beta * h_i) - sft_weight * target_i, h = (policy_chosen - ref_chosen) -
    (policy_rejected - ref_rejected), reference terms 0 where left out. The gradient at the kink is
    0. TRL's form was read in its source; SLiC-HF's form is written from the paper's description,
    and its weight of the target term is not known to us, so it has no default.

    Args:
        target_logps: log-probability under the policy of the answer to stay close to, shape (n,),
            or None. Differentiable. Needs sft_weight.
        beta: scale of the margin, > 0. Default 0.1 with a reference (TRL), 1 without (SLiC-HF).
        delta: margin to reach, > 0. Default 1.
        sft_weight: weight of -target_logps, >= 0. Needs target_logps.

    Examples:
        >>> chosen, rejected = torch.tensor([-1.0, -3.0]), torch.tensor([-4.0, -2.5])
        >>> slic_hinge_loss(chosen, rejected, reduction="none")
        tensor([0.0000, 1.5000])

    Reference:
        Zhao et al. 2023, arXiv:2305.10425, rank calibration loss.
    """
    if beta is None:
        beta = 1.0 if ref_chosen_logps is None else 0.1
    scale, weight = beta, sft_weight or 0.0
    pair, refs = named(
        policy_chosen_logps,
        policy_rejected_logps,
        0.0 if ref_chosen_logps is None else ref_chosen_logps,
        0.0 if ref_rejected_logps is None else ref_rejected_logps,
    )
    return pointwise.run(
        "slic_hinge_loss",
        "preference.slic_hinge",
        {**pair, "target_logps": target_logps},
        refs,
        (scale, delta, weight),
        reduction,
        impl,
        lambda pc, pr, target, rc, rr: (
            torch.relu(delta - scale * ((pc - rc) - (pr - rr))) - weight * target
        ),
        absent=("target_logps",),
    )


@pointwise.loss(
    grad=PAIR,
    row=REF,
    head=_exo_head,
    ranges={
        "beta": above(0),
        "label_smoothing": Number(above=0, below=0.5, hint="The paper uses 1e-3."),
    },
)
def exo_pair_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Efficient exact optimization of a pair: the reverse KL where DPO has the forward one.

    q_i = sigma(beta * h_i), h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected),
    and loss_i = q_i (log q_i - log(1 - e)) + (1 - q_i) (log(1 - q_i) - log e): the KL from the
    policy's choice to the smoothed label. Pairs only; the paper's form for K answers is not
    offered.

    Args:
        label_smoothing: e, in (0, 0.5); 0 would make the loss infinite. Default 0.001.

    Examples:
        >>> import math
        >>> chosen, z = torch.full((1,), math.log(0.9 / 0.1)), torch.zeros(1)
        >>> abs(round(float(exo_pair_loss(chosen, z, z, z, beta=1.0, label_smoothing=0.1)), 4))
        0.0

    Reference:
        Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    x = beta * (
        (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    )
    chosen = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(label_smoothing))


@pointwise.loss(
    grad=PAIR,
    row=REF,
    head=lambda variant, beta: (f"apo_{variant}", (beta,)),
    ranges={"beta": above(0)},
)
def apo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    variant: ApoVariant = "zero",
    beta: float = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Anchored preference optimization: chosen and rejected answers are moved on their own.

    dw = policy_chosen - ref_chosen, dl = policy_rejected - ref_rejected. zero: loss_i = 1 -
    sigma(beta * dw_i) + sigma(beta * dl_i), for data better than the model; down: loss_i =
    sigma(beta * dw_i) + 1 - sigma(beta * (dw_i - dl_i)), for data worse than the model. Both lie in
    [0, 2].

    Args:
        variant: "zero" or "down". Default "zero".

    Examples:
        >>> z = torch.zeros(2)
        >>> float(apo_loss(z, z, z, z, variant="down"))
        1.0

    Reference:
        D'Oosterlinck et al. 2024, arXiv:2408.06266, eqs. 7 and 8.
    """
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    if variant == "zero":
        return torch.sigmoid(-chosen) + torch.sigmoid(rejected)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@declare.composed(ranges={"beta": above(0), "label_smoothing": Number(at_least=0, at_most=1)})
def aot_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    paired: bool = True,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Alignment by optimal transport: quantiles are compared, not the margins of each pair.

    paired: m = sort(policy_chosen - policy_rejected), k = sort(ref_chosen - ref_rejected).
    Unpaired: m = sort(policy_chosen - ref_chosen), k = sort(policy_rejected - ref_rejected). loss_i
    = (1 - e) softplus(-beta * (m_i - k_i)) + e softplus(beta * (m_i - k_i)); the gradient flows
    through the permutations. The loss depends on the batch: under data parallelism each rank sorts
    its own rows (as in TRL) unless the rows are gathered first. With reduction="none" row i is the
    i-th quantile.

    Args:
        paired: see above; unpaired is TRL's ``aot_unpaired``. Default True.
        label_smoothing: e, in [0, 1]. Default 0.

    Examples:
        >>> chosen, z = torch.tensor([2.0, -1.0]), torch.zeros(2)
        >>> aot_loss(chosen, z, z, z, beta=1.0, reduction="none")
        tensor([1.3133, 0.1269])

    Reference:
        Melnyk et al. 2024, arXiv:2406.05882.
    """
    op = "aot_loss"
    check_rows(
        op,
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    pc, pr = exact(policy_chosen_logps), exact(policy_rejected_logps)
    rc, rr = exact(ref_chosen_logps).detach(), exact(ref_rejected_logps).detach()
    if paired:
        margins = {"sorted policy margins": pc - pr, "sorted reference margins": rc - rr}
    else:
        margins = {"sorted chosen log-ratios": pc - rc, "sorted rejected log-ratios": pr - rr}
    return pointwise.run(
        op,
        "preference.soft_label_dpo",
        {name: torch.sort(x).values for name, x in margins.items()},
        {"no reference": 0.0, "nor here": 0.0, "label": 1.0 - label_smoothing},
        (beta,),
        reduction,
        impl,
        lambda m, k, _, __, label: logistic(beta * (m - k), label),
    )


@pointwise.loss(grad=PAIR, row=REF, head="nca_pair", ranges={"beta": above(0)})
def nca_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Noise contrastive alignment of a pair: rewards count on their own, not only their gap.

    R = beta * log-ratio of each answer, loss_i = softplus(-Rw_i) + softplus(Rw_i) / 2 +
    softplus(Rl_i) / 2. Pairs only: the paper's forms for K answers (NCA, InfoNCA) are not offered.

    Args:
        beta: inverse temperature, > 0; the paper uses 0.01, TRL 0.1. Default 0.1.

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(nca_loss(z, z, z, z)), 4)
        1.3863

    Reference:
        Chen et al. 2024, arXiv:2402.05369, Algorithm 1 with K = 2.
    """
    chosen = beta * (policy_chosen_logps - ref_chosen_logps)
    rejected = beta * (policy_rejected_logps - ref_rejected_logps)
    return softplus(-chosen) + 0.5 * softplus(chosen) + 0.5 * softplus(rejected)
