"""The ops of this room as torch operators: what ``torch.compile`` sees of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _keys


@torch.library.custom_op("hotloop::salted_hash_bucket", mutates_args=())
def _hash_bucket(
    keys: Tensor, num_buckets: int, feature: int, chunk: int, seed: int, impl: str
) -> Tensor:
    unsigned = (feature % 2**64, chunk % 2**64, seed % 2**64)
    done: Tensor = _keys.hash_bucket(keys, num_buckets, *unsigned, impl)  # type: ignore[arg-type]
    return done


@_hash_bucket.register_fake
def _hash_bucket_fake(
    keys: Tensor, num_buckets: int, feature: int, chunk: int, seed: int, impl: str
) -> Tensor:
    return keys.new_empty(keys.shape, dtype=torch.int64)


def signed(number: int) -> int:
    """A schema's integers have a sign; the bits are what counts."""
    return number - 2**64 if number >= 2**63 else number


def hash_bucket(
    keys: Any, num_buckets: int, feature: int, chunk: int, seed: int, impl: str
) -> Tensor:
    done: Tensor = torch.ops.hotloop.salted_hash_bucket(
        keys, num_buckets, signed(feature), signed(chunk), signed(seed), impl
    )
    return done
