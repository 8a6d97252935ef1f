# SPDX-License-Identifier: Apache-2.0
"""What the error memory and its sketch share: checks, conversions, the choice of an implementation, results."""

from __future__ import annotations

import math
from typing import Any

from ...front import arrays as _arrays
from ...front import check
from ...front.check import number

NUMBERS = (*_arrays.FLOATS, *_arrays.INTEGERS, "uint8", "bool")
"""What labels and predictions may be."""


def readout(op: str, temperature: Any, gamma: Any, lam: Any) -> dict[str, float]:
    """temperature, gamma and lam, each in its range, in the order of the compiled loops."""
    return {
        "temperature": number(op, "temperature", temperature, above=0, at_most=math.inf),
        "gamma": number(op, "gamma", gamma, at_least=0, at_most=1),
        "lam": number(op, "lam", lam, at_least=0, at_most=1),
    }


def column(op: str, name: str, value: Any, count: int, like_name: str, like: Any) -> Any:
    """Refuse what is not one number per row of ``like``."""
    check.array(op, name, value, NUMBERS, 1)
    check.same_place(op, name, value, like_name, like)
    why, hint = f"like the rows of {like_name}", "Pass one number per row."
    check.shape(op, name, value, (count,), why, hint)
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
