"""The implementations of the fused head behind one interface: statistics forward, coefficients backward."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..front.impl import everywhere, on_cpu
from . import _cpu
from ._cpu import LogitMap

# Looked up once, at import: Dynamo does not trace find_spec.
_TRITON = importlib.util.find_spec("triton") is not None
_TORCH = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
LEAST_TORCH_ON_CUDA = (2, 10)
"""The first release whose half-precision products add into a float32 result."""


def on_triton(like: Tensor) -> str | None:
    device = like.device.type
    if not _TRITON:
        return "triton is not installed"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"device {device}"
    if like.dtype == torch.float64:
        return "dtype float64 (supports float32, float16, bfloat16)"
    if device == "cuda" and _TORCH < LEAST_TORCH_ON_CUDA:
        return f"torch {torch.__version__} (needs 2.10 or later on CUDA)"
    return None


CANDIDATES = {"triton": on_triton, "cpu": on_cpu, "reference": everywhere}


def triton_kernels() -> ModuleType:
    return importlib.import_module("hotloop.kernels.logprob.linear_logprob")


def relative_to_maximum(statistics: Tensor) -> Tensor:
    """The kernels sum z e^(z - max); everything else works with the sum of (z - max) e^(z - max)."""
    maximum, sum_exp, sum_z_exp = statistics[0], statistics[1], statistics[2]
    statistics[2] = torch.where(sum_exp == 0, 0.0, sum_z_exp - maximum * sum_exp)
    return statistics


def forward(
    impl: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit: LogitMap,
    ignore_index: int,
    everything: bool,
    argmax: bool,
    first_column: int = 0,
    keep: bool = True,
) -> tuple[Tensor, Tensor | None, Any]:
    """Return (statistics [6, N], argmax [N] or None, state). Masked rows: log-sum-exp 0, the rest 0, argmax -1."""
    if impl == "cpu":
        workspace = None if keep else 0
        return _cpu.forward(
            hidden,
            weight,
            bias,
            labels,
            logit,
            ignore_index,
            everything,
            argmax,
            workspace,
            first_column,
        )
    wide_bias = None if bias is None else bias.float()
    statistics, largest = triton_kernels().forward(
        hidden, weight, wide_bias, labels,
        scale=logit.logit_scale, softcap=logit.softcap or 0.0, temperature=logit.temperature,
        all_statistics=everything, argmax=argmax, first_column=first_column, ignore_index=ignore_index,
    )  # fmt: skip
    statistics = relative_to_maximum(statistics)
    # The kernel writes the statistics of masked rows itself.
    if largest is not None:
        largest = torch.where(labels == ignore_index, -1, largest)
    return statistics, largest, None


def backward(
    impl: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit: LogitMap,
    ignore_index: int,
    coefficients: Tensor,
    state: Any,
    need: tuple[bool, bool, bool],
    first_column: int = 0,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if impl == "cpu":
        return _cpu.backward(
            hidden,
            weight,
            bias,
            labels,
            logit,
            ignore_index,
            coefficients,
            state,
            need,
            first_column,
        )
    d_hidden, d_weight, d_bias = triton_kernels().backward(
        hidden, weight, None if bias is None else bias.float(), labels, coefficients,
        scale=logit.logit_scale, softcap=logit.softcap or 0.0, temperature=logit.temperature,
        first_column=first_column, ignore_index=ignore_index,
        need_hidden=need[0], need_weight=need[1], need_bias=need[2],
    )  # fmt: skip
    return d_hidden, d_weight, d_bias if d_bias is None or bias is None else d_bias.to(bias.dtype)
