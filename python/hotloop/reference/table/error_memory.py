# SPDX-License-Identifier: Apache-2.0
"""The error memory of ReLoop2 and its sketch, one query at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...front import arrays
from .results import Compensated


def real(value: Any) -> str:
    """The dtype that an array of this dtype is computed in."""
    return "float64" if arrays.dtype(value) == "float64" else "float32"


def numpy_of(value: Any, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(arrays.to_numpy(value), dtype)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows over their norms; 0 for a norm below the smallest normal number, NaN for one that is not finite."""
    with np.errstate(all="ignore"):
        norm = np.sqrt((x.astype(np.float64) ** 2).sum(-1, keepdims=True))
        inverse = np.where(norm < np.finfo(np.float32).tiny, 0.0, 1.0 / norm)
        return np.asarray(x * np.where(np.isfinite(norm), inverse, np.nan).astype(x.dtype))


def compensated(base: Any, label: Any, stored: Any, gamma: float, lam: float) -> Any:
    y = base + lam * (gamma * (label - base) + (1 - gamma) * (label - stored))
    return np.clip(y, 0.0, 1.0)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return np.asarray(weights / weights.sum())


def error_memory_compensate(
    query: Any,
    base_prediction: Any,
    keys: Any,
    labels: Any,
    base_predictions: Any,
    *,
    k: int = 180,
    temperature: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.9,
    return_neighbors: bool = False,
) -> Any:
    dtype = real(keys)
    q, slots = unit(numpy_of(query, dtype)), unit(numpy_of(keys, dtype))
    y_base = numpy_of(base_prediction, np.float64)
    y, yb = numpy_of(labels, np.float64), numpy_of(base_predictions, np.float64)
    k = min(k, len(slots))
    prediction = np.clip(y_base, 0.0, 1.0)
    weights, neighbors = np.zeros((len(q), k)), np.full((len(q), k), -1, np.int64)
    for b in range(len(q)):
        s = (slots * q[b]).sum(-1)
        s[np.isnan(s)] = -np.inf
        near = np.argsort(-s, kind="stable")[:k]  # of equal similarities the lower slot
        near = near[s[near] > -np.inf]
        if not len(near):
            continue
        a = softmax(s[near].astype(np.float64) / temperature)
        prediction[b] = compensated(y_base[b], a @ y[near], a @ yb[near], gamma, lam)
        weights[b, : len(near)], neighbors[b, : len(near)] = a, near
    found = [
        arrays.from_numpy(x, query)
        for x in (prediction.astype(dtype), weights.astype(dtype), neighbors)
    ]
    return Compensated(*found) if return_neighbors else found[0]
