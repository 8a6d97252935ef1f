"""Losses that make a model forget what it should not know."""

from ..front.needs import torch_for

torch_for("unlearn")

from .. import preference as _preference  # noqa: F401  first: it names npo_loss among its losses
from .losses import npo_loss

__all__ = ["npo_loss"]
