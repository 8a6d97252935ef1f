"""Several objectives, or several pairs, in one loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import Row, columns, reduce, softplus


def modpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Row,
    ref_rejected_logps: Row,
    chosen_margin_rewards: Tensor,
    rejected_margin_rewards: Tensor,
    *,
    weights: Sequence[float],
    beta: float = 0.1,
    link: str = "logistic",
    reduction: str = "mean",
) -> Tensor:
    pc, pr, rc, rr, mw, ml = columns(
        (policy_chosen_logps, policy_rejected_logps),
        (ref_chosen_logps, ref_rejected_logps, chosen_margin_rewards, rejected_margin_rewards),
    )
    margin_weights = torch.tensor(weights[1:], dtype=mw.dtype, device=mw.device)
    chosen = (beta * (pc - rc) - mw @ margin_weights) / weights[0]
    rejected = (beta * (pr - rr) - ml @ margin_weights) / weights[0]
    x = chosen - rejected
    return reduce(softplus(-x) if link == "logistic" else torch.relu(1 - x), reduction)


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
    mode: str = "sequence",
    reduction: str = "mean",
) -> Tensor:
    weights = (revised_weights, original_weights, image_weights)
    g, a, o, gm, am, s_a, s_o, v = columns(
        (
            truth_logratios,
            revised_logratios,
            original_logratios,
            truth_masked_logratios,
            revised_masked_logratios,
        ),
        tuple(1.0 if w is None else w for w in weights),
    )

    def total(x: Tensor) -> Tensor:
        return beta * (x if mode == "released" else x.sum(1))

    pairs = [
        (total(g), total(o)),
        (total(s_a * a), total(s_o * o)),
        (total(g), total(gm)),
        (total(v * a), total(v * am)),
    ]
    coeffs = (1.0, 1.0, image_coeff, image_coeff)
    # The released anchor pushes the chosen answer of the second and fourth pair down.
    signs = (1.0, -1.0, 1.0, -1.0) if mode == "released" else (1.0,) * 4
    loss = torch.zeros_like(pairs[0][0])
    for (chosen, rejected), coeff, sign in zip(pairs, coeffs, signs):
        loss = loss + coeff * softplus(rejected - chosen)
        loss = loss + anchor_coeff * softplus(-sign * (chosen - anchor_target))
    return reduce(loss, reduction)
