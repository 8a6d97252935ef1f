"""First values of a row, as a function of (seed, key): the same on any machine, in any order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..front.check import integer, number


@dataclass(frozen=True)
class Constant:
    """Every element is ``value``."""

    value: float = 0.0

    def __post_init__(self) -> None:
        _finite("Constant", self, "value")

    def _numbers(self) -> tuple[str, float, float, int]:
        return "constant", self.value, 0.0, 0


@dataclass(frozen=True)
class Uniform:
    """Element j is low + (high - low) u, u in (0, 1] from word j mod 4 of Philox(seed, offset j // 4, item key)."""

    low: float = -0.05
    high: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        _finite("Uniform", self, "low", "high")
        number("Uniform", "high", self.high, at_least=self.low)
        integer("Uniform", "seed", self.seed, at_least=0, at_most=2**64 - 1)

    def _numbers(self) -> tuple[str, float, float, int]:
        return "uniform", self.low, self.high, self.seed


@dataclass(frozen=True)
class Normal:
    """Elements are mean + std z, z by Box and Muller from the same words as ``Uniform``."""

    mean: float = 0.0
    std: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        _finite("Normal", self, "mean", "std")
        number("Normal", "std", self.std, at_least=0)
        integer("Normal", "seed", self.seed, at_least=0, at_most=2**64 - 1)

    def _numbers(self) -> tuple[str, float, float, int]:
        return "normal", self.mean, self.std, self.seed


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


def _finite(op: str, made: object, *names: str) -> None:
    for name in names:
        value = number(op, name, getattr(made, name))
        object.__setattr__(made, name, value)
