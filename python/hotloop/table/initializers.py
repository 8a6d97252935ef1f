# SPDX-License-Identifier: Apache-2.0
"""First values of a row, as a function of (seed, key): the same on any machine, in any order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..front.check import integer, number


class _Initializer:
    """Fields are one or two numbers, then the seed of the draws, where there are some."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for name, value in vars(self).items():
            if name == "seed":
                integer(kind, name, value, at_least=0, at_most=2**64 - 1)
            else:
                object.__setattr__(self, name, number(kind, name, value))

    def _numbers(self) -> tuple[str, float, float, int]:
        first, second, seed = (*vars(self).values(), 0.0, 0)[:3]
        return type(self).__name__.lower(), first, second, seed


@dataclass(frozen=True)
class Constant(_Initializer):
    """Every element is ``value``."""

    value: float = 0.0


@dataclass(frozen=True)
class Uniform(_Initializer):
    """Element j is low + (high - low) u, u in (0, 1] from word j mod 4 of Philox(seed, offset j // 4, item key)."""

    low: float = -0.05
    high: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("Uniform", "high", self.high, at_least=self.low)


@dataclass(frozen=True)
class Normal(_Initializer):
    """Elements are mean + std z, z by Box and Muller from the same words as ``Uniform``."""

    mean: float = 0.0
    std: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("Normal", "std", self.std, at_least=0)


Initializer = Constant | Uniform | Normal

_LARGEST_NORMAL = 7.0
"""No draw is further from the mean, in standard deviations: the radius is at most sqrt(2 log 2^33) = 6.8."""
_LIMITS = {
    "float32": float(np.finfo(np.float32).max),
    "float16": 65504.0,
    "bfloat16": (2 - 2**-7) * 2.0**127,
    "int8": float(np.finfo(np.float32).max),
}


def check_range(op: str, initializer: Initializer, dtype: str) -> None:
    """Refuse first values that ``dtype`` cannot hold: a range is wider than its ends in float32."""
    _, first, second, _ = initializer._numbers()
    if isinstance(initializer, Uniform):
        most = max(abs(first), abs(second), second - first)
    else:
        most = abs(first) + _LARGEST_NORMAL * second
    if most > _LIMITS[dtype]:
        raise ValueError(
            f"[{op}] initializer: expected first values that {dtype} holds, up to {_LIMITS[dtype]:g} in size, got "
            f"{initializer!r}. Make its range smaller."
        )
