# SPDX-License-Identifier: Apache-2.0
"""Hashing in NumPy: 64-bit wrapping arithmetic, the 128-bit product by halves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ...front import arrays

FEATURE_FACTOR = 0x9E3779B97F4A7C15
CHUNK_FACTOR = 0xC2B2AE3D27D4EB4F
BYTES_FACTOR = 0x165667B19E3779F9
_MASK = 2**64 - 1


def mix64(k: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 over uint64."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        # np.multiply: where k has no dimension, * of scalars warns that it wraps.
        k = np.multiply(k ^ (k >> np.uint64(33)), np.uint64(factor), dtype=np.uint64)
    mixed: np.ndarray = k ^ (k >> np.uint64(33))
    return mixed


def mix64_number(k: int) -> int:
    return int(mix64(np.array([k & _MASK], np.uint64))[0])


def salt_of(feature: int, chunk: int, seed: int) -> int:
    return mix64_number(feature * FEATURE_FACTOR + chunk * CHUNK_FACTOR + seed)


def bucket_of(h: np.ndarray, buckets: int) -> np.ndarray:
    """floor(h * buckets / 2^64)."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    b = np.uint64(buckets)
    h1, h0, b1, b0 = h >> half, h & low, b >> half, b & low
    middle = h1 * b0 + ((h0 * b0) >> half)
    high: np.ndarray = h1 * b1 + (middle >> half) + (((middle & low) + h0 * b1) >> half)
    return high


def salted_hash_bucket(
    keys: Any, num_buckets: int, *, feature: int = 0, chunk: int = 0, seed: int = 0
) -> Any:
    k = arrays.to_numpy(keys).astype(np.int64).view(np.uint64)
    h = mix64(k ^ np.uint64(salt_of(feature, chunk, seed)))
    return arrays.from_numpy(bucket_of(h, num_buckets).view(np.int64), keys)


def feature_keys(ids: Any, feature: int, *, feature_bits: int = 16) -> Any:
    k = arrays.to_numpy(ids).astype(np.int64).view(np.uint64)
    if feature_bits == 0:
        k = mix64(k ^ np.uint64(salt_of(feature, 0, 0)))
    else:
        k = k ^ np.uint64(feature << (64 - feature_bits))
    return arrays.from_numpy(k.view(np.int64), ids)


def hash_strings(strings: Sequence[str | bytes]) -> np.ndarray:
    out = []
    for s in strings:
        data = s.encode() if isinstance(s, str) else s
        h = mix64_number(len(data) + BYTES_FACTOR)
        for at in range(0, len(data), 8):
            h = mix64_number(h ^ int.from_bytes(data[at : at + 8], "little"))
        out.append(h)
    return np.array(out, np.uint64).view(np.int64)
