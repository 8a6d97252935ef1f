# SPDX-License-Identifier: Apache-2.0
"""What the ops of this room return and take from each other: the choice of a router, and the order of expert rows."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Dispatch(NamedTuple):
    """Where the rows of experts lie: a stable sort of the T * k slots by expert.

    Slot t * k + j is the j-th choice of token t. Every shape follows from the shapes of the input alone, so nothing
    waits for a device: rows that hold nothing are marked by -1.
    """

    slot_of_row: Tensor
    """(rows,) int64: the slot that a row belongs to; -1 for a row of nothing."""
    row_of_slot: Tensor
    """(T * k,) int64: the row of a slot; -1 for a slot that goes nowhere: padding, or beyond the capacity."""
    expert_offsets: Tensor
    """(E + 1,) int64: the rows of expert e are expert_offsets[e] to expert_offsets[e + 1] - 1."""
    expert_counts: Tensor
    """(E,) int64: rows of each expert that hold a slot. They come first among its rows."""


class Routing(NamedTuple):
    """What a router decided for T tokens."""

    topk_ids: Tensor
    """(T, k) int64, the chosen experts, best first; -1 in the rows of padding tokens."""
    topk_weights: Tensor
    """(T, k), their weights; 0 in the rows of padding tokens. Differentiable."""
    expert_counts: Tensor
    """(E,) int64, how many slots chose each expert."""
    prob_sums: Tensor
    """(E,), the sum over counted tokens of the normalised scores. Differentiable."""
    logsumexp: Tensor
    """(T,), log of the sum of exp(logit) of each token; 0 for padding tokens. Differentiable."""
    num_tokens: Tensor
    """() int64, tokens that are no padding."""
    dispatch: Dispatch | None
    """The order of expert rows, or None where it was not asked for."""
