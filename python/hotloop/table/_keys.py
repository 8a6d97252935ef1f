# SPDX-License-Identifier: Apache-2.0
"""Keys, counts and masks: what the front doors of this room share."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..front import arrays, check, native
from ..front.check import integer
from ..front.impl import Impl, choose
from ..reference.table import hashing as _reference

KEYS = ("int64", "uint64", "int32")


def as_int64(value: Any) -> Any:
    """The same bits as contiguous int64: uint64 is looked at again, int32 is widened with its sign."""
    if isinstance(value, np.ndarray):
        value = arrays.dense(value)
        return (
            value.view(np.int64) if value.dtype == np.uint64 else value.astype(np.int64, copy=False)
        )
    if hasattr(value, "contiguous"):  # torch
        import torch

        value = value.contiguous()
        return value.view(torch.int64) if value.dtype == torch.uint64 else value.long()
    return value.astype("int64")


def keys(op: str, value: Any, *ndims: int, name: str = "keys") -> Any:
    """Keys as contiguous int64: any 64 bits, none is reserved."""
    return as_int64(check.array(op, name, value, KEYS, *ndims))


def counts(op: str, value: Any, like: Any, *, name: str = "counts", least: int = 0) -> Any:
    """Sightings of each key, int64 (n,), or None."""
    if value is None:
        return None
    check.array(op, name, value, arrays.INTEGERS, 1)
    check.same_place(op, name, value, "keys", like)
    check.shape(op, name, value, tuple(like.shape), "like keys")
    value = as_int64(value)
    if value.shape[0] and (lowest := int(value.min())) < least:
        raise ValueError(
            f"[{op}] {name}: expected counts >= {least}, got {lowest}. Leave out what was not seen."
        )
    return value


def signed(bits: int) -> int:
    """The int64 of the same 64 bits."""
    return bits - 2**64 if bits >= 2**63 else bits


def hash_bucket(
    given: Any, num_buckets: int, feature: int, chunk: int, seed: int, impl: Impl
) -> Any:
    """``salted_hash_bucket`` below its torch operator: checks, and runs."""
    op = "salted_hash_bucket"
    k = keys(op, given)
    most = 2**64 - 1
    buckets = integer(op, "num_buckets", num_buckets, at_least=1, at_most=2**63 - 1)
    feature = integer(op, "feature", feature, at_least=0, at_most=most)
    chunk = integer(op, "chunk", chunk, at_least=0, at_most=most)
    seed = integer(op, "seed", seed, at_least=0, at_most=most)
    if choose(op, impl, "keys", k) == "reference":
        return _reference.salted_hash_bucket(k, buckets, feature=feature, chunk=chunk, seed=seed)
    flat = k.reshape(-1)
    out = arrays.empty(k, (flat.shape[0],), "int64")
    native.core.table.hash_bucket(flat.shape[0], flat, feature, chunk, seed, buckets, out)
    return out.reshape(k.shape)
