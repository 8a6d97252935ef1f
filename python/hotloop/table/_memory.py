"""What the error memory and its sketch share: checks, conversions, the choice of an implementation, results."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..front import arrays as _arrays
from ..front import environment
from ..front import impl as _impl
from ..front.check import number
from ..front.impl import Impl
from ..reference.table._shared import Compensated as Compensated
from ..reference.table._shared import SketchCompensated as SketchCompensated
from ..reference.table._shared import numpy_of as numpy_of
from ..reference.table._shared import real as real

NUMBERS = (*_arrays.FLOATS, *_arrays.INTEGERS, "uint8", "bool")
"""What labels and predictions may be."""


def choose(op: str, impl: Impl, like: Any) -> str:
    """Pick the implementation for arrays on the device of ``like``."""
    device = _arrays.device(like)
    refused = None if device == "cpu" else f"device {device}"
    chosen = _impl.choose(
        op,
        impl,
        {"cpu": lambda: refused, "reference": lambda: refused},
        lambda: f"{tuple(like.shape)} {_arrays.dtype(like)} on {device}",
    )
    environment.log_call(op, impl=chosen, shape=tuple(like.shape), device=device)
    return chosen


def readout(op: str, temperature: Any, gamma: Any, lam: Any) -> tuple[float, float, float]:
    """(temperature, gamma, lam), each in its range."""
    return (
        number(op, "temperature", temperature, above=0, at_most=math.inf),
        number(op, "gamma", gamma, at_least=0, at_most=1),
        number(op, "lam", lam, at_least=0, at_most=1),
    )


def column(op: str, name: str, value: Any, count: int, like_name: str, like: Any) -> Any:
    """Refuse what is not one number per row of ``like``."""
    _arrays.checked(op, name, value, NUMBERS, 1)
    _arrays.same_place(op, name, value, like_name, like)
    if tuple(value.shape) != (count,):
        raise ValueError(
            f"[{op}] {name}: expected shape ({count},) like the rows of {like_name}, got {tuple(value.shape)}. "
            "Pass one number per row."
        )
    return value


def rows(op: str, name: str, value: Any, dim: int, like_name: str, like: Any) -> Any:
    """Refuse what are not float rows of ``dim`` numbers."""
    _arrays.checked(op, name, value, _arrays.FLOATS, 2)
    _arrays.same_place(op, name, value, like_name, like)
    if int(value.shape[1]) != dim:
        raise ValueError(
            f"[{op}] {name}: expected shape (n, {dim}) like {like_name}, got {tuple(value.shape)}. "
            "Pass hidden vectors of one model."
        )
    return value


def finite(op: str, **arrays: Any) -> None:
    """With HOTLOOP_CHECK=1, refuse NaN and infinity."""
    if not environment.checks_on():
        return
    for name, x in arrays.items():
        bad = ~np.isfinite(_arrays.to_numpy(x))
        refuse(op, name, x, bad, "finite values", "Unset HOTLOOP_CHECK to let it pass.")


def refuse(op: str, name: str, x: Any, bad: np.ndarray, wanted: str, hint: str) -> None:
    """Raise for the first element that is ``bad``, with its value and place."""
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        got = _arrays.to_numpy(x)[at]
        raise ValueError(f"[{op}] {name}: expected {wanted}, got {got:g} at {list(at)}. {hint}")


def detached(value: Any) -> Any:
    return value.detach() if hasattr(value, "detach") else value


def dense(value: Any, dtype: str) -> Any:
    """The array contiguous and of ``dtype``, copied only if it is not."""
    if isinstance(value, np.ndarray):
        return np.ascontiguousarray(value, dtype)
    value = detached(value)
    if hasattr(value, "to"):
        import torch

        return value.to(getattr(torch, dtype)).contiguous()
    return value.astype(dtype)
