# SPDX-License-Identifier: Apache-2.0
"""What a case of the pointwise loop is, and the cases of all rooms: one per loss and variant.

A room writes its cases in ``tests/<room>/cases.py``; the tests of the loop (``tests/core/test_pointwise_*.py``) run
over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hotloop
import hotloop.reference
import torch
from rooms import of_rooms
from torch import Tensor

Maker = Callable[[int, torch.Generator], Tensor]


def logps(n: int, g: torch.Generator) -> Tensor:
    """Summed log-probabilities of answers of a few dozen tokens."""
    return -60.0 + 12.0 * torch.randn(n, generator=g, dtype=torch.float64)


def near(n: int, g: torch.Generator) -> Tensor:
    """Log-probabilities close enough to each other for the exponentials of some divergences."""
    return -20.0 + 1.5 * torch.randn(n, generator=g, dtype=torch.float64)


def ratios(n: int, g: torch.Generator) -> Tensor:
    return 6.0 * torch.randn(n, generator=g, dtype=torch.float64)


def mean_logps(n: int, g: torch.Generator) -> Tensor:
    return -0.05 - 3.0 * torch.rand(n, generator=g, dtype=torch.float64)


def nll(n: int, g: torch.Generator) -> Tensor:
    return 0.2 + torch.rand(n, generator=g, dtype=torch.float64)


def probability(n: int, g: torch.Generator) -> Tensor:
    return torch.rand(n, generator=g, dtype=torch.float64)


def smoothing(n: int, g: torch.Generator) -> Tensor:
    return 0.4 * torch.rand(n, generator=g, dtype=torch.float64)


def gap(n: int, g: torch.Generator) -> Tensor:
    return 2.0 * torch.rand(n, generator=g, dtype=torch.float64) - 1.0


def counts(n: int, g: torch.Generator) -> Tensor:
    return torch.randint(1, 400, (n,), generator=g)


def mark(n: int, g: torch.Generator) -> Tensor:
    return torch.rand(n, generator=g) < 0.6


def per(steps: int, make: Maker, scale: float = 1.0) -> Maker:
    return lambda n, g: scale * make(n * steps, g).reshape(n, steps)


def times(k: int, make: Maker) -> Maker:
    return lambda n, g: make(n * k, g)


def fixed(m: int, make: Maker) -> Maker:
    return lambda n, g: make(m, g)


@dataclass(frozen=True)
class Case:
    id: str
    """The loss without ``_loss``; of further cases of it, a hyphen and what tells them apart."""
    grad: dict[str, Maker]
    const: dict[str, Maker] = field(default_factory=dict)
    kwargs: dict[str, Any] = field(default_factory=dict)
    rowwise: bool = True
    """reduction="none" gives n values, each of its own row only."""
    only_mean: bool = False
    derivative: bool = True
    """The gradient is the derivative of the value (not so where a weight is detached)."""

    formula: Callable[..., Any] | None = None
    """The paper's loss of one row in mpmath, of the inputs and kwargs by name: an oracle (pointwise_oracles.py)."""

    room: str = ""
    """Filled in from the folder of the case."""

    @property
    def op(self) -> str:
        return self.id.partition("-")[0] + "_loss"

    @property
    def fn(self) -> Callable[..., Tensor]:
        return getattr(getattr(hotloop, self.room), self.op)

    @property
    def reference(self) -> Callable[..., Tensor]:
        return getattr(getattr(hotloop.reference, self.room), self.op)

    def inputs(
        self, n: int, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        g = torch.Generator().manual_seed(seed)
        grad = {name: make(n, g).to(dtype) for name, make in self.grad.items()}
        const = {name: make(n, g) for name, make in self.const.items()}
        return grad, {k: v.to(dtype) if v.is_floating_point() else v for k, v in const.items()}

    @property
    def reduction(self) -> str:
        return "mean" if self.only_mean else "none"


def __getattr__(name: str) -> Any:
    """CASES and BY_ID, collected when first asked for: the rooms' files import this one."""
    if name in ("CASES", "BY_ID"):
        globals()["CASES"] = cases = of_rooms("cases", "POINTWISE")
        globals()["BY_ID"] = {case.id: case for case in cases}
        assert len(globals()["BY_ID"]) == len(cases)
        return globals()[name]
    raise AttributeError(name)
