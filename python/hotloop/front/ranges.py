# SPDX-License-Identifier: Apache-2.0
"""Ranges of arguments: a range checks a value, and lists values outside itself, so that its errors are tested.

A range is called with (op, argument, value) and returns the value in the form that the loops take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import check


@dataclass(frozen=True)
class Number:
    """A finite number between bounds."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    hint: str = ""

    def __call__(self, op: str, name: str, value: Any) -> float:
        return check.number(
            op,
            name,
            value,
            above=self.above,
            at_least=self.at_least,
            below=self.below,
            at_most=self.at_most,
            hint=self.hint,
        )

    def wrong(self) -> Iterator[tuple[Any, type[Exception]]]:
        """Values that must be refused, with the error."""
        yield math.nan, ValueError
        yield math.inf, ValueError
        yield "1", TypeError
        yield True, TypeError
        for bound, open_, outwards in (
            (self.above, True, -1.0),
            (self.at_least, False, -1.0),
            (self.below, True, 1.0),
            (self.at_most, False, 1.0),
        ):
            if bound is not None:
                yield bound + outwards, ValueError
                yield (bound if open_ else math.nextafter(bound, outwards * math.inf)), ValueError


def above(bound: float, *, at_most: float | None = None, below: float | None = None) -> Number:
    return Number(above=bound, at_most=at_most, below=below)


def at_least(bound: float, *, at_most: float | None = None, below: float | None = None) -> Number:
    return Number(at_least=bound, at_most=at_most, below=below)


number = Number()
