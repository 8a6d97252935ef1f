# SPDX-License-Identifier: Apache-2.0
"""Autocast stays outside: an op computes in the dtype of what it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

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
