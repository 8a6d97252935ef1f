"""The same row statistics from logits that exist already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..front import native
from ..reference import logprob as reference
from . import _second, _statistics
from ._backend import relative_to_maximum, triton_kernels
from ._cpu import LogitMap, accumulate_dtype, new_statistics


def forward(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    logit: LogitMap,
    ignore_index: int,
    everything: bool,
    argmax: bool,
) -> tuple[Tensor, Tensor | None]:
    """Statistics [5, N] and argmax hits [N]; masked rows give 0 and False."""
    vocabulary = logits.shape[1]
    if impl == "triton":
        sums, largest = triton_kernels().logits_statistics(
            logits, labels, scale=logit.logit_scale, softcap=logit.softcap or 0.0,
            temperature=logit.temperature, all_statistics=everything, argmax=argmax, ignore_index=ignore_index,
        )  # fmt: skip
        sums = relative_to_maximum(sums)
    else:
        sums = new_statistics(logits.shape[0], accumulate_dtype(logits.dtype))
        largest = torch.zeros(logits.shape[0], dtype=torch.int64, device="cpu") if argmax else None
        native.core.logprob.row_statistics(
            logits, None, labels, 0, logit.native(), everything, sums,
            largest,
        )  # fmt: skip
    valid = labels != ignore_index
    statistics = torch.where(valid, _statistics.finish(sums, vocabulary), 0.0)
    return statistics, None if largest is None else valid & (largest == labels)


def backward(
    impl: str,
    logits: Tensor,
    labels: Tensor,
    logit: LogitMap,
    ignore_index: int,
    coefficients: Tensor,
) -> Tensor:
    if impl == "triton":
        gradient: Tensor = triton_kernels().logits_gradient(
            logits, labels, coefficients, scale=logit.logit_scale, softcap=logit.softcap or 0.0,
            temperature=logit.temperature, ignore_index=ignore_index,
        )  # fmt: skip
        return gradient
    else:
        gradient = logits.detach().clone(memory_format=torch.contiguous_format)
        native.core.logprob.row_gradient(
            gradient,
            None,
            labels,
            0,
            logit.native(),
            coefficients.contiguous(),
        )
    return gradient.masked_fill_((labels == ignore_index).unsqueeze(1), 0.0)


class TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        logit: LogitMap,
        ignore_index: int,
        wanted: frozenset[str],
        impl: str,
    ) -> tuple[Tensor | None, ...]:
        everything = bool(wanted - {"lse", "argmax_hit"})
        statistics, hit = forward(
            impl, logits.detach(), labels, logit, ignore_index, everything, "argmax_hit" in wanted
        )
        ctx.save_for_backward(logits, labels, statistics)
        ctx.logit, ctx.ignore_index, ctx.impl = logit, ignore_index, impl
        ctx.set_materialize_grads(False)
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
        logits, labels, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            d = differentiable(logits, labels, ctx.logit, ctx.ignore_index, grads[:5])
            return d, None, None, None, None, None
        packed = _statistics.coefficients(statistics, list(grads[:5]), logits.shape[1])
        gradient = backward(ctx.impl, logits, labels, ctx.logit, ctx.ignore_index, packed)
        return gradient, None, None, None, None, None


def differentiable(
    logits: Tensor,
    labels: Tensor,
    logit: LogitMap,
    ignore_index: int,
    grads: Sequence[Tensor | None],
) -> Tensor | None:
    """The gradient as a graph, by the reference."""

    def rows(z: Tensor) -> list[Tensor]:
        found = reference.logit_statistics(
            z, labels, ignore_index, logit.temperature, logit.logit_scale, logit.softcap
        )
        return [found[name] for name in _statistics.FIELDS]

    return _second.gradients(rows, (logits,), (True,), grads)[0]


@torch.library.custom_op("hotloop::token_logprob", mutates_args=())
def _token_logprob(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Return the statistics [5, N] and the argmax hits [N]."""
    logit = LogitMap(temperature, logit_scale, softcap or None)
    statistics, hit = forward(impl, logits.contiguous(), labels, logit, ignore_index, True, True)
    assert hit is not None
    return statistics, hit


@_token_logprob.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    n = logits.shape[0]
    return (
        logits.new_empty((5, n), dtype=accumulate_dtype(logits.dtype)),
        logits.new_empty((n,), dtype=torch.bool),
    )


@torch.library.custom_op("hotloop::token_logprob_backward", mutates_args=())
def _token_logprob_backward(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    impl: str,
) -> Tensor:
    logit = LogitMap(temperature, logit_scale, softcap or None)
    return backward(impl, logits, labels, logit, ignore_index, coefficients)


@_token_logprob_backward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    coefficients: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    impl: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, labels, *rest = inputs
    ctx.save_for_backward(logits, labels, output[0])
    ctx.rest = rest


def _backward(ctx: Any, grad_statistics: Tensor, _grad_hit: Tensor) -> tuple[Any, ...]:
    logits, labels, statistics = ctx.saved_tensors
    if torch.is_grad_enabled():
        ignore_index, temperature, logit_scale, softcap, _ = ctx.rest
        logit = LogitMap(temperature, logit_scale, softcap or None)
        d = differentiable(logits, labels, logit, ignore_index, grad_statistics.unbind(0))
        return d, None, None, None, None, None, None
    packed = _statistics.coefficients(statistics, list(grad_statistics.unbind(0)), logits.shape[1])
    gradient = torch.ops.hotloop.token_logprob_backward(logits, labels, packed, *ctx.rest)
    return gradient, None, None, None, None, None, None


_token_logprob.register_autograd(_backward, setup_context=_setup)
