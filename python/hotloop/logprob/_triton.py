# SPDX-License-Identifier: Apache-2.0
"""The fused lm_head on the GPU: the Triton kernels behind the interface of ``_cpu``."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from ..front import impl as _impl
from ._call import LmHeadCall, LogitMap, LogitsCall

_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
LEAST_TORCH_ON_CUDA = (2, 10)
"""The first release whose half-precision products add into a float32 result."""


def refuses(like: Tensor) -> str | None:
    """Why the kernels cannot run for these inputs."""
    reason = _impl.on_triton(like)
    if reason is not None:
        return reason
    if like.device.type == "cuda" and _TORCH < LEAST_TORCH_ON_CUDA:
        return f"torch {torch.__version__} (needs 2.10 or later on CUDA)"
    return None


def kernels() -> ModuleType:
    return importlib.import_module("hotloop.kernels.logprob.linear_logprob")


def _transform(logit: LogitMap) -> dict[str, float]:
    scale, softcap, temperature = logit.native()
    return {"scale": scale, "softcap": softcap, "temperature": temperature}


def _relative_to_maximum(statistics: Tensor) -> Tensor:
    """The kernels sum z e^(z - max); everything else works with the sum of (z - max) e^(z - max)."""
    maximum, sum_exp, sum_z_exp = statistics[0], statistics[1], statistics[2]
    statistics[2] = torch.where(sum_exp == 0, 0.0, sum_z_exp - maximum * sum_exp)
    return statistics


def forward(
    call: LmHeadCall, everything: bool, argmax: bool, keep: bool = True
) -> tuple[Tensor, Tensor | None, None]:
    """As ``_cpu.forward``; nothing is kept."""
    statistics, largest = kernels().forward(
        call.hidden, call.weight, None if call.bias is None else call.bias.float(), call.labels,
        **_transform(call.logit), all_statistics=everything, argmax=argmax, first_column=call.first_column,
        ignore_index=call.ignore_index,
    )  # fmt: skip
    # The kernel writes the statistics of masked rows itself.
    if largest is not None:
        largest = torch.where(call.labels == call.ignore_index, -1, largest)
    return _relative_to_maximum(statistics), largest, None


def backward(
    call: LmHeadCall, coefficients: Tensor, state: None, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d_hidden, d_weight, d_bias = kernels().backward(
        call.hidden, call.weight, None if call.bias is None else call.bias.float(), call.labels, coefficients,
        **_transform(call.logit), first_column=call.first_column, ignore_index=call.ignore_index,
        need_hidden=need[0], need_weight=need[1], need_bias=need[2],
    )  # fmt: skip
    return (
        d_hidden,
        d_weight,
        d_bias if d_bias is None or call.bias is None else d_bias.to(call.bias.dtype),
    )


def logits_forward(
    call: LogitsCall, everything: bool, argmax: bool
) -> tuple[Tensor, Tensor | None]:
    sums, largest = kernels().logits_statistics(
        call.logits, call.labels, **_transform(call.logit), all_statistics=everything, argmax=argmax,
        ignore_index=call.ignore_index,
    )  # fmt: skip
    return _relative_to_maximum(sums), largest


def logits_backward(call: LogitsCall, coefficients: Tensor) -> Tensor:
    gradient: Tensor = kernels().logits_gradient(
        call.logits,
        call.labels,
        coefficients,
        **_transform(call.logit),
        ignore_index=call.ignore_index,
    )
    return gradient
