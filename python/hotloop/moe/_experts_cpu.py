# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of experts on the CPU, on checked arguments.

Experts are walked in spans whose rows fit a workspace: product, activation, product, and the sum into the tokens. Rows
of tokens are gathered inside the products (csrc/moe/products.hpp). Nothing but the first product is kept for the
gradient, and of it what a budget allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..front import buffers, native
from ..reference.moe.experts import GATED, Activation
from . import _experts_arguments as arguments
from .results import Dispatch

WORKSPACE = 4 << 20
"""Bytes of the rows of a span, per thread: they stay in a share of the last cache, and experts of a span are enough to
keep threads busy."""
_FUNCTIONS = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}

Gradients = list[Tensor | None]


class Call(NamedTuple):
    """What of a call is no float tensor; the tensors are contiguous."""

    op: str
    activation: Activation
    transposed: bool
    rows: int
    expert_offsets: Tensor
    expert_counts: Tensor | None = None
    """None: experts have all rows between their offsets."""
    slot_of_row: Tensor | None = None
    """None, with ``row_of_slot``: rows have no slots, as a grouped product of offsets alone has them."""
    row_of_slot: Tensor | None = None


class Weights(NamedTuple):
    """The float tensors of a call: inputs that may have a gradient, in its order."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    topk_weights: Tensor | None
    """None: the result is rows in the order of experts."""
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    shared: Tensor | None


class _Order(NamedTuple):
    groups: Tensor
    """(E, 3): expert, first row, number of rows."""
    held: int
    """Rows that have a slot."""
    spans: list[tuple[int, int, int, int]]
    """First group, last group, first row, last row."""
    most: int
    """Rows of the largest span."""


def maths(x: Tensor) -> torch.dtype:
    """The dtype of sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(call: Call, given: Weights, keep: int) -> tuple[Tensor, Tensor]:
    """The result, and the first product of the experts whose rows are among the first ``keep``."""
    core = native.core.moe
    x, gate_up, down, topk_weights, gate_up_bias, down_bias, shared = _prepared(given)
    up, low = _as_outputs_by_inputs(call, gate_up), _as_outputs_by_inputs(call, down)
    width, inner_width, hidden, dtype = up.shape[1], low.shape[2], low.shape[1], maths(x)
    bytes_of_row = (width + inner_width) * x.element_size() + hidden * dtype.itemsize
    order = _order(call, bytes_of_row, keep)
    # Rows of nothing, and of an expert that is kept in part only, stay 0.
    kept = (x.new_empty if order.held == call.rows == keep else x.new_zeros)((keep, width))
    first, h = x.new_empty(order.most, width), x.new_empty(order.most, inner_width)
    assert call.slot_of_row is not None
    assert call.row_of_slot is not None
    of_row, choices = call.slot_of_row, _choices(call.row_of_slot, x)
    activation = packed(call.activation)
    if topk_weights is None:
        # Rows of nothing are 0.
        result = (x.new_empty if order.held == call.rows else x.new_zeros)((call.rows, hidden))
    else:
        scale = topk_weights.to(dtype).contiguous().view(-1)
        result = (
            x.new_zeros(x.shape, dtype=dtype)
            if shared is None
            else shared.to(dtype, copy=True, memory_format=torch.contiguous_format)
        )
        rows = x.new_empty((order.most, hidden), dtype=dtype)
    for g0, g1, r0, r1 in order.spans:
        n, groups, slots = r1 - r0, order.groups[g0:g1], of_row[r0:r1]
        inner = kept[r0:r1] if r1 <= keep else first[:n]
        core.rows_product((x, of_row, choices, 0), up, gate_up_bias, groups, inner, r0)
        core.activate(activation, slots, inner, h[:n])
        if topk_weights is None:
            core.rows_product((h, None, 1, r0), low, down_bias, groups, result, 0)
        else:
            core.rows_product((h, None, 1, r0), low, down_bias, groups, rows, r0)
            core.scatter_add(slots, choices, rows[:n], scale, result)
    return result.to(x.dtype), kept


