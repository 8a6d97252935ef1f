# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

def are_marks(rows: Any) -> bool: ...
def heads() -> dict[str, Any]: ...
def run(
    head: int,
    n: int,
    inputs: list[Any],
    params: Sequence[float],
    loss: Any,
    grads: list[Any],
    grad_scale: float,
    total: bool,
    double_precision: bool,
    weight: Any = None,
    groups: Any = None,
    outs: bool = False,
) -> Any: ...
def within(rows: Any, high: float, open: bool) -> bool: ...
