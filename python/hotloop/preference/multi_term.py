# SPDX-License-Identifier: Apache-2.0
"""Several objectives, or several pairs, in one loss: MODPO and OPA-DPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core import pointwise
from ..core.columns import check_rows, exact
from ..core.pointwise import Reduction, softplus
from ..front import check, declare
from ..front.impl import Impl
from ..front.ranges import above, at_least, number
from ._pair import named

ModpoLink = Literal["logistic", "hinge"]
OpaMode = Literal["sequence", "released"]


@declare.composed(ranges={"beta": above(0)})
def modpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_margin_rewards: Tensor,
    rejected_margin_rewards: Tensor,
    *,
    weights: Sequence[float],
    beta: float = 0.1,
    link: ModpoLink = "logistic",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Multi-objective DPO: one objective from preferences, the others from frozen rewards.

    x_i = (beta * h_i - sum_k weights[k] * (chosen_margin_rewards - rejected_margin_rewards)_i,k-1)
    / weights[0], k = 1 ..., h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected);
    loss_i = softplus(-x_i), or max(0, 1 - x_i). The minimiser maximises the weighted sum of all
    rewards minus beta times the KL.

    Args:
        chosen_margin_rewards: rewards of the preferred answer for the other objectives, shape (n,
            k).
        rejected_margin_rewards: the same of the other answer, shape (n, k).
        weights: k + 1 numbers, usually with sum 1; weights[0] > 0 is that of the objective of these
            pairs, and the loss grows without bound as it goes to 0.
        beta: strength of the KL, > 0. Default 0.1.
        link: "logistic" or "hinge". Default "logistic".

    Examples:
        >>> z, rewards = torch.zeros(2), torch.tensor([[1.0], [0.0]])
        >>> modpo_loss(z, z, z, z, rewards, 0 * rewards, weights=(0.5, 0.5), reduction="none")
        tensor([1.3133, 0.6931])

    Reference:
        Zhou et al. 2023, arXiv:2310.03708; the authors' code.
    """
    op = "modpo_loss"
    check_rows(
        op,
        ndim=2,
        chosen_margin_rewards=chosen_margin_rewards,
        rejected_margin_rewards=rejected_margin_rewards,
    )
    k = chosen_margin_rewards.shape[1]
    if not isinstance(weights, (list, tuple)) or len(weights) != k + 1:
        got = f"{len(weights)}" if isinstance(weights, (list, tuple)) else type(weights).__name__
        raise ValueError(
            f"[{op}] weights: expected {k + 1} numbers for {k} margin reward(s), got {got}. "
            "Pass a tuple, the objective of the pairs first."
        )
    w = [check.number(op, f"weights[{j}]", x) for j, x in enumerate(weights)]
    check.number(
        op, "weights[0]", w[0], above=0, hint="Without weight on the pairs there is no loss."
    )
    gap = (exact(chosen_margin_rewards) - exact(rejected_margin_rewards)).detach()
    # By number and not by a tensor of weights: on a GPU a copy from the host would wait for the device.
    offset = gap.new_zeros(gap.shape[0])
    for j, weight in enumerate(w[1:]):
        offset = torch.add(offset, gap[:, j], alpha=weight)

    def body(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, offset: Tensor) -> Tensor:
        x = (beta * ((pc - rc) - (pr - rr)) - offset) / w[0]
        return softplus(-x) if link == "logistic" else torch.relu(1 - x)

    pair, refs = named(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return pointwise.run(
        op,
        "preference.modpo" if link == "logistic" else "preference.modpo_hinge",
        pair,
        {**refs, "chosen_margin_rewards": offset},
        (beta, 1.0 / w[0]),
        reduction,
        impl,
        body,
    )


@declare.composed(
    ranges={
        "beta": above(0),
        "image_coeff": at_least(0),
        "anchor_coeff": at_least(0),
        "anchor_target": number,
    }
)
def opa_dpo_loss(
    truth_logratios: Tensor,
    revised_logratios: Tensor,
    original_logratios: Tensor,
    truth_masked_logratios: Tensor,
    revised_masked_logratios: Tensor,
    revised_weights: Tensor | None = None,
    original_weights: Tensor | None = None,
    image_weights: Tensor | None = None,
    *,
    beta: float = 0.1,
    image_coeff: float = 0.2,
    anchor_coeff: float = 1.0,
    anchor_target: float = 0.0,
    mode: OpaMode = "sequence",
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """On-policy-aligned DPO of vision-language models: four weighted pairs and an anchor.

    D(c, r) = softplus(-beta * (sum_t c_t - sum_t r_t)) of token log-ratios (policy minus
    reference), times token weights; loss_i = D(truth, original) + D(s_a revised, s_o original) +
    image_coeff * [D(truth, truth masked) + D(v revised, v revised masked)] + anchor_coeff * sum
    over the four chosen sides of softplus(-(beta * sum_t c_t - anchor_target)). The released
    trainer differs in two ways that look like slips: it takes the log-sigmoid of every token
    position and then the mean, without summing over the answer, and its anchor pushes the revised
    answer down. mode="released" does the same, for parity.

    Args:
        truth_logratios: log-ratio of every token of the ground-truth answer, 0 where padded, shape
            (n, tokens), nats. Differentiable, like the next four.
        revised_logratios: the same of the answer an expert revised, shape (n, tokens).
        original_logratios: the same of the policy's own answer, shape (n, tokens).
        truth_masked_logratios: the same of the ground truth with a masked image, shape of
            truth_logratios.
        revised_masked_logratios: the same of the revised answer with a masked image, shape of
            revised_logratios.
        revised_weights: s_a, severity of the hallucination each token mends, shape of
            revised_logratios. Default None: 1.
        original_weights: s_o, severity of each token, shape of original_logratios. Default None: 1.
        image_weights: v, relation of each token to the image, shape of revised_logratios. Default
            None: 1.
        image_coeff: weight of the two image pairs, >= 0. Default 0.2.
        anchor_coeff: weight of the anchor, >= 0. Default 1.
        anchor_target: reward the anchor asks for. Default 0.
        mode: "sequence", or "released", which needs all answers padded to the same shape. Default
            "sequence".

    Returns:
        Scalar for "mean" and "sum"; for "none" shape (n,), or (n, tokens) with mode="released".
        float32, or float64 if any input is float64.

    Examples:
        >>> z = torch.zeros(2, 5)
        >>> round(float(opa_dpo_loss(z, z, z, z, z, image_coeff=0.0, anchor_coeff=0.0)), 4)
        1.3863

    Reference:
        Yang et al. 2025, arXiv:2501.09695; the authors' code.
    """
    op = "opa_dpo_loss"
    released = mode == "released"
    params = (beta, image_coeff, anchor_coeff, anchor_target, -1.0 if released else 1.0)
    groups: tuple[dict[str, Any], ...] = (
        {"truth_logratios": truth_logratios, "truth_masked_logratios": truth_masked_logratios},
        {
            "revised_logratios": revised_logratios,
            "revised_masked_logratios": revised_masked_logratios,
            "revised_weights": revised_weights,
            "image_weights": image_weights,
        },
        {"original_logratios": original_logratios, "original_weights": original_weights},
    )
    optional = ("revised_weights", "image_weights", "original_weights")
    for group in groups:
        given = {n: x for n, x in group.items() if x is not None or n not in optional}
        check_rows(op, ndim=2, **given)
    shape = truth_logratios.shape
    for name, value in (
        ("revised_logratios", revised_logratios),
        ("original_logratios", original_logratios),
    ):
        if value.shape[0] != shape[0] or (released and value.shape != shape):
            wanted = tuple(shape) if released else f"({shape[0]}, tokens)"
            raise ValueError(
                f"[{op}] {name}: expected shape {wanted} like truth_logratios, got "
                f"{tuple(value.shape)}. Pass one row per prompt."
            )

    def total(logratios: Tensor, weights: Tensor | None = None) -> Tensor:
        x = logratios if weights is None else logratios * exact(weights).detach()
        return x.reshape(-1) if released else x.sum(1)

    # Converted once each: a half gradient is rounded after its parts are added, not before.
    revised, original, revised_masked = (
        exact(x) for x in (revised_logratios, original_logratios, revised_masked_logratios)
    )
    truth = total(exact(truth_logratios))
    # As the released trainer: log-ratios of single tokens, and an anchor that pushes two chosen sides down.
    sign = params[-1]

    def body(
        g: Tensor, _: Tensor, o: Tensor, sa: Tensor, so: Tensor, gm: Tensor, va: Tensor, vam: Tensor
    ) -> Tensor:
        language = softplus(-beta * (g - o)) + softplus(-beta * (sa - so))
        image = softplus(-beta * (g - gm)) + softplus(-beta * (va - vam))
        pulled = (g, 1.0), (g, 1.0), (sa, sign), (va, sign)
        anchors = [softplus(-side * (beta * x - anchor_target)) for x, side in pulled]
        return language + image_coeff * image + anchor_coeff * torch.stack(anchors).sum(0)

    loss = pointwise.run(
        op,
        "preference.opa_dpo",
        {
            "truth_logratios": truth,
            "revised_logratios": None,
            "original_logratios": total(original),
            "revised_weights": total(revised, revised_weights),
            "original_weights": total(original, original_weights),
            "truth_masked_logratios": total(exact(truth_masked_logratios)),
            "image_weights": total(revised, image_weights),
            "revised_masked_logratios": total(revised_masked, image_weights),
        },
        {},
        params,
        reduction,
        impl,
        body,
        absent=("revised_logratios",),
    )
    return loss.reshape(shape) if released and reduction == "none" else loss
