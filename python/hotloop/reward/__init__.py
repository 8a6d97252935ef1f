# SPDX-License-Identifier: Apache-2.0
"""Losses that train reward models."""

from ..front.needs import torch_for

torch_for("reward")

from .scores import bt_reward_loss

__all__ = ["bt_reward_loss"]
