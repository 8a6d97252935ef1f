"""What the error memory and its sketch share: checks, conversions, the choice of an implementation, results."""

from __future__ import annotations

import math
from typing import Any

from ...front import arrays as _arrays
from ...front import check
from ...front.check import number
from ...reference.table.error_memory import numpy_of as numpy_of
from ...reference.table.error_memory import real as real
from ...reference.table.results import Compensated as Compensated
from ...reference.table.results import SketchCompensated as SketchCompensated

NUMBERS = (*_arrays.FLOATS, *_arrays.INTEGERS, "uint8", "bool")
"""What labels and predictions may be."""


def readout(op: str, temperature: Any, gamma: Any, lam: Any) -> tuple[float, float, float]:
    """(temperature, gamma, lam), each in its range."""
    return (
        number(op, "temperature", temperature, above=0, at_most=math.inf),
        number(op, "gamma", gamma, at_least=0, at_most=1),
        number(op, "lam", lam, at_least=0, at_most=1),
    )


def column(op: str, name: str, value: Any, count: int, like_name: str, like: Any) -> Any:
    """Refuse what is not one number per row of ``like``."""
    check.array(op, name, value, NUMBERS, 1)
    check.same_place(op, name, value, like_name, like)
    if tuple(value.shape) != (count,):
        raise ValueError(
            f"[{op}] {name}: expected shape ({count},) like the rows of {like_name}, got {tuple(value.shape)}. "
            "Pass one number per row."
        )
    return value


def rows(op: str, name: str, value: Any, dim: int, like_name: str, like: Any) -> Any:
    """Refuse what are not float rows of ``dim`` numbers."""
    check.array(op, name, value, _arrays.FLOATS, 2)
    check.same_place(op, name, value, like_name, like)
    if int(value.shape[1]) != dim:
        raise ValueError(
            f"[{op}] {name}: expected shape (n, {dim}) like {like_name}, got {tuple(value.shape)}. "
            "Pass hidden vectors of one model."
        )
    return value


def detached(value: Any) -> Any:
    return value.detach() if hasattr(value, "detach") else value
