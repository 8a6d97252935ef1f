# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of experts, on checked arguments, behind the interface of ``_experts_cpu``.

Nothing is read back from the device: sizes follow from shapes, and which rows are whose is found by the kernels. Rows
in the order of experts exist in backward (one tensor of the size of the first product, one of h, one of d x) and as the
second product in forward; none is kept but the rows of the first product that the budget allows.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..front import arrays
from ..front import impl as _impl
from ._experts_cpu import Call, Gradients, Weights, packed


def refuses(like: Tensor) -> str | None:
    """Why the kernels cannot run for these inputs."""
    return _impl.on_triton(like) if like.is_cuda else f"device {arrays.device(like)}"


def _grouped() -> Any:
    return importlib.import_module("hotloop.kernels.moe.grouped")


def _experts() -> Any:
    return importlib.import_module("hotloop.kernels.moe.experts")


def forward(call: Call, given: Weights, keep: int) -> tuple[Tensor, Tensor]:
    """The result, and the first ``keep`` rows of the first product; rows of nothing hold anything."""
    kernels = _experts()
    x, gate_up, down, topk_weights, gate_up_bias, down_bias, shared = _prepared(given)
    up, low = _inputs_by_outputs(call, gate_up), _inputs_by_outputs(call, down)
    _, config, tiles = _schedule(call, x)
    kept = x.new_empty((keep, up.shape[2]))
    h = kernels.first_product(
        x, _tokens(call, x), tiles, call.rows, up, gate_up_bias, _function(call), config.product,
        kept=kept if keep else None, kept_stop=keep,
    )  # fmt: skip
    rows: Tensor = _grouped().product(h, None, tiles, call.rows, low, down_bias, config.product)
    if topk_weights is None:
        return rows, kept
    out = kernels.sum_choices(rows, call.row_of_slot, x.shape[0], _flat(topk_weights), shared)
    return out, kept


def backward(
    call: Call, given: Weights, kept: Tensor, grad: Tensor, needs: Sequence[bool]
) -> Gradients:
    """The gradients of ``Weights`` that are needed, but for that of ``shared``, which is that of the result."""
    grouped, kernels = _grouped(), _experts()
    x, gate_up, down, topk_weights, gate_up_bias, down_bias, _ = _prepared(given)
    grad = grad.detach()
    up, low = _inputs_by_outputs(call, gate_up), _inputs_by_outputs(call, down)
    order, config, tiles = _schedule(call, x)
    tokens, function = _tokens(call, x), _function(call)
    # The gradient of the result has a row per token where choices are added with weights.
    of_token, scale = (None, None) if topk_weights is None else (tokens, _scale(call, topk_weights))
    found: Gradients = [None] * 6
    need_inner = needs[0] or needs[1] or needs[4]
    need_choices = needs[3] and topk_weights is not None
    if need_inner or needs[2] or need_choices:
        whole = kept.shape[0] == call.rows
        inner = kept
        if not whole:
            inner = x.new_empty((call.rows, up.shape[2]))
            inner[: kept.shape[0]] = kept
            kernels.first_product(
                x, tokens, tiles, call.rows, up, gate_up_bias, function, config.product,
                kept=inner, kept_first=kept.shape[0], kept_stop=call.rows, need_h=False,
            )  # fmt: skip
        d_inner, h, dots = kernels.inner_gradient(
            grad, of_token, scale, tiles, low.transpose(1, 2), inner, function, config.product,
            need_inner=need_inner, need_h=needs[2], need_dots=need_choices, reuse=not whole,
        )  # fmt: skip
    if needs[0]:
        d_rows = grouped.product(
            d_inner, None, tiles, call.rows, up.transpose(1, 2), None, config.product
        )
        found[0] = kernels.sum_choices(d_rows, call.row_of_slot, x.shape[0], None, None)
    if needs[1]:
        pair = ((d_inner, None), (x, tokens))
        found[1] = _weight_gradient(call, *pair, order, config)
    if needs[2]:
        found[2] = _weight_gradient(call, (grad, of_token), (h, None), order, config)
    if need_choices and topk_weights is not None:
        d_weights = kernels.choice_weight_gradient(
            dots, grad, tokens, down_bias, tiles, call.slot_of_row, topk_weights.numel()
        )
        found[3] = d_weights.view(topk_weights.shape).to(topk_weights.dtype)
    if needs[4]:
        found[4] = grouped.bias_gradient(d_inner, None, None, order)
    if needs[5]:
        found[5] = grouped.bias_gradient(grad, of_token, scale, order)
    return found


def linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``grouped_linear``."""
    _, config, tiles = _schedule(call, x)
    matrices = _inputs_by_outputs(call, weight.detach())
    found: Tensor = _grouped().product(
        x.detach(), None, tiles, call.rows, matrices, _contiguous(bias), config.product
    )
    return found


def linear_backward(
    call: Call, x: Tensor, weight: Tensor, grad: Tensor, needs: Sequence[bool]
) -> Gradients:
    """The gradients of x, weight and bias that are needed."""
    x, weight, grad = x.detach(), weight.detach(), grad.detach()
    order, config, tiles = _schedule(call, x)
    found: Gradients = [None] * 3
    if needs[0]:
        matrices = _inputs_by_outputs(call, weight).transpose(1, 2)
        found[0] = _grouped().product(grad, None, tiles, call.rows, matrices, None, config.product)
    if needs[1]:
        found[1] = _weight_gradient(call, (grad, None), (x, None), order, config)
    if needs[2]:
        found[2] = _grouped().bias_gradient(grad, None, None, order)
    return found


def _weight_gradient(
    call: Call,
    outputs: tuple[Tensor, Tensor | None],
    inputs: tuple[Tensor, Tensor | None],
    order: Any,
    config: Any,
) -> Tensor:
    """In the order of storage of the weight."""
    pair = (*inputs, *outputs) if call.transposed else (*outputs, *inputs)
    found: Tensor = _grouped().weight_gradient(*pair, order, config.weight)
    return found


def _prepared(given: Weights) -> Weights:
    """Without a graph; biases contiguous."""
    found = Weights._make(None if t is None else t.detach() for t in given)
    return found._replace(
        gate_up_bias=_contiguous(found.gate_up_bias), down_bias=_contiguous(found.down_bias)
    )


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().contiguous()


def _inputs_by_outputs(call: Call, weight: Tensor) -> Tensor:
    return weight if call.transposed else weight.transpose(1, 2)


def _schedule(call: Call, x: Tensor) -> tuple[Any, Any, Any]:
    """Where rows lie, the launch choices, and the tiles of rows."""
    grouped = _grouped()
    order = grouped.Order(call.expert_offsets, call.expert_counts, call.rows)
    config = grouped.configs(x.dtype, call.rows, order.experts, x.device)
    return order, config, grouped.schedule(order, config.product.rows)


def _function(call: Call) -> Any:
    kind, gated, interleaved, limit, alpha, shift = packed(call.activation)
    return _experts().Function(kind, gated, interleaved, limit, alpha, shift)


def _tokens(call: Call, x: Tensor) -> Tensor:
    """(R,): the token of a row, 0 for a row of nothing."""
    assert call.slot_of_row is not None
    assert call.row_of_slot is not None
    return call.slot_of_row.clamp(min=0) // max(1, call.row_of_slot.shape[0] // max(1, x.shape[0]))


def _flat(topk_weights: Tensor) -> Tensor:
    return topk_weights.float().contiguous().view(-1)


def _scale(call: Call, topk_weights: Tensor) -> Tensor:
    """(R,) float32: the weight of a row's choice; that of a row of nothing is never read."""
    assert call.slot_of_row is not None
    if topk_weights.numel() == 0:
        return topk_weights.new_zeros(call.rows, dtype=torch.float32)
    return _flat(topk_weights)[call.slot_of_row.clamp(min=0)]
