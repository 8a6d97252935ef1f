# SPDX-License-Identifier: Apache-2.0
"""Losses that train reward models."""

from . import Paper, pointwise_room

op = pointwise_room(__name__)

op(
    "bt_reward_loss",
    Paper("Rank Analysis of Incomplete Block Designs", "Biometrika 39, 1952"),
    Paper("Llama 2 (margin)", "2307.09288"),
    Paper("HelpSteer2-Preference (weight)", "2410.01257"),
    Paper("Eisenstein et al. (centring)", "2312.09244", "0.01"),
)
