# SPDX-License-Identifier: Apache-2.0
"""Sampling and the laws it samples from."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np

from ...front import arrays
from .draws import SAMPLING, Row, Stream, drawn
from .law import Logits, as_law
from .results import Sampled, TopLogprobs


def sample(law: Any, *, seed: Any = None, offset: Any = 0) -> Sampled:
    law = as_law(law)
    shape = tuple(law.values.shape[:-1])
    seed = drawn(seed, shape[0], law.values)
    ids, logps = np.full(shape, -1, np.int64), np.zeros(shape, np.float32)
    for index in product(*map(range, shape)):
        row = Row(law, index[0], index)
        if not row.valid:
            continue
        position = index[1] if len(index) > 1 else 0
        ids[index] = row.pick(Stream(seed, offset, index[0]).draw(position, SAMPLING)[1])
        logps[index] = row.logp(int(ids[index])) if ids[index] >= 0 else 0.0
    return Sampled(*(arrays.from_numpy(x, law.values) for x in (ids, logps)))


def law_probs(law: Any) -> Any:
    law = as_law(law)
    wide = arrays.dtype(law.values) == "float64"
    p = np.zeros(tuple(law.values.shape), np.float64 if wide else np.float32)
    for index in product(*map(range, p.shape[:-1])):
        row = Row(law, index[0], index)
        p[index] = row.p if row.valid else 0.0
    return arrays.from_numpy(p, law.values)


def top_logprobs(law: Any, k: int) -> TopLogprobs:
    law = as_law(law)
    shape = (*tuple(law.values.shape[:-1]), k)
    ids, logps = np.full(shape, -1, np.int64), np.full(shape, -np.inf, np.float32)
    for index in product(*map(range, shape[:-1])):
        row = Row(law, index[0], index)
        if not row.valid:
            continue
        order = np.argsort(-row.order, kind="stable")[:k]
        for j, token in enumerate(order):
            if row.probability(int(token)) > 0:
                at = (*index, j)
                ids[at], logps[at] = token, row.logp(int(token))
    return TopLogprobs(*(arrays.from_numpy(x, law.values) for x in (ids, logps)))


def entropy_adaptive_temperature(
    logits: Any,
    *,
    median: float,
    std: float,
    maximum: float,
    minimum: float,
    temperature: float = 1.0,
    tau: float = 0.05,
) -> Any:
    shape = tuple(logits.shape[:-1])
    out = np.full(shape, temperature, np.float32)
    for index in product(*map(range, shape)):
        row = Row(Logits(logits), index[0], index)
        if not row.valid:
            continue
        with np.errstate(divide="ignore"):
            h = (np.log(max(row.entropy, 0.0)) - median) / std
        scaled = h / maximum if h > 0 else h / abs(minimum)
        out[index] = temperature * (1.0 + tau * min(max(scaled, -1.0), 1.0))
    return arrays.from_numpy(out, logits)


def geometric_mixture_logits(logits: Any, ref_logits: Any, *, mixture: float = 0.5) -> Any:
    wide = arrays.dtype(logits) == "float64"
    a, b = (arrays.to_numpy(x).astype(np.float64) for x in (logits, ref_logits))
    with np.errstate(invalid="ignore"):
        z = a if mixture == 0 else b if mixture == 1 else (1.0 - mixture) * a + mixture * b
    z = np.where(np.isnan(z), -np.inf, z)
    largest = z.max(axis=-1, keepdims=True)
    law = np.isfinite(largest)
    shifted = np.where(law, z, 0.0) - np.where(law, largest, 0.0)
    logps = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    logps = np.where(law, logps, -np.inf)
    return arrays.from_numpy(logps.astype(np.float64 if wide else np.float32), logits)


def value_augmented_logits(logits: Any, token_ids: Any, values: Any, *, beta: float = 1.0) -> Any:
    wide = arrays.dtype(logits) == "float64"
    real = np.float64 if wide else np.float32
    z = arrays.to_numpy(logits).astype(real)
    ids, v = arrays.to_numpy(token_ids), arrays.to_numpy(values).astype(np.float64)
    for b in range(z.shape[0]):
        valid = (ids[b] >= 0) & (ids[b] < z.shape[1])
        if valid.any():
            np.add.at(z[b], ids[b][valid], (beta * (v[b][valid] - v[b][valid].mean())).astype(real))
    return arrays.from_numpy(z, logits)
