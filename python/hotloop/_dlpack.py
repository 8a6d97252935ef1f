"""Tensors on their way to the compiled loops."""

from __future__ import annotations

from ._arrays import exported as export

__all__ = ["export"]
