# SPDX-License-Identifier: Apache-2.0
"""hotloop itself: one contender per implementation of the device."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._case import Contender, Inputs, Missing

Function = Callable[..., Any]


def contenders(
    module: str, name: str, impls: Sequence[str], forward: Callable[[Function, Inputs], Tensor]
) -> list[Contender | Missing]:
    """``forward(function, inputs)``, the function of ``module`` bound to each implementation."""
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        return [
            Missing(f"hotloop {impl}", f"{module}.{name} is not there: {error}") for impl in impls
        ]
    takes_impl = "impl" in inspect.signature(function).parameters

    def build(impl: str) -> Contender:
        def bound(*args: Any, **kwargs: Any) -> Any:
            if takes_impl:
                kwargs["impl"] = impl
            return function(*args, **kwargs)

        return Contender(f"hotloop {impl}", "ours", lambda inputs: forward(bound, inputs))

    return [build(impl) for impl in impls]


def in_small_pages(forward: Callable[[Inputs], Tensor]) -> Contender:
    """The whole step without the advice for huge pages, whose faults may wait for compaction (docs/perf-notes.md)."""
    from hotloop.front import buffers

    def run(inputs: Inputs) -> list[Tensor]:
        given, buffers.advised = buffers.advised, lambda tensor: tensor
        try:
            with torch.enable_grad():
                return list(torch.autograd.grad(forward(inputs), inputs.leaves(), inputs.upstream))
        finally:
            buffers.advised = given

    return Contender("hotloop, small pages", "floor", run)


def head_impls(device: str) -> tuple[str, ...]:
    return ("triton",) if device == "cuda" else ("cpu",)


def loop_impls(device: str) -> tuple[str, ...]:
    return ("cuda",) if device == "cuda" else ("cpu",)
