"""What the front doors of this room share: the choice of an implementation, seeds, lengths, outputs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..front import arrays, environment, native
from ..front import impl as _impl
from ..front.check import number
from ..front.impl import Impl
from ._law import Law, packed_number
from ._seeds import check_stream as check_stream
from ._seeds import drawn


def choose(op: str, impl: Impl, like: Any, *, cuda: bool = False) -> str:
    """Pick the implementation for arrays on the device of ``like``; ``cuda``: the op has CUDA loops."""
    device = arrays.device(like)
    on_cpu = None if device == "cpu" else f"device {device}"
    candidates: dict[str, Any] = {}
    if cuda:

        def refuses_cuda() -> str | None:
            if not device.startswith("cuda"):
                return f"device {device}"
            return None if native.cuda() is not None else "hotloop._cuda is not compiled"

        candidates["cuda"] = refuses_cuda
    candidates |= {"cpu": lambda: on_cpu, "reference": lambda: on_cpu}
    chosen = _impl.choose(
        op,
        impl,
        candidates,
        lambda: f"{tuple(like.shape)} {arrays.dtype(like)} on {device}",
    )
    environment.log_call(op, impl=chosen, shape=tuple(like.shape), device=device)
    return chosen


def check_lengths(op: str, name: str, lengths: Any, batch: int, most: int, like: Any) -> None:
    if lengths is None:
        return
    arrays.checked(op, name, lengths, arrays.INTEGERS, 1)
    arrays.same_place(op, name, lengths, "the other arrays", like)
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"[{op}] {name}: expected shape ({batch},), got {tuple(lengths.shape)}.")
    if environment.checks_on():
        for at, n in enumerate(arrays.to_numpy(lengths).tolist()):
            if not 0 <= n <= most:
                raise ValueError(f"[{op}] {name}: expected 0 to {most}, got {n} at [{at}].")


def packed_stream(seed: Any, offset: Any, batch: int, like: Any) -> tuple[Any, Any]:
    if type(seed) is int and type(offset) is int:
        return seed, offset
    seed = drawn(seed, batch, like)
    return (
        int(seed) if isinstance(seed, (int, np.integer)) else arrays.exported(_dense(seed)),
        int(offset) if isinstance(offset, (int, np.integer)) else arrays.exported(_dense(offset)),
    )


def packed_lengths(lengths: Any, most: int) -> Any:
    return most if lengths is None else packed_number(lengths, "int64")


def _dense(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x)
    return x.contiguous() if hasattr(x, "contiguous") else x


def dense(x: Any, dtype: str) -> Any:
    """The array contiguous and of this integer dtype, copied only if it is not."""
    if arrays.dtype(x) != dtype:
        x = (
            x.astype(dtype)
            if isinstance(x, np.ndarray) or not hasattr(x, "to")
            else x.long()
            if dtype == "int64"
            else x.int()
        )
    return _dense(x)


def finite(op: str, name: str, value: Any, **bounds: Any) -> float:
    """As ``number``, and not infinite: infinity times 0 or over infinity is NaN, which weighs nothing in silence."""
    if isinstance(value, float) and math.isinf(value):  # first: ``number`` names no way out
        raise ValueError(
            f"[{op}] {name}: expected a finite number, got {value}. Leave it out or pass one."
        )
    return number(op, name, value, **bounds)


def check_shape(op: str, name: str, value: Any, wanted: tuple[int, ...], why: str = "") -> None:
    if tuple(value.shape) != wanted:
        raise ValueError(
            f"[{op}] {name}: expected shape {wanted}{' ' + why if why else ''}, got {tuple(value.shape)}."
        )


def check_draft(op: str, draft: Law, target: Law, rows: int) -> None:
    """A draft law over the same place, requests and vocabulary as the target, with enough rows."""
    arrays.same_place(op, "draft_probs", draft.values, "target_probs", target.values)
    shape, wanted = tuple(draft.values.shape), tuple(target.values.shape)
    if shape[0] != wanted[0] or shape[1] < rows or shape[-1] != wanted[-1]:
        raise ValueError(
            f"[{op}] draft_probs: expected shape ({wanted[0]}, {rows}, {wanted[-1]}), got {shape}."
        )
