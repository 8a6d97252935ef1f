"""Losses that make a model forget what it should not know."""

from .losses import npo_loss

__all__ = ["npo_loss"]
