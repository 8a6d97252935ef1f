# SPDX-License-Identifier: Apache-2.0
"""Gradients that wait for ``step``: joined into one, summed per row, scaled."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .results import NO_ROW

_BLOCK = 1 << 16  # positions whose gradients are written out at a time


class KeptGradients(NamedTuple):
    """One row per distinct id: ids (U,) int64, ascending, and the summed gradient of each, (U, dim) float32."""

    ids: Tensor
    grads: Tensor


class Keeper(Protocol):
    """A module that keeps gradients of lookups in one table."""

    table: Any
    mode: str
    pending: list[Any]

    def scaled(self) -> list[tuple[Any, ...]]: ...


def joined(entries: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    """One lookup that is all of these: the same module made them, so they have the same columns."""
    if len(entries) == 1:
        return entries[0]
    grads, ids, offsets, weights, rows, sizes, largest = zip(*entries)
    begins = list(itertools.accumulate((len(x) for x in ids), initial=0))
    bounds = None
    if offsets[0] is not None:
        parts = [x[:-1] + begin for x, begin in zip(offsets, begins)]
        bounds = torch.cat((*parts, offsets[0].new_tensor(begins[-1:])))
    scale = None
    if any(w is not None for w in weights):
        scale = torch.cat(
            [g.new_ones(len(i)) if w is None else w for g, i, w in zip(grads, ids, weights)]
        )
    places = torch.cat([torch.where(x >= 0, x + begin, x) for x, begin in zip(largest, begins)])
    moved, laid = map(torch.cat, (grads, ids)), map(torch.cat, (rows, sizes))
    return *moved, bounds, scale, *laid, places


def summed(helds: Iterable[Keeper]) -> KeptGradients:
    """What modules over one table keep, as the gradient of a dense table would be: summed per row."""
    helds = list(helds)
    if not any(held.pending for held in helds):
        table = helds[0].table
        grads = torch.empty(0, table.dim, dtype=torch.float32, device=table.device)
        return KeptGradients(grads.new_empty(0, dtype=torch.int64), grads)
    grads, ids, *_ = across(helds)
    return KeptGradients(ids, grads)


def across(helds: Iterable[Keeper]) -> tuple[Any, ...]:
    """What modules over one table keep, as one lookup of mode "sum" that holds every id once.

    Of an id whose row was freed and made again meanwhile one row is named; the update looks again where it is gone.
    """
    entries = [(held.mode, saved) for held in helds for saved in held.scaled()]
    there = [saved[4] != NO_ROW for _, saved in entries]
    named, lay = (
        torch.cat([saved[column][mask] for (_, saved), mask in zip(entries, there)])
        for column in (1, 4)
    )
    ids, inverse = torch.unique(named, return_inverse=True)
    rows = lay.new_empty(len(ids))
    rows[inverse] = lay
    grads = _added(entries, there, inverse, len(ids))
    return grads, ids, None, None, rows, torch.ones_like(ids), ids[:0]


def _added(
    entries: list[tuple[str, tuple[Any, ...]]], there: list[Tensor], inverse: Tensor, count: int
) -> Tensor:
    """Gradients of lookups added up, (count, dim); ``inverse``: to which sum each position with a row belongs."""
    out: Tensor = entries[0][1][0].new_zeros(count, entries[0][1][0].shape[1])
    begin = 0
    for (mode, (grad, named, offsets, weights, _, sizes, largest)), mask in zip(entries, there):
        end = begin + int(mask.sum())
        row = torch.zeros_like(named)
        row[mask] = inverse[begin:end]
        begin = end
        if mode == "max":
            bag, column = (largest >= 0).nonzero(as_tuple=True)
            place = (row[largest[bag, column]], column)
            out.index_put_(place, grad[bag, column], accumulate=True)
            continue
        bags = torch.arange(len(grad), device=grad.device)
        if offsets is not None:
            bags = bags.repeat_interleave(offsets.diff())
        factor = mask.float() if weights is None else weights * mask
        if mode == "mean":
            factor = factor / sizes.clamp(min=1)[bags]
        for first in range(0, len(named), _BLOCK):
            block = slice(first, first + _BLOCK)
            out.index_add_(0, row[block], grad[bags[block]] * factor[block, None])
    return out
