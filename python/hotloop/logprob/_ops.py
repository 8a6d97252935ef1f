"""The fused head for autograd: a direct route in eager mode, registered operators under torch.compile.

The direct route keeps logit tiles between forward and backward (see ``_cpu``), which a functional operator
cannot; under ``torch.compile`` backward computes the logits again: four products instead of three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _environment
from ..reference.logprob import cross_entropy
from . import _backend, _statistics
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
        hit = None if largest is None else largest == labels
        if hit is not None:
            ctx.mark_non_differentiable(hit)
        rows = dict(zip(_statistics.FIELDS, statistics.unbind(0)))
        outputs = tuple(
            rows[name].clone() if name == "logps" or name in wanted else None
            for name in _statistics.FIELDS
        )
        return (*outputs, hit)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, statistics = ctx.saved_tensors
        packed = _statistics.coefficients(statistics, list(grads[:5]), weight.shape[0])
        need = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            ctx.needs_input_grad[2] and bias is not None,
        )
        d = _backend.backward(
            ctx.impl,
            hidden,
            weight,
            bias,
            labels,
            ctx.logit,
            ctx.ignore_index,
            packed,
            ctx.state,
            need,
        )
        return (*d, None, None, None, None, None, None)


def fits_workspace(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> bool:
    """Whether the logits of the valid rows fit the workspace all at once."""
    width = 4 if weight.dtype == torch.float16 else weight.dtype.itemsize
    valid = int((labels != ignore_index).sum())
    return valid * weight.shape[0] * width <= _environment.workspace_bytes()


class OnePassCrossEntropy(torch.autograd.Function):
    """Scalar cross-entropy on the CPU whose forward computes the gradient; backward only scales it."""

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
    ) -> Tensor:
        sums, _, state = _backend.forward(
            "cpu", hidden, weight, bias, labels, logit, ignore_index, label_smoothing > 0, False
        )
        statistics = _statistics.finish(sums, weight.shape[0])
        rows = dict(zip(_statistics.FIELDS, statistics.unbind(0)))
        options = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        loss = cross_entropy(
            rows, labels, ignore_index=ignore_index, reduction=reduction, **options
        )
        valid = labels != ignore_index
        scale = valid.to(statistics.dtype)
        if reduction == "mean":
            scale = scale / scale.sum()
        # Derivatives of cross_entropy in its three statistics.
        grads: list[Tensor | None] = [
            -(1 - label_smoothing) * scale,
            None,
            (label_smoothing + 2 * z_loss * rows["lse"]) * scale
            if label_smoothing or z_loss
            else None,
            None,
            -label_smoothing * scale if label_smoothing else None,
        ]
        packed = _statistics.coefficients(statistics, grads, weight.shape[0])
        need = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1],
            ctx.needs_input_grad[2] and bias is not None,
        )
        gradients = _backend.backward(
            "cpu", hidden, weight, bias, labels, logit, ignore_index, packed, state, need
        )
        # Saved, not kept on ctx: autograd lets go of them before the gradients are accumulated.
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if grad_loss.item() == 1.0:
            scaled = ctx.saved_tensors
        else:
            scaled = [None if g is None else (g * grad_loss).to(g.dtype) for g in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None, None)


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
    return _statistics.finish(sums, weight.shape[0]), largest == labels


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
    packed = _statistics.coefficients(statistics, list(grad_statistics.unbind(0)), weight.shape[0])
    d_hidden, d_weight, d_bias = torch.ops.hotloop.linear_logprob_backward(
        hidden, weight, bias, labels, packed, *ctx.rest
    )
    return d_hidden, d_weight, None if bias is None else d_bias, None, None, None, None, None, None


_linear_logprob.register_autograd(_backward, setup_context=_setup)
