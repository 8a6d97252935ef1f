# SPDX-License-Identifier: Apache-2.0
"""What all rooms are built on: elementary functions, exponentials of few operations, random numbers, ragged groups."""

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
from .segments import (
    SortedKeys,
    counting_sort,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_min,
    segment_sum,
)

__all__ = [
    "FUNCTIONS",
    "SortedKeys",
    "counting_sort",
    "elementary",
    "exp2_evolved",
    "exp2_minimax",
    "exp_by_exp2",
    "philox",
    "philox_uniform",
    "segment_logsumexp",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_sum",
]
