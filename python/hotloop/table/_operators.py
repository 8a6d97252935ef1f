# SPDX-License-Identifier: Apache-2.0
"""The ops of this room as torch operators: what ``torch.compile`` sees of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _keys


@torch.library.custom_op("hotloop::salted_hash_bucket", mutates_args=())
def hash_bucket(
    keys: Tensor, num_buckets: int, feature: int, chunk: int, seed: int, impl: str
) -> Tensor:
    """The integers of a schema have a sign: ``_keys.signed`` makes these, and here it goes again."""
    unsigned = (feature % 2**64, chunk % 2**64, seed % 2**64)
    done: Tensor = _keys.hash_bucket(keys, num_buckets, *unsigned, impl)  # type: ignore[arg-type]
    return done


@hash_bucket.register_fake
def _(keys: Tensor, *_: Any) -> Tensor:
    return keys.new_empty(keys.shape, dtype=torch.int64)
