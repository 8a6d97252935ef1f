"""The fused head for autograd: a direct route in eager mode, registered operators under torch.compile.

The direct route keeps logit tiles between forward and backward (see ``_cpu``), which a functional operator
cannot; under ``torch.compile`` backward computes the logits again: four products instead of three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.logprob import cross_entropy, head_statistics
from . import _backend, _second, _statistics
from ._cpu import LogitMap, accumulate_dtype


class LinearLogprob(torch.autograd.Function):
    """hidden, weight, bias -> the five statistics [N] each, and the argmax hit (bool [N] or None)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit: LogitMap,
        ignore_index: int,
        wanted: frozenset[str],
        impl: str,
        grad_enabled: bool,
    ) -> tuple[Tensor | None, ...]:
        needs_gradient = grad_enabled and any(ctx.needs_input_grad[:3])
        everything = bool(wanted - {"lse", "argmax_hit"})
        sums, largest, state = _backend.forward(
            impl, hidden, weight, bias, labels, logit, ignore_index, everything, "argmax_hit" in wanted,
            keep=needs_gradient,
        )  # fmt: skip
        statistics = _statistics.finish(sums, weight.shape[0])
        if needs_gradient:
            ctx.save_for_backward(hidden, weight, bias, labels, statistics)
            ctx.state, ctx.logit, ctx.ignore_index, ctx.impl = state, logit, ignore_index, impl
        ctx.set_materialize_grads(False)
        # -1, the argmax of a masked row, may be the ignore_index itself.
        hit = None if largest is None else (labels != ignore_index) & (largest == labels)
        if hit is not None:
            ctx.mark_non_differentiable(hit)
        rows = dict(zip(_statistics.FIELDS, statistics.unbind(0)))
        outputs = tuple(
            rows[name].clone() if name == "logps" or name in wanted else None
            for name in _statistics.FIELDS
        )
        return (*outputs, hit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, statistics = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            d = _second.gradients(
                lambda h, w, b: _reference(h, w, b, labels, ctx.logit, ctx.ignore_index),
                (hidden, weight, bias), need, grads[:5],
            )  # fmt: skip
            return (*d, None, None, None, None, None, None)
        packed = _statistics.coefficients(statistics, list(grads[:5]), weight.shape[0])
        d = _backend.backward(
            ctx.impl, hidden, weight, bias, labels, ctx.logit, ctx.ignore_index, packed, ctx.state,
            (need[0], need[1], need[2] and bias is not None),
        )  # fmt: skip
        return (*d, None, None, None, None, None, None)


def _reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit: LogitMap,
    ignore_index: int,
) -> tuple[Tensor, ...]:
    rows = head_statistics(
        hidden, weight, bias, labels, ignore_index, logit.temperature, logit.logit_scale, logit.softcap
    )  # fmt: skip
    return tuple(rows[name] for name in _statistics.FIELDS)


class CrossEntropy(torch.autograd.Function):
    """Scalar cross-entropy of a head: ``LinearLogprob`` and what follows it, without autograd between them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        logit: LogitMap,
        ignore_index: int,
        label_smoothing: float,
        z_loss: float,
        reduction: str,
        impl: str,
    ) -> Tensor:
        sums, _, state = _backend.forward(
            impl, hidden, weight, bias, labels, logit, ignore_index, label_smoothing > 0, False
        )
        statistics = _statistics.finish(sums, weight.shape[0])
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        options |= {"ignore_index": ignore_index, "reduction": reduction}
        ctx.save_for_backward(hidden, weight, bias, labels, statistics)
        ctx.state, ctx.logit, ctx.options, ctx.impl = state, logit, options, impl
        rows = dict(zip(_statistics.FIELDS, statistics.unbind(0)))
        return cross_entropy(rows, labels, **options)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, statistics = ctx.saved_tensors
        options, need = ctx.options, ctx.needs_input_grad[:3]
        ignore_index, smoothing = options["ignore_index"], options["label_smoothing"]
        if torch.is_grad_enabled():

            def loss(h: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor]:
                rows = _reference(h, w, b, labels, ctx.logit, ignore_index)
                return (cross_entropy(dict(zip(_statistics.FIELDS, rows)), labels, **options),)

            d = _second.gradients(loss, (hidden, weight, bias), need, (grad_loss,))
            return (*d, None, None, None, None, None, None, None)
        # The scale from above meets the rows before any of their gradient is rounded.
        scale = (labels != ignore_index).to(statistics.dtype)
        if options["reduction"] == "mean":
            scale = scale / scale.sum()
        scale = scale * grad_loss
        # Derivatives of cross_entropy in its three statistics.
        d_lse = d_mean = None
        if smoothing or options["z_loss"]:
            d_lse = (smoothing + 2 * options["z_loss"] * statistics[2]) * scale
        if smoothing:
            d_mean = -smoothing * scale
        grads = [-(1 - smoothing) * scale, None, d_lse, None, d_mean]
        d = _backend.backward(
            ctx.impl, hidden, weight, bias, labels, ctx.logit, ignore_index,
            _statistics.coefficients(statistics, grads, weight.shape[0]), ctx.state,
            (need[0], need[1], need[2] and bias is not None),
        )  # fmt: skip
        return (*d, None, None, None, None, None, None, None)


@torch.library.custom_op("hotloop::linear_logprob", mutates_args=())
def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return the statistics [5, N] and the argmax hits [N]."""
    logit = LogitMap(temperature, logit_scale, softcap or None)
    sums, largest, _ = _backend.forward(
        impl, hidden, weight, bias, labels, logit, ignore_index, True, True, keep=False
    )
    assert largest is not None
    # -1, the argmax of a masked row, may be the ignore_index itself.
    hit = (labels != ignore_index) & (largest == labels)
    return _statistics.finish(sums, weight.shape[0]), hit


@_linear_logprob.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    n = hidden.shape[0]
    return (
        hidden.new_empty((5, n), dtype=accumulate_dtype(weight.dtype)),
        hidden.new_empty((n,), dtype=torch.bool),
    )


@torch.library.custom_op("hotloop::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d hidden, d weight, d bias (empty where there is no bias)."""
    logit = LogitMap(temperature, logit_scale, softcap or None)
    d_hidden, d_weight, d_bias = _backend.backward(
        impl,
        hidden,
        weight,
        bias,
        labels,
        logit,
        ignore_index,
        coefficients,
        None,
        (True, True, bias is not None),
    )
    assert d_hidden is not None and d_weight is not None
    return d_hidden, d_weight, weight.new_empty(0) if d_bias is None else d_bias


@_linear_logprob_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    d_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape),
        d_bias,
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, labels, *rest = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, output[0])
    ctx.rest = rest


def _backward(ctx: Any, grad_statistics: Tensor, _grad_hit: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, labels, statistics = ctx.saved_tensors
    if torch.is_grad_enabled():
        ignore_index, temperature, logit_scale, softcap, _ = ctx.rest
        logit = LogitMap(temperature, logit_scale, softcap or None)
        d = _second.gradients(
            lambda h, w, b: _reference(h, w, b, labels, logit, ignore_index),
            (hidden, weight, bias), ctx.needs_input_grad[:3], grad_statistics.unbind(0),
        )  # fmt: skip
        return *d, None, None, None, None, None, None
    packed = _statistics.coefficients(statistics, list(grad_statistics.unbind(0)), weight.shape[0])
    d_hidden, d_weight, d_bias = torch.ops.hotloop.linear_logprob_backward(
        hidden, weight, bias, labels, packed, *ctx.rest
    )
    return d_hidden, d_weight, None if bias is None else d_bias, None, None, None, None, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup)
