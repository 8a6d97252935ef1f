"""Argument checks of the front doors, and the one form of their errors.

``[op] argument: expected ..., got .... What to do.``
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import plain
from .check import choice as choice
from .check import number as number

REDUCTIONS = ("none", "mean", "sum")
FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def floats() -> str:
    return ", ".join(dtype_name(d) for d in FLOAT_DTYPES)


def tensor(op: str, name: str, value: Any) -> Tensor:
    """Refuse what is no tensor, and a tensor whose elements do not lie in memory (see ``plain``)."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"[{op}] {name}: expected a torch.Tensor, got {type(value).__name__}. {_instead(value)}"
        )
    if type(value) is not Tensor or value.layout is not torch.strided or value.is_nested:
        plain.check(op, name, value)
    return value


def _instead(value: Any) -> str:
    if not isinstance(value, torch.nn.Module):
        return "Use torch.as_tensor(...)."
    if hasattr(value, "base_layer"):  # a LoRA layer: its .weight is that of the layer below
        return "Its .weight leaves the adapter out: merge the adapter into it first, then pass .weight."
    return "Pass its .weight" + (
        ", and bias=its .bias." if getattr(value, "bias", None) is not None else "."
    )


def float_like(op: str, name: str, value: Tensor) -> Tensor:
    """A tensor of numbers that will become floats: counts, flags, probabilities."""
    if not torch.compiler.is_compiling():
        plain.check(op, name, value)
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


def untransformed(op: str, *tensors: torch.Tensor | None) -> None:
    """Refuse torch.func transforms and forward-mode AD: a compiled loop has a value and one backward, no more.

    Tensors inside a transform are wrappers without memory; a tangent would be lost. Not for torch.compile, whose
    tensors are neither.
    """
    mode = None
    if torch._C._are_functorch_transforms_active():
        mode = "a torch.func transform (grad, vmap, jvp, ...)"
    elif forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        mode = "forward-mode AD"
    if mode is not None:
        raise NotImplementedError(
            f"[{op}] impl: expected 'reference' inside {mode}, which compiled loops do not know. "
            "Pass impl='reference': it is plain torch."
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
