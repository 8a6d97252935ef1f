# SPDX-License-Identifier: Apache-2.0
"""The sketch of ReLoop2's error memory, one sample at a time."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from ...front import arrays
from .. import core
from .error_memory import compensated, numpy_of, real, softmax
from .results import SketchCompensated

UNIT = 2.0**-32


def lsh_projections(dim: int, *, repeats: int = 180, bits: int = 16, seed: int = 0) -> Any:
    items = -(-dim // 4)
    words = core.philox(seed, repeats * bits * items).reshape(repeats, bits, 4 * items)[..., :dim]
    quantile = np.vectorize(statistics.NormalDist().inv_cdf, otypes=[float])
    return quantile((words + 0.5) * 2.0**-32).astype(np.float32)


def lsh_buckets(hidden: Any, projections: Any) -> Any:
    h, w = numpy_of(hidden, np.float32), numpy_of(projections, np.float32)
    z = np.zeros((len(h), *w.shape[:2]), np.float32)
    with np.errstate(all="ignore"):
        for j in range(h.shape[1]):  # in this order, each step rounded: the bucket is exact
            z += h[:, j, None, None] * w[None, :, :, j]
    buckets = ((z > 0) << np.arange(w.shape[1])).sum(-1)
    return arrays.from_numpy(buckets.astype(np.int32), hidden)


def lsh_error_sketch_write(buckets: Any, labels: Any, base_predictions: Any, sketch: Any) -> None:
    y, yb = numpy_of(labels, np.float64), numpy_of(base_predictions, np.float64)
    for b, row in enumerate(arrays.to_numpy(buckets)):
        for r, bucket in enumerate(row.tolist()):
            for field, x in enumerate((1, round(y[b] / UNIT), round(yb[b] / UNIT))):
                sketch[r, bucket, field] += x


def lsh_error_sketch(
    buckets: Any,
    base_prediction: Any,
    sketch: Any,
    *,
    similarity: str = "count",
    temperature: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.9,
    return_weights: bool = False,
) -> Any:
    at, y_base = arrays.to_numpy(buckets), numpy_of(base_prediction, np.float64)
    written = arrays.to_numpy(sketch)[0, :, 0].sum()
    prediction, weights = np.clip(y_base, 0.0, 1.0), np.zeros(at.shape)
    for b in range(len(at)):
        found = arrays.to_numpy(sketch)[np.arange(at.shape[1]), at[b]]
        used = found[:, 0] > 0
        if not used.any():
            continue
        c, y, yb = found[used].T.astype(np.float64) * [[1], [UNIT], [UNIT]]
        s = c / written if similarity == "count" else np.zeros(len(c))
        a = weights[b, used] = softmax(s / temperature)
        prediction[b] = compensated(y_base[b], a @ (y / c), a @ (yb / c), gamma, lam)
    dtype = real(base_prediction)
    parts = [arrays.from_numpy(x.astype(dtype), buckets) for x in (prediction, weights)]
    return SketchCompensated(*parts) if return_weights else parts[0]
