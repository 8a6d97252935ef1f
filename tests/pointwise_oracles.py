# SPDX-License-Identifier: Apache-2.0
"""What a paper's formula is, written once more in mpmath at 40 digits, and the formulas of all rooms.

A case brings the formula of one row along (``Case.formula``); what one row cannot say stands in
``tests/<room>/oracles.py``. ``tests/core/test_pointwise_oracles.py`` compares. Nothing here imports ``hotloop``: sign
conventions, factors and halves come from the papers' equations. docs/oracles.md lists the rivals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mpmath

mp = mpmath.mp.clone()
mp.dps = 40
mpf = mp.mpf

Numbers = dict[str, Any]


def softplus(x: Any) -> Any:
    return mp.log1p(mp.exp(x))


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def mean(values: Any) -> Any:
    values = list(values)
    return sum(values) / len(values)


@dataclass(frozen=True)
class Oracle:
    op: str
    grad: dict[str, Any]
    """Inputs with a gradient."""
    const: dict[str, Any]
    options: dict[str, Any]
    formula: Callable[[Numbers], Any]
    detached: tuple[str, ...] = ()
    """Names under which the formula also finds inputs that it must not differentiate."""
    id: str = ""
    room: str = ""
    """Filled in from the folder of the oracle."""
    extra: dict[str, Any] = field(default_factory=dict)
