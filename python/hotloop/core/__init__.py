"""What every room stands on, for NumPy arrays: elementary functions, exponentials of few operations, random numbers."""

from __future__ import annotations

from .functions import (
    FUNCTIONS,
    elementary,
    exp2_evolved,
    exp2_minimax,
    exp_by_exp2,
    philox,
    philox_uniform,
)

__all__ = [
    "FUNCTIONS",
    "elementary",
    "exp2_evolved",
    "exp2_minimax",
    "exp_by_exp2",
    "philox",
    "philox_uniform",
]
