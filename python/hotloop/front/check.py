# SPDX-License-Identifier: Apache-2.0
"""Every check of a front door, and the one form of its errors: ``[op] argument: expected ..., got .... What to do.``

Numbers and choices; arrays of NumPy, torch and CuPy; tensors, where an op takes torch only. torch is looked up where a
caller loaded it, never imported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from . import arrays, environment, plain
from .arrays import FLOATS

if TYPE_CHECKING:
    from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
UNSET = "Unset HOTLOOP_CHECK to let it pass."
"""What to do about an element that only HOTLOOP_CHECK=1 looks at."""
LARGEST = 3.4028234663852886e38
"""The largest float32: more is an infinity inside the loops. ``at_most=math.inf`` lets infinity itself pass."""


def flag(op: str, name: str, value: Any) -> bool:
    """Return a Python or NumPy boolean as a Python one."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"[{op}] {name}: expected True or False, got {type(value).__name__}.")
    return bool(value)


def choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"[{op}] {name}: expected one of {', '.join(allowed)}, got {value!r}.")


def number(
    op: str,
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    hint: str = "",
) -> float:
    """Return ``value`` as a finite float inside the stated range, or raise with the range in the text."""
    # Numbers first: torch.compile traces a default as a symbol, which has no attributes to ask for.
    if not isinstance(value, (int, float)) and (
        hasattr(value, "dtype")
        and getattr(value, "shape", None) == ()
        and hasattr(value, "tobytes")
    ):
        value = value.item()  # a NumPy scalar
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        x = float(value)
        if (
            (-LARGEST <= x <= LARGEST or (at_most == math.inf and x == math.inf))  # NaN neither
            and (above is None or x > above)
            and (at_least is None or x >= at_least)
            and (below is None or x < below)
            and (at_most is None or x <= at_most)
        ):
            return x
    bounds = [
        f"> {above:g}" if above is not None else "",
        f">= {at_least:g}" if at_least is not None else "",
        f"< {below:g}" if below not in (None, math.inf) else "",
        f"<= {at_most:g}" if at_most not in (None, math.inf) else "",
    ]
    kind = "a number"
    if isinstance(value, (int, float)) and abs(value) > LARGEST:
        kind = "a finite number"
    wanted = f"{kind} " + " and ".join(b for b in bounds if b) if any(bounds) else kind
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"[{op}] {name}: expected {wanted}, got {type(value).__name__}. Pass a float."
        )
    if math.isinf(value):
        hint = hint or "Leave it out or pass a finite number."
    raise ValueError(f"[{op}] {name}: expected {wanted}, got {value!r}.{hint and ' ' + hint}")


def integer(
    op: str, name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None
) -> int:
    """Return ``value`` as an int inside the stated range, or raise with the range in the text."""
    x: int | None
    # First, since torch.compile traces an argument as a symbol without __index__.
    if isinstance(value, int):
        x = value
    else:
        try:
            x = int(value.__index__())
        except AttributeError:
            x = None
    if x is None or isinstance(value, bool):
        raise TypeError(f"[{op}] {name}: expected an integer, got {type(value).__name__}.")
    if (at_least is not None and x < at_least) or (at_most is not None and x > at_most):
        low = f">= {at_least}" if at_least is not None else ""
        high = f"<= {at_most}" if at_most is not None else ""
        wanted = " and ".join(b for b in (low, high) if b)
        raise ValueError(f"[{op}] {name}: expected an integer {wanted}, got {x}.")
    return x


def instance(op: str, name: str, value: Any, *types: type, hint: str = "") -> None:
    """Refuse what is of none of these types; ``None`` among them is a type of its own."""
    if not isinstance(value, types):
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise TypeError(
            f"[{op}] {name}: expected {wanted}, got {type(value).__name__}.{hint and ' ' + hint}"
        )


def entries(op: str, state: Any, names: Iterable[str]) -> None:
    """Refuse a ``state_dict`` without these entries."""
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            f"[{op}] state: expected what state_dict() returns, got none of {', '.join(missing)}."
        )


def kind(op: str, name: str, value: Any) -> arrays.Kind:
    """Which library an array belongs to; anything else, and what is not plain memory, is refused."""
    found = arrays.kind(value)
    if found is None:
        raise TypeError(
            f"[{op}] {name}: expected a NumPy, torch or CuPy array, got {type(value).__name__}. Use numpy.asarray(...)."
        )
    if found == "torch":
        tensor(op, name, value)
    elif found == "numpy" and type(value) is not np.ndarray:
        plain.check(op, name, value)
    return found


def array(op: str, name: str, value: Any, dtypes: tuple[str, ...], *ndims: int) -> Any:
    """Refuse what is no array, of another dtype, or of another number of dimensions."""
    kind(op, name, value)
    return _typed(op, name, value, dtypes, ndims)


def alike(
    op: str,
    name: str,
    value: Any,
    dtypes: tuple[str, ...],
    wanted: tuple[int, ...],
    like: str,
    other: Any,
) -> Any:
    """Refuse an array of another dtype or shape than wanted, or in another place than ``other``."""
    array(op, name, value, dtypes)
    same_place(op, name, value, like, other)
    shape(op, name, value, wanted, hint=f"Match {like}.")
    return value


