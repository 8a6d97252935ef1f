"""What the error memory and its sketch give back, and how they read arrays; the front doors import it from here."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...front import arrays


class Compensated(NamedTuple):
    """Compensated predictions and what they came from.

    ``prediction`` (B,): y_pred. ``weights`` (B, k): the softmax weights a, largest first, 0 where there is no further
    neighbour. ``neighbors`` (B, k) int64: their slots, -1 where there is none.
    """

    prediction: Any
    weights: Any
    neighbors: Any


class SketchCompensated(NamedTuple):
    """``prediction`` (B,): y_pred. ``weights`` (B, R): of each repeat, 0 where the bucket is empty."""

    prediction: Any
    weights: Any


def real(value: Any) -> str:
    """The dtype that an array of this dtype is computed in."""
    return "float64" if arrays.dtype(value) == "float64" else "float32"


def numpy_of(value: Any, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(arrays.to_numpy(value), dtype)