def backward(
    call: Call, given: Weights, kept: Tensor, grad: Tensor, needs: Sequence[bool]
) -> Gradients:
    """The gradients of ``Weights`` that are needed, but for that of ``shared``, which is that of the result."""
    core = native.core.moe
    x, gate_up, down, topk_weights, gate_up_bias, down_bias, _ = _prepared(given)
    grad = grad.detach()
    up, low = _as_outputs_by_inputs(call, gate_up), _as_outputs_by_inputs(call, down)
    width, inner_width, hidden, dtype = up.shape[1], low.shape[2], low.shape[1], maths(x)
    bytes_of_row = (2 * width + inner_width) * x.element_size()
    bytes_of_row += (inner_width + hidden) * dtype.itemsize
    keep = kept.shape[0]
    order = _order(call, bytes_of_row, keep)
    assert call.slot_of_row is not None
    assert call.row_of_slot is not None
    of_row, choices = call.slot_of_row, _choices(call.row_of_slot, x)
    activation = packed(call.activation)
    scale = None if topk_weights is None else topk_weights.to(dtype).contiguous().view(-1)
    found: Gradients = [None] * 6
    if needs[0]:
        d_x = x.new_zeros(x.shape, dtype=dtype)
    # Experts without rows have gradients of 0, which the products write.
    if needs[1]:
        found[1] = buffers.advised(x.new_empty(gate_up.shape))
    if needs[2]:
        found[2] = buffers.advised(x.new_empty(down.shape))
    if needs[4]:
        found[4] = x.new_empty((up.shape[0], width))
    if needs[5]:
        found[5] = x.new_empty((up.shape[0], hidden))
    d_up, d_low = (
        None if d is None else _as_outputs_by_inputs(call, d) for d in (found[1], found[2])
    )
    # Slots without a row have weights of gradient 0.
    d_scale = None if scale is None else torch.zeros_like(scale)
    first = x.new_empty(order.most, width)
    d_first, h = torch.empty_like(first), x.new_empty(order.most, inner_width)
    above = h if x.dtype == dtype else torch.empty_like(h, dtype=dtype)
    d_rows = x.new_empty((order.most, hidden), dtype=dtype)
    beside = None
    if scale is not None and down_bias is not None and needs[3]:
        beside = x.new_empty((order.most, 1), dtype=dtype)
    one = x.new_ones((1, 1), dtype=dtype)
    tokens = (x, of_row, choices, 0)
    results = (grad, None, 1, 0) if scale is None else (grad, of_row, choices, 0)
    for g0, g1, r0, r1 in order.spans:
        n, groups, slots = r1 - r0, order.groups[g0:g1], of_row[r0:r1]
        if r1 <= keep:
            inner = kept[r0:r1]
        else:
            inner = first[:n]
            core.rows_product(tokens, up, gate_up_bias, groups, inner, r0)
        core.rows_product(results, low.transpose(1, 2), None, groups, above, r0)
        if beside is not None and down_bias is not None:
            core.rows_product(results, down_bias[:, None, :], None, groups, beside, r0)
        core.activate_gradient(
            activation, slots, inner, above[:n], scale, None if beside is None else beside[:n], d_first[:n], h[:n],
            d_scale,
        )  # fmt: skip
        of_first, of_ones = (d_first, None, 1, r0), (one.expand(n, 1), None, 1, r0)
        if d_low is not None:
            core.outer_product(results, (h, None, 1, r0), groups, d_low)
        if d_up is not None:
            core.outer_product(of_first, tokens, groups, d_up)
        if found[4] is not None:
            core.outer_product(of_ones, of_first, groups, found[4][:, None, :])
        if found[5] is not None:
            weights = of_ones if scale is None else (scale.view(-1, 1), of_row, 1, 0)
            core.outer_product(weights, results, groups, found[5][:, None, :])
        if needs[0]:
            core.rows_product(of_first, up.transpose(1, 2), None, groups, d_rows, r0)
            core.scatter_add(slots, choices, d_rows[:n], None, d_x)
    if needs[0]:
        found[0] = d_x.to(x.dtype)
    if needs[3] and d_scale is not None and topk_weights is not None:
        found[3] = d_scale.view(topk_weights.shape).to(topk_weights.dtype)
    return found


def linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``grouped_linear``."""
    matrices = _as_outputs_by_inputs(call, weight.detach())
    order = _order(call, 0, 0)
    out = (x.new_empty if order.held == call.rows else x.new_zeros)((call.rows, matrices.shape[1]))
    native.core.moe.rows_product(
        (x.detach(), None, 1, 0), matrices, _contiguous(bias), order.groups, out, 0
    )
    return out


def linear_backward(
    call: Call, x: Tensor, weight: Tensor, grad: Tensor, needs: Sequence[bool]
) -> Gradients:
    """The gradients of x, weight and bias that are needed."""
    core = native.core.moe
    x, weight, grad = x.detach(), weight.detach(), grad.detach()
    order = _order(call, 0, 0)
    of_x, of_weight, of_bias = needs
    rows, results = (x, None, 1, 0), (grad, None, 1, 0)
    found: Gradients = [None] * 3
    if of_x:
        found[0] = d_x = (x.new_empty if order.held == call.rows else x.new_zeros)(x.shape)
        matrices = _as_outputs_by_inputs(call, weight)
        core.rows_product(results, matrices.transpose(1, 2), None, order.groups, d_x, 0)
    if of_weight:
        found[1] = d_weight = buffers.advised(x.new_empty(weight.shape))
        core.outer_product(results, rows, order.groups, _as_outputs_by_inputs(call, d_weight))
    if of_bias:
        found[2] = d_bias = x.new_empty((weight.shape[0], grad.shape[1]))
        ones = x.new_ones((1, 1), dtype=maths(x)).expand(call.rows, 1)
        core.outer_product((ones, None, 1, 0), results, order.groups, d_bias[:, None, :])
    return found


def _prepared(given: Weights) -> Weights:
    """Without a graph; biases contiguous."""
    found = Weights._make(None if t is None else t.detach() for t in given)
    return found._replace(
        gate_up_bias=_contiguous(found.gate_up_bias), down_bias=_contiguous(found.down_bias)
    )


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().contiguous()


def _as_outputs_by_inputs(call: Call, weight: Tensor) -> Tensor:
    return weight.transpose(1, 2) if call.transposed else weight


def _choices(slots: Tensor, x: Tensor) -> int:
    return max(1, slots.shape[0] // max(1, x.shape[0]))


def packed(activation: Activation) -> tuple[str, bool, bool, float | None, float, float]:
    """As the loops take it."""
    kind, interleaved, limit, alpha, shift = activation
    return (_FUNCTIONS.get(kind, kind), kind in GATED, interleaved, limit, alpha, shift)


def _order(call: Call, bytes_of_row: int, keep: int) -> _Order:
    """Which rows are whose; raises where the numbers of the dispatch do not fit each other."""
    groups = call.expert_offsets.new_empty((call.expert_offsets.shape[0] - 1, 3))
    most = max(1, WORKSPACE * torch.get_num_threads() // max(1, bytes_of_row))
    found = native.core.moe.expert_groups(
        call.slot_of_row, call.row_of_slot, call.expert_offsets, call.expert_counts, call.rows, groups, most, keep
    )  # fmt: skip
    if found is None:
        look(call)
        raise AssertionError("the check refuses what the loops refuse")
    held, spans = found
    return _Order(groups, held, spans, max((r1 - r0 for *_, r0, r1 in spans), default=0))


def look(call: Call) -> None:
    """Name the number of a dispatch that does not fit."""
    slot_of_row, row_of_slot, counts = call.slot_of_row, call.row_of_slot, call.expert_counts
    if slot_of_row is None or row_of_slot is None or counts is None:
        arguments.look_at_offsets(call.op, "dispatch", call.expert_offsets, call.rows)
    else:
        dispatch = Dispatch(slot_of_row, row_of_slot, call.expert_offsets, counts)
        arguments.look_at(call.op, dispatch, call.rows)