def same_place(op: str, name: str, value: Any, like: str, other: Any) -> None:
    """Refuse an array of another library or on another device than ``other``."""
    found, wanted = kind(op, name, value), arrays.kind(other)
    if found != wanted:
        raise TypeError(
            f"[{op}] {name}: expected a {wanted} array like {like}, got {found}. Convert it first."
        )
    same = (
        value.device == other.device
        if found == "torch"
        else arrays.device(value) == arrays.device(other)
    )
    if not same:
        raise ValueError(
            f"[{op}] {name}: expected device {arrays.device(other)} like {like}, got {arrays.device(value)}. "
            "Move it first."
        )


def shape(
    op: str, name: str, value: Any, wanted: tuple[int, ...], why: str = "", hint: str = ""
) -> None:
    """Refuse an array of another shape; ``why`` says what it follows from."""
    if tuple(value.shape) != wanted:
        raise ValueError(
            f"[{op}] {name}: expected shape {wanted}{why and ' ' + why}, got {tuple(value.shape)}.{hint and ' ' + hint}"
        )


def writable(op: str, name: str, value: Any) -> None:
    """Refuse an array that cannot be updated in place."""
    if isinstance(value, np.ndarray) and not value.flags.writeable:
        raise ValueError(
            f"[{op}] {name}: expected a writable array, got a read-only one. Pass a copy."
        )
    strides = value.stride() if hasattr(value, "stride") else value.strides
    if 0 not in value.shape and any(s == 0 and n > 1 for s, n in zip(strides, value.shape)):
        raise ValueError(
            f"[{op}] {name}: expected every element to have its own memory, got an expanded array. Pass a copy."
        )


def refuse(
    op: str, name: str, value: Any, bad: Any, wanted: str, hint: str = "Correct it first."
) -> None:
    """Raise ValueError for the first element of ``value`` that is ``bad``: what it is, where, and how many are."""
    if bool(bad.any()):
        where = np.argwhere(arrays.to_numpy(bad))
        at = tuple(int(i) for i in where[0])
        raise ValueError(
            f"[{op}] {name}: expected {wanted}, got {arrays.to_numpy(value)[at]} at {list(at)} "
            f"({len(where)} of {math.prod(bad.shape)}). {hint}"
        )


def finite(op: str, **named: Any) -> None:
    """With HOTLOOP_CHECK=1, refuse NaN and infinity in arrays (None: absent). Not while torch.compile traces."""
    if environment.checks_on() and not arrays.compiling():
        for name, value in named.items():
            if value is not None:
                isfinite = sys.modules["torch"].isfinite if arrays.is_torch(value) else np.isfinite
                refuse(op, name, value, ~isfinite(value), "finite values", UNSET)


def tensor(op: str, name: str, value: Any) -> Tensor:
    """Refuse what is no tensor, and a tensor whose elements do not lie in memory (see ``plain``)."""
    torch = sys.modules["torch"]
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"[{op}] {name}: expected a torch.Tensor, got {type(value).__name__}. {_instead(value)}"
        )
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_nested:
        plain.check(op, name, value)
    found: Tensor = value
    return found


def float_tensor(op: str, name: str, value: Any, ndim: int | None = None) -> Tensor:
    """Refuse what is no tensor of floats, or has another number of dimensions."""
    found: Tensor = _typed(
        op, name, tensor(op, name, value), FLOATS, () if ndim is None else (ndim,)
    )
    return found


def float_like(op: str, name: str, value: Tensor) -> Tensor:
    """A tensor of numbers that will become floats: counts, flags, probabilities."""
    plain.check(op, name, value)
    return value


def untransformed(op: str, *tensors: Tensor | None) -> None:
    """Refuse torch.func transforms and forward-mode AD: a compiled loop has a value and one backward, no more.

    Tensors inside a transform are wrappers without memory; a tangent would be lost. Not for torch.compile, whose
    tensors are neither.
    """
    torch = sys.modules["torch"]
    forward_ad = torch.autograd.forward_ad
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


def _typed(op: str, name: str, value: Any, dtypes: tuple[str, ...], ndims: tuple[int, ...]) -> Any:
    if arrays.dtype(value) not in dtypes:
        raise TypeError(
            f"[{op}] {name}: expected dtype {', '.join(dtypes)}, got {arrays.dtype(value)}. Convert it first."
        )
    if ndims and value.ndim not in ndims:
        wanted = " or ".join(map(str, ndims))
        raise ValueError(
            f"[{op}] {name}: expected {wanted} dimension(s), got shape {tuple(value.shape)}."
        )
    return value


def _instead(value: Any) -> str:
    """What to pass in the place of a value that is no tensor."""
    if not isinstance(value, sys.modules["torch"].nn.Module):
        return "Use torch.as_tensor(...)."
    if hasattr(value, "base_layer"):  # a LoRA layer: its .weight is that of the layer below
        return "Its .weight leaves the adapter out: merge the adapter into it first, then pass .weight."
    return "Pass its .weight" + (
        ", and bias=its .bias." if getattr(value, "bias", None) is not None else "."
    )
