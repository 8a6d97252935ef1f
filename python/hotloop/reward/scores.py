# SPDX-License-Identifier: Apache-2.0
"""Losses on the scores that a reward model gives to the two answers of a pair."""

from __future__ import annotations

from torch import Tensor

from ..core import pointwise
from ..core.pointwise import Reduction, Row, softplus
from ..front.impl import Impl
from ..front.ranges import at_least


@pointwise.loss(
    grad=("chosen_rewards", "rejected_rewards"),
    row=("margin", "weight"),
    ranges={"center_coeff": at_least(0)},
)
def bt_reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: Row = 0.0,
    weight: Row = 1.0,
    *,
    center_coeff: float = 0.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Bradley-Terry loss of a reward model, with an optional margin and a pull to the centre.

    loss_i = weight_i * softplus(-(r_chosen - r_rejected - margin_i)) + center_coeff * (r_chosen + r_rejected)^2.

    Args:
        chosen_rewards: score of the preferred answer, shape (n,). Differentiable.
        rejected_rewards: score of the other answer, shape (n,). Differentiable.
        margin: by how much the scores should differ, shape (n,) or a number. Default 0.
        weight: strength of the preference, shape (n,) or a number (scaled Bradley-Terry). Default 1.
        center_coeff: weight of the centring term, >= 0; TRL's documentation uses 0.01. Default 0.

    Examples:
        >>> round(float(bt_reward_loss(torch.zeros(2), torch.zeros(2))), 4)
        0.6931

    Reference:
        Bradley and Terry 1952. Margin: Touvron et al. 2023, arXiv:2307.09288. Weight: Wang et al. 2024,
        arXiv:2410.01257. Centring: Eisenstein et al. 2023, arXiv:2312.09244.
    """
    gap = chosen_rewards - rejected_rewards - margin
    return weight * softplus(-gap) + center_coeff * (chosen_rewards + rejected_rewards) ** 2
