# SPDX-License-Identifier: Apache-2.0
"""The same row statistics from logits that exist already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..front import second
from ..reference import logprob as reference
from . import _cpu, _statistics, _triton
from ._call import LogitsCall

_LOGITS = "Tensor logits, Tensor labels"
_NUMBERS = "SymInt ignore_index, float temperature, float logit_scale, float softcap, str impl"


def _forward(call: LogitsCall, everything: bool, argmax: bool) -> tuple[Tensor, Tensor | None]:
    """Statistics [5, N] and argmax hits [N]; masked rows give 0 and False."""
    loops = _triton if call.impl == "triton" else _cpu
    sums, largest = loops.logits_forward(call, everything, argmax)
    valid = call.labels != call.ignore_index
    statistics = torch.where(valid, _statistics.finish(sums, call.logits.shape[1]), 0.0)
    return statistics, None if largest is None else valid & (largest == call.labels)


def _backward(call: LogitsCall, coefficients: Tensor) -> Tensor:
    if call.impl == "triton":
        return _triton.logits_backward(call, coefficients)
    return _cpu.logits_backward(call, coefficients)


class TokenLogprob(torch.autograd.Function):
    """Logits, labels, the rest of a ``LogitsCall``, the statistics wanted -> the five statistics [N] each, and the
    argmax hit."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, rest: tuple[Any, ...], wanted: frozenset[str]
    ) -> tuple[Tensor | None, ...]:
        call = LogitsCall(logits.detach(), labels, *rest)
        everything = bool(wanted - {"lse", "argmax_hit"})
        statistics, hit = _forward(call, everything, "argmax_hit" in wanted)
        ctx.save_for_backward(logits, labels, statistics)
        ctx.rest = rest
        return _statistics.outputs(ctx, statistics, hit, wanted)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, statistics = ctx.saved_tensors
        call = LogitsCall(logits, labels, *ctx.rest)
        if torch.is_grad_enabled():
            return _differentiable(call, grads[:5]), None, None, None
        packed = _statistics.coefficients(statistics, list(grads[:5]), logits.shape[1])
        return _backward(call, packed), None, None, None


def _differentiable(call: LogitsCall, grads: Sequence[Tensor | None]) -> Tensor | None:
    """The gradient as a graph, by the reference."""

    def rows(z: Tensor) -> list[Tensor]:
        found = reference.logit_statistics(z, call.labels, call.ignore_index, *call.logit)
        return [found[name] for name in _statistics.FIELDS]

    return second.gradients(rows, (call.logits,), (True,), grads)[0]


@torch.library.custom_op(
    "hotloop::token_logprob", mutates_args=(), schema=f"({_LOGITS}, {_NUMBERS}) -> (Tensor, Tensor)"
)
def _token_logprob(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Return the statistics [5, N] and the argmax hits [N]."""
    statistics, hit = _forward(LogitsCall.of(logits.contiguous(), *rest), True, True)
    assert hit is not None
    return statistics, hit


@_token_logprob.register_fake
def _(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _statistics.fake(logits, logits.dtype)


@torch.library.custom_op(
    "hotloop::token_logprob_backward",
    mutates_args=(),
    schema=f"({_LOGITS}, Tensor coefficients, {_NUMBERS}) -> Tensor",
)
def _token_logprob_backward(
    logits: Tensor, labels: Tensor, coefficients: Tensor, *rest: Any
) -> Tensor:
    return _backward(LogitsCall.of(logits, labels, *rest), coefficients)


@_token_logprob_backward.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:2], output[0])
    ctx.rest = inputs[2:]


def _registered_backward(ctx: Any, grad_statistics: Tensor, _grad_hit: Tensor) -> tuple[Any, ...]:
    logits, labels, statistics = ctx.saved_tensors
    if torch.is_grad_enabled():
        call = LogitsCall.of(logits, labels, *ctx.rest)
        return _differentiable(call, grad_statistics.unbind(0)), *([None] * 6)
    packed = _statistics.coefficients(statistics, list(grad_statistics.unbind(0)), logits.shape[1])
    gradient = torch.ops.hotloop.token_logprob_backward(logits, labels, packed, *ctx.rest)
    return gradient, *([None] * 6)


_token_logprob.register_autograd(_registered_backward, setup_context=_setup)
