# SPDX-License-Identifier: Apache-2.0
"""What the ops of this room return and take from each other: the choice of a router, and the order of expert rows."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

NormKind = Literal["layer", "rms"]


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


class Norm(NamedTuple):
    """The norm of a layer's input: what a pass over the residual stream computes while a row of it is in cache."""

    kind: NormKind
    """"layer": (h - mean(h)) / sqrt(var(h) + eps) * weight + bias; "rms": h / sqrt(mean(h^2) + eps) * weight + bias."""
    weight: Tensor | None = None
    """(D,), or None for 1. Differentiable."""
    bias: Tensor | None = None
    """(D,), or None for 0. Differentiable."""
    eps: float = 1e-5
    """Added under the root, >= 0."""


class ResidualStep(NamedTuple):
    """What ``residual_smoe_layer`` returns."""

    x: Tensor
    """(T, D), the residual stream behind the layer."""
    normed: Tensor | None
    """(T, D), the norm of ``x``, which the next layer takes; None without a norm, and with ``post_norm``."""


class MomentumStep(NamedTuple):
    """What ``momentum_smoe_layer`` returns."""

    x: Tensor
    """(T, D), the residual stream behind the layer."""
    m: Tensor
    """(T, D), the momentum that the next sparse layer of the same forward pass takes."""
    normed: Tensor | None
    """(T, D), the norm of ``x``, which the next layer takes; None without a norm, and with ``post_norm``."""


class AdamState(NamedTuple):
    """What the sparse layers of one forward pass hand on in ``adam_smoe_layer``; None in its place is zeros."""

    p: Tensor | None
    """(T, D), running mean of the mixture's output."""
    v: Tensor | None
    """(T, D), running mean of its square."""
    m: Tensor | None
    """(T, D), momentum."""


class AdamStep(NamedTuple):
    """What ``adam_smoe_layer`` returns."""

    x: Tensor
    """(T, D), the residual stream behind the layer."""
    state: AdamState
    """What the next sparse layer of the same forward pass takes."""
    normed: Tensor | None
    """(T, D), the norm of ``x``, which the next layer takes; None without a norm, and with ``post_norm``."""


class RobustMomentumStep(NamedTuple):
    """What ``robust_momentum_smoe_layer`` returns."""

    x: Tensor
    """(T, D), the residual stream behind the layer."""
    d: Tensor
    """(T, D), the increment that the next sparse layer of the same forward pass takes."""
    normed: Tensor | None
    """(T, D), the norm of ``x + alpha * d``; None without a norm, and with ``post_norm``."""


class RobustMomentumCoefficients(NamedTuple):
    """What ``robust_momentum_coefficients`` returns."""

    gamma: float
    """Step along the mixture's output."""
    mu: float
    """How much of the last increment is kept."""
    alpha: float
    """How far the mixture looks ahead along the increment."""
    p: float
    """The rate at which errors shrink on a quadratic."""
