# SPDX-License-Identifier: Apache-2.0
"""Checks of values in a compiled graph.

While Dynamo traces there are no values to check, so a label out of range or a mark of -1 would pass in silence. The
check (a look) becomes an operator of the graph, which gets the real tensor and raises the error of the eager call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LOOKS: dict[str, Callable[..., Any]] = {}


def look(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make ``f(op, name, value, *integers, *numbers)``, which raises or returns, the look of this kind."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LOOKS[kind] = function
        return function

    return register


def checked(
    kind: str,
    op: str,
    name: str,
    value: Tensor,
    integers: Sequence[int] = (),
    numbers: Sequence[float] = (),
) -> Tensor:
    """Return ``value``, looked at when the compiled graph runs. On a GPU it is trusted, as in an eager call."""
    if not value.is_cpu:
        return value
    found: Tensor = torch.ops.hotloop.checked(
        value.detach(), kind, op, name, list(integers), list(numbers)
    )
    return found


# A copy, since an operator may not return what it was given.
@torch.library.custom_op("hotloop::checked", mutates_args=())
def _checked(
    value: Tensor,
    kind: str,
    op: str,
    name: str,
    integers: list[int],
    numbers: list[float],
) -> Tensor:
    _LOOKS[kind](op, name, value, *integers, *numbers)
    return value.clone()


@_checked.register_fake
def _(value: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(value)
