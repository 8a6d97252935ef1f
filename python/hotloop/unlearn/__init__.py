# SPDX-License-Identifier: Apache-2.0
"""Losses that make a model forget what it should not know."""

from ..front.needs import torch_for

torch_for("unlearn")

from .losses import npo_loss

__all__ = ["npo_loss"]
