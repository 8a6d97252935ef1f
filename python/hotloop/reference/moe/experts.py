# SPDX-License-Identifier: Apache-2.0
"""The products of experts in plain torch: a loop over experts, whose sizes are read on the host."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .results import Dispatch

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu")
PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


class Activation(NamedTuple):
    """What stands between the two products of an expert.

    With a gate a row of the first product holds a gate and a value for every inner number: h = f(gate) * (value +
    shift). Without one, h = f(row).
    """

    kind: str = "swiglu"
    """f and whether there is a gate. With one: "swiglu" (f = x sigmoid(alpha x)), "geglu" (x Phi(x)), "geglu_tanh" (its
    tanh form), "reglu" (max(x, 0)). Without: "silu", "gelu", "gelu_tanh", "relu", "relu2" (max(x, 0)^2)."""
    interleaved: bool = False
    """Where gate and value lie: gate 0, value 0, gate 1, ...; else all gates, then all values."""
    limit: float | None = None
    """With a gate: the gate is cut to at most this, the value to -limit .. limit, before anything else."""
    alpha: float = 1.0
    """Of "swiglu" and "silu": the scale inside the sigmoid."""
    shift: float = 0.0
    """What is added to the value."""

    @property
    def gated(self) -> bool:
        return self.kind in GATED


def activate(rows: Tensor, activation: str | Activation) -> Tensor:
    """(n, 2 I) to (n, I) with a gate, else (n, I) to (n, I)."""
    if isinstance(activation, str):
        activation = Activation(activation)
    kind, interleaved, limit, alpha, shift = activation
    if kind not in GATED:
        return _function(kind, rows, alpha)
    if interleaved:
        gate, value = rows[:, ::2], rows[:, 1::2]
    else:
        gate, value = rows.chunk(2, dim=1)
    if limit is not None:
        gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
    return _function(kind, gate, alpha) * (value + shift if shift else value)


def _function(kind: str, x: Tensor, alpha: float) -> Tensor:
    if kind in ("swiglu", "silu"):
        return functional.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)
    if kind in ("geglu", "gelu"):
        return functional.gelu(x)
    if kind in ("geglu_tanh", "gelu_tanh"):
        return functional.gelu(x, approximate="tanh")
    return functional.relu(x).square() if kind == "relu2" else functional.relu(x)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    dispatch: Dispatch | Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    if isinstance(dispatch, Dispatch):
        offsets, counts = dispatch.expert_offsets.tolist(), dispatch.expert_counts.tolist()
    else:
        offsets = dispatch.tolist()
        counts = [last - first for first, last in itertools.pairwise(offsets)]
    width = weight.shape[2 if transposed else 1]
    pieces, done = [], 0
    for e, (first, count) in enumerate(zip(offsets, counts)):
        matrix = weight[e] if transposed else weight[e].t()
        piece = x[first : first + count] @ matrix
        pieces += [x.new_zeros(first - done, width), piece if bias is None else piece + bias[e]]
        done = first + count
    pieces.append(x.new_zeros(x.shape[0] - done, width))
    return torch.cat(pieces)


def expert_rows(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    dispatch: Dispatch,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    activation_budget: int | None = None,
) -> Tensor:
    slots = dispatch.slot_of_row
    token = slots.clamp(min=0) // max(1, dispatch.row_of_slot.shape[0] // max(1, x.shape[0]))
    rows = (
        torch.where((slots >= 0)[:, None], x[token], 0)
        if x.shape[0]
        else x.new_zeros(len(slots), x.shape[1])
    )
    inner = grouped_linear(rows, gate_up, dispatch, gate_up_bias, transposed=transposed)
    return grouped_linear(
        activate(inner, activation), down, dispatch, down_bias, transposed=transposed
    )


def expert_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_weights: Tensor,
    dispatch: Dispatch,
    *,
    activation: str | Activation = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared: Tensor | None = None,
    transposed: bool = False,
    activation_budget: int | None = None,
) -> Tensor:
    rows = expert_rows(
        x,
        gate_up,
        down,
        dispatch,
        activation=activation,
        gate_up_bias=gate_up_bias,
        down_bias=down_bias,
        transposed=transposed,
    )
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    at = dispatch.row_of_slot
    if len(rows) == 0:
        rows = rows.new_zeros(1, rows.shape[1])
    each = torch.where((at >= 0)[:, None], rows[at.clamp(min=0)].to(wide), 0)
    # A slot that goes nowhere has no gradient for its weight.
    weights = torch.where((at >= 0), topk_weights.reshape(-1).to(wide), 0)
    out = (each * weights[:, None]).view(*topk_weights.shape, rows.shape[1]).sum(1)
    return (out if shared is None else out + shared.to(wide)).to(x.dtype)
