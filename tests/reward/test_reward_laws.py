# SPDX-License-Identifier: Apache-2.0
"""What a Bradley-Terry loss must do, whatever the numbers."""

from __future__ import annotations

import math

import torch
from hotloop.reward import bt_reward_loss

CHOSEN = torch.tensor([1.5, -0.25, 3.0, -40.0], dtype=torch.float64)
REJECTED = torch.tensor([0.5, 0.75, -2.0, 60.0], dtype=torch.float64)


def test_only_the_difference_counts_without_centring() -> None:
    base = bt_reward_loss(CHOSEN, REJECTED, 0.3, reduction="none")
    moved = bt_reward_loss(CHOSEN + 7, REJECTED + 7, 0.3, reduction="none")
    torch.testing.assert_close(base, moved, rtol=1e-12, atol=0)
    centred = bt_reward_loss(CHOSEN + 7, REJECTED + 7, 0.3, center_coeff=0.01, reduction="none")
    assert bool((centred > moved).all())


def test_a_tie_costs_ln_2_and_a_margin_is_a_shift_of_the_score() -> None:
    assert math.isclose(float(bt_reward_loss(CHOSEN, CHOSEN)), math.log(2))
    shifted = bt_reward_loss(CHOSEN - 1.25, REJECTED, reduction="none")
    torch.testing.assert_close(bt_reward_loss(CHOSEN, REJECTED, 1.25, reduction="none"), shifted)


def test_the_slope_is_the_probability_of_the_other_order() -> None:
    leaf = CHOSEN.clone().requires_grad_()
    (grad,) = torch.autograd.grad(bt_reward_loss(leaf, REJECTED, weight=2.0, reduction="sum"), leaf)
    torch.testing.assert_close(grad, -2 * torch.sigmoid(REJECTED - CHOSEN), rtol=1e-12, atol=0)
