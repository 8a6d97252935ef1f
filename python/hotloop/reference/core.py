# SPDX-License-Identifier: Apache-2.0
"""The functions of ``hotloop.core`` in NumPy, reductions over groups in plain torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..core import segments
from ..front.declare import reference_of

counting_sort = reference_of(segments.counting_sort)
segment_sum = reference_of(segments.segment_sum)
segment_mean = reference_of(segments.segment_mean)
segment_max = reference_of(segments.segment_max)
segment_min = reference_of(segments.segment_min)
segment_logsumexp = reference_of(segments.segment_logsumexp)


def elementary(name: str, x: Any) -> Any:
    x = np.asarray(x)
    wide = x.astype(np.float64)
    with np.errstate(all="ignore"):
        if name in ("exp", "exp_weight"):
            y = np.exp(wide)
        elif name == "sigmoid":
            y = np.where(
                wide >= 0,
                1 / (1 + np.exp(-np.abs(wide))),
                np.exp(-np.abs(wide)) / (1 + np.exp(-np.abs(wide))),
            )
        elif name == "softplus":
            y = np.logaddexp(0, wide)
        elif name == "log1mexp":
            y = np.where(wide > -np.log(2), np.log(-np.expm1(wide)), np.log1p(-np.exp(wide)))
        else:
            y = getattr(np, name)(wide)
        return y.astype(x.dtype)


def exp2_evolved(x: Any, *, coarse: bool = False) -> Any:
    return np.exp2(np.asarray(x))


def exp2_minimax(x: Any, *, degree: int = 5) -> Any:
    return np.exp2(np.asarray(x))


def exp_by_exp2(x: Any, *, method: str = "minimax") -> Any:
    return np.exp(np.asarray(x))


def philox(seed: int, n: int, *, offset: int = 0, first_item: int = 0) -> Any:
    mask = np.uint64(0xFFFFFFFF)
    items = (np.arange(n, dtype=np.uint64) + np.uint64(first_item)).astype(np.uint64)
    c = [items & mask, items >> np.uint64(32)]
    c += [np.full(n, offset & 0xFFFFFFFF, np.uint64), np.full(n, offset >> 32, np.uint64)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (p1 >> np.uint64(32)) ^ c[1] ^ np.uint64(k0),
            p1 & mask,
            (p0 >> np.uint64(32)) ^ c[3] ^ np.uint64(k1),
            p0 & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1).astype(np.uint32)


def philox_uniform(seed: int, n: int, *, offset: int = 0, first_item: int = 0) -> Any:
    words = philox(seed, n, offset=offset, first_item=first_item)
    return ((words >> np.uint32(8)) + np.uint32(1)).astype(np.float32) * np.float32(2.0**-24)
