"""Keys, counts and masks: what the front doors of this room share."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..front import arrays, check

KEYS = ("int64", "uint64", "int32")


def as_int64(value: Any) -> Any:
    """The same bits as contiguous int64: uint64 is looked at again, int32 is widened with its sign."""
    if isinstance(value, np.ndarray):
        value = np.ascontiguousarray(value)
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
    if tuple(value.shape) != tuple(like.shape):
        raise ValueError(
            f"[{op}] {name}: expected shape {tuple(like.shape)} like keys, got {tuple(value.shape)}."
        )
    value = as_int64(value)
    if value.shape[0] and (lowest := int(value.min())) < least:
        raise ValueError(
            f"[{op}] {name}: expected counts >= {least}, got {lowest}. Leave out what was not seen."
        )
    return value
