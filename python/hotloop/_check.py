"""Argument checks of the front doors, and the one form of their errors.

``[op] argument: expected ..., got .... What to do.``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _plain
from ._numbers import choice as choice
from ._numbers import number as number

REDUCTIONS = ("none", "mean", "sum")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def floats() -> str:
    return ", ".join(dtype_name(d) for d in FLOAT_DTYPES)


def tensor(op: str, name: str, value: Any) -> Tensor:
    """Refuse what is no tensor, and a tensor whose elements do not lie in memory (see ``_plain``)."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"[{op}] {name}: expected a torch.Tensor, got {type(value).__name__}. Use torch.as_tensor(...)."
        )
    if type(value) is not Tensor or value.layout is not torch.strided or value.is_nested:
        _plain.check(op, name, value)
    return value


def float_tensor(op: str, name: str, value: Any, ndim: int | None = None) -> torch.Tensor:
    t = tensor(op, name, value)
    if t.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"[{op}] {name}: expected dtype {floats()}, got {dtype_name(t.dtype)}. Convert it with .float()."
        )
    if ndim is not None and t.ndim != ndim:
        raise ValueError(
            f"[{op}] {name}: expected {ndim} dimension(s), got shape {tuple(t.shape)}."
        )
    return t


def same_device(op: str, name: str, value: torch.Tensor, like: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"[{op}] {name}: expected device {other.device} like {like}, got {value.device}. Move it first."
        )


def finite(op: str, name: str, value: torch.Tensor) -> None:
    """Raise if ``value`` holds NaN or infinity. Called only where HOTLOOP_CHECK=1: it reads every element."""
    bad = ~torch.isfinite(value)
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"[{op}] {name}: expected finite values, got {value[at].item()} at {list(at)} "
            f"({int(bad.sum())} of {value.numel()}). Unset HOTLOOP_CHECK to let it pass."
        )
