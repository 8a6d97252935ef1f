# SPDX-License-Identifier: Apache-2.0
"""Autocast stays outside: an op computes in the dtype of what it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def in_the_dtype_given(call: Callable[P, R]) -> Callable[P, R]:
    """Keep autocast out: it would make some products (not those with ``out=``) narrower than the inputs."""

    @functools.wraps(call)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.is_autocast_enabled("cpu"):
            return call(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return call(*args, **kwargs)

    return wrapped


def autocast_off(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Inside, products on the device of ``x`` are computed in the dtype of what they are given."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):  # meta, say
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def as_linear_takes(*tensors: torch.Tensor | None) -> list[Any]:
    """The tensors in the dtype that autocast gives to the products of the first one's device; float64 stays.

    For layers of whole models, whose products are narrow where those of ``nn.Linear`` are.
    """
    first = next(x for x in tensors if x is not None)
    kind = first.device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]
