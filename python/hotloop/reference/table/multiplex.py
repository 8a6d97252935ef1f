# SPDX-License-Identifier: Apache-2.0
"""Multiplexed lookup as the definition says: row numbers, one embedding lookup per chunk, pooling, concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .hashing import salted_hash_bucket


def multiplexed_embedding_lookup(
    tables: Any,
    values: Sequence[Any],
    *,
    chunks: Sequence[int],
    combiner: str = "mean",
    padding_id: int | None = None,
    seed: int = 0,
    sparse: bool = False,
) -> Tensor:
    tables = [tables] if isinstance(tables, Tensor) else list(tables)
    buckets = tables[0].shape[0]
    found: list[Tensor] = []
    for f, (item, n_chunks) in enumerate(zip(values, chunks)):
        ids, sample, batch = _flat(item)
        kept = torch.ones_like(ids, dtype=torch.bool) if padding_id is None else ids != padding_id
        ids, sample = ids[kept], sample[kept]
        count = torch.bincount(sample, minlength=batch).clamp(min=1)
        for k in range(n_chunks):
            rows = salted_hash_bucket(ids, buckets, feature=f, chunk=k, seed=seed)
            table = tables[len(found) % len(tables)]
            wide = torch.promote_types(table.dtype, torch.float32)
            hits = F.embedding(rows, table, sparse=sparse).to(wide)
            bags = hits.new_zeros(batch, table.shape[1]).index_add(0, sample, hits)
            if combiner == "mean":
                bags = bags / count[:, None].to(wide)
            elif combiner == "sqrtn":
                bags = bags / count[:, None].to(wide).sqrt()
            found.append(bags.to(table.dtype))
    return torch.cat(found, dim=1)


def _flat(item: Any) -> tuple[Tensor, Tensor, int]:
    """The values of a feature, the sample each belongs to, and the number of samples."""
    if isinstance(item, tuple):
        ids, offsets = item[0].long(), item[1].long()
        batch = offsets.shape[0] - 1
        return ids, torch.arange(batch, device=ids.device).repeat_interleave(offsets.diff()), batch
    batch, bag = item.shape[0], 1 if item.ndim == 1 else item.shape[1]
    sample = torch.arange(batch, device=item.device).repeat_interleave(bag)
    return item.long().reshape(-1), sample, batch
