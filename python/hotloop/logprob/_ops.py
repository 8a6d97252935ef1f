# SPDX-License-Identifier: Apache-2.0
"""The fused lm_head for autograd: a direct route in eager mode, registered operators under torch.compile.

The direct route keeps logit tiles between forward and backward (see ``_cpu``), which a functional operator
cannot; under ``torch.compile`` backward computes the logits again: four products instead of three.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..front import second
from ..reference.logprob import cross_entropy, head_statistics
from . import _cpu, _statistics, _triton
from ._call import LmHeadCall

_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_NUMBERS = "SymInt ignore_index, float temperature, float logit_scale, float softcap, str impl"


def forward(
    call: LmHeadCall, everything: bool, argmax: bool, keep: bool = True
) -> tuple[Tensor, Tensor | None, Any]:
    """Return (statistics [6, N], argmax [N] or None, state). Masked rows: log-sum-exp 0, the rest 0, argmax -1."""
    if call.impl == "triton":
        return _triton.forward(call, everything, argmax, keep)
    return _cpu.forward(call, everything, argmax, keep)


def _backward(
    call: LmHeadCall, coefficients: Tensor, state: Any, need: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d hidden, d weight, d bias from the row coefficients [6, N]."""
    needed = (need[0], need[1], need[2] and call.bias is not None)
    if call.impl == "triton":
        return _triton.backward(call, coefficients, state, needed)
    return _cpu.backward(call, coefficients, state, needed)


def _reference(call: LmHeadCall) -> dict[str, Tensor]:
    return head_statistics(*call[:5], *call.logit)


def _differentiable(
    call: LmHeadCall, need: Sequence[bool], grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients as a graph, by the reference."""

    def rows(*head: Any) -> list[Tensor]:
        found = _reference(LmHeadCall._make((*head, *call[3:])))
        return [found[name] for name in _statistics.FIELDS]

    return second.gradients(rows, call[:3], need, grads)


class LinearLogprob(torch.autograd.Function):
    """A ``LmHeadCall`` (its lm_head, and the rest as one), the statistics wanted, grad mode -> the five statistics [N]
    each, and the argmax hit."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor | None, ...]:
        *head, rest, wanted, grad_enabled = arguments
        call = LmHeadCall(*head, *rest)
        needs_gradient = grad_enabled and any(ctx.needs_input_grad[:3])
        everything = bool(wanted - {"lse", "argmax_hit"})
        sums, largest, state = forward(call, everything, "argmax_hit" in wanted, needs_gradient)
        statistics = _statistics.finish(sums, call.weight.shape[0])
        if needs_gradient:
            ctx.save_for_backward(*call[:4], statistics)
            ctx.state, ctx.rest = state, call[4:]
        hit = None if largest is None else _hit(call, largest)
        return _statistics.outputs(ctx, statistics, hit, wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, statistics = ctx.saved_tensors
        call, need = LmHeadCall(*inputs, *ctx.rest), ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            d = _differentiable(call, need, grads[:5])
        else:
            packed = _statistics.coefficients(statistics, list(grads[:5]), call.weight.shape[0])
            d = _backward(call, packed, ctx.state, need)
        return *d, None, None, None


def _hit(call: LmHeadCall, largest: Tensor) -> Tensor:
    """Where the label is the largest logit. -1, the argmax of a masked row, may be the ignore_index itself."""
    return (call.labels != call.ignore_index) & (largest == call.labels)


class CrossEntropy(torch.autograd.Function):
    """Scalar cross-entropy of an lm_head: ``LinearLogprob`` and what follows it, without autograd between them.

    A ``LmHeadCall`` (as above) and the options of ``cross_entropy`` -> the loss.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *head, rest, options = arguments
        call = LmHeadCall(*head, *rest)
        sums, _, state = forward(call, options["label_smoothing"] > 0, False)
        statistics = _statistics.finish(sums, call.weight.shape[0])
        ctx.save_for_backward(*call[:4], statistics)
        ctx.state, ctx.rest, ctx.options = state, call[4:], options
        rows = dict(zip(_statistics.FIELDS, statistics.unbind(0)))
        return cross_entropy(rows, call.labels, **options)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, statistics = ctx.saved_tensors
        call, options, need = LmHeadCall(*inputs, *ctx.rest), ctx.options, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():

            def loss(*head: Any) -> tuple[Tensor]:
                rows = _reference(LmHeadCall._make((*head, *call[3:])))
                return (cross_entropy(rows, call.labels, **options),)

            d = second.gradients(loss, call[:3], need, (grad_loss,))
            return *d, None, None
        # The scale from above meets the rows before any of their gradient is rounded.
        scale = (call.labels != call.ignore_index).to(statistics.dtype)
        if options["reduction"] == "mean":
            scale = scale / scale.sum()
        scale = scale * grad_loss
        # Derivatives of cross_entropy in its three statistics.
        smoothing = options["label_smoothing"]
        d_lse = d_mean = None
        if smoothing or options["z_loss"]:
            d_lse = (smoothing + 2 * options["z_loss"] * statistics[2]) * scale
        if smoothing:
            d_mean = -smoothing * scale
        grads = [-(1 - smoothing) * scale, None, d_lse, None, d_mean]
        packed = _statistics.coefficients(statistics, grads, call.weight.shape[0])
        return *_backward(call, packed, ctx.state, need), None, None


@torch.library.custom_op(
    "hotloop::linear_logprob", mutates_args=(), schema=f"({_HEAD}, {_NUMBERS}) -> (Tensor, Tensor)"
)
def _linear_logprob(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the statistics [5, N] and the argmax hits [N]."""
    call = LmHeadCall.of(*arguments)
    sums, largest, _ = forward(call, True, True, keep=False)
    assert largest is not None
    return _statistics.finish(sums, call.weight.shape[0]), _hit(call, largest)


@_linear_logprob.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _statistics.fake(hidden, weight.dtype)


@torch.library.custom_op(
    "hotloop::linear_logprob_backward",
    mutates_args=(),
    schema=f"({_HEAD}, Tensor coefficients, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
)
def _linear_logprob_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return d hidden, d weight, d bias (empty where there is no bias)."""
    call = LmHeadCall.of(*arguments[:4], *arguments[5:])
    d_hidden, d_weight, d_bias = _backward(call, arguments[4], None, (True,) * 3)
    assert d_hidden is not None and d_weight is not None
    return d_hidden, d_weight, call.weight.new_empty(0) if d_bias is None else d_bias


@_linear_logprob_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias)


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), d_bias


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], output[0])
    ctx.rest = inputs[4:]


def _registered_backward(ctx: Any, grad_statistics: Tensor, _grad_hit: Tensor) -> tuple[Any, ...]:
    *head, statistics = ctx.saved_tensors
    if torch.is_grad_enabled():
        call = LmHeadCall.of(*head, *ctx.rest)
        d = _differentiable(call, ctx.needs_input_grad[:3], grad_statistics.unbind(0))
        return *d, *([None] * 6)
    packed = _statistics.coefficients(statistics, list(grad_statistics.unbind(0)), head[1].shape[0])
    d_hidden, d_weight, d_bias = torch.ops.hotloop.linear_logprob_backward(*head, packed, *ctx.rest)
    return d_hidden, d_weight, None if head[2] is None else d_bias, *([None] * 6)


_linear_logprob.register_autograd(_registered_backward, setup_context=_setup)
