# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

def heads() -> dict[str, Any]: ...
def run(
    head: int,
    n: int,
    inputs: list[Any],
    params: Sequence[float],
    loss: Any,
    grads: list[Any],
    grad_scale: float,
    total: Any,
    partials: Any,
    double_precision: bool,
    device: int,
    stream: int,
    weight: Any = None,
    groups: Any = None,
    outs: Any = None,
    counted: Any = None,
) -> int: ...

MAX_OUTS: int = 8
PARTIALS: int = 1024
