# SPDX-License-Identifier: Apache-2.0
"""Kinds of arrays and their conversions: NumPy, torch and CuPy alike.

The kind and device of an op's first array decide what its results are. torch and CuPy are never imported here:
an array of theirs can only be passed once they are.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from . import plain

Kind = Literal["numpy", "torch", "cupy"]


class _Shaped(Protocol):
    @property
    def shape(self) -> Any: ...


Array = TypeVar("Array", bound=_Shaped)
"""An array of NumPy, torch or CuPy: what is of the kind of an argument has its type."""

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int64", "int32")


def kind(value: Any) -> Kind | None:
    """Which library an array belongs to; None for anything else."""
    if isinstance(value, np.ndarray):
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        return "torch"
    cupy = sys.modules.get("cupy")
    return "cupy" if cupy is not None and isinstance(value, cupy.ndarray) else None


def device(value: Any) -> str:
    """ "cpu", or "cuda:<index>"."""
    if isinstance(value, np.ndarray):
        return "cpu"
    place = value.device
    return f"cuda:{place.id}" if hasattr(place, "id") else str(place)  # CuPy numbers its devices


def dtype(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return _numpy_name(value.dtype)
    # Not from a cache: Dynamo refuses a write to it inside a checkpoint.
    return str(value.dtype).removeprefix("torch.")


# NumPy puts the name of a dtype together anew every time: 3 us, which is a tenth of a small call.
@functools.lru_cache(maxsize=256)
def _numpy_name(given: np.dtype[Any]) -> str:
    return str(given)


def empty(like: Any, shape: tuple[int, ...], dtype: str) -> Any:
    """A new array of the kind and device of ``like``."""
    if isinstance(like, np.ndarray):
        return np.empty(shape, dtype)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    return sys.modules["cupy"].empty(shape, dtype)


def to_numpy(value: Any) -> np.ndarray:
    """A NumPy array of the same numbers; half types become float32."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float32) if value.dtype == np.float16 else value
    if dtype(value) in ("float16", "bfloat16"):
        value = value.float() if hasattr(value, "float") else value.astype("float32")
    if hasattr(value, "detach"):
        return np.asarray(plain.readable("hotloop", "array", value).detach().cpu().numpy())
    return np.asarray(value.get())


def from_numpy(value: np.ndarray, like: Any) -> Any:
    """The array as the kind and on the device of ``like``."""
    if isinstance(like, np.ndarray):
        return np.asarray(value)  # arithmetic on shape () gives NumPy scalars
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.from_numpy(np.asarray(value, order="C")).to(like.device)
    return sys.modules["cupy"].asarray(value)


def dense(value: Any, dtype: str | None = None) -> Any:
    """The array contiguous and, where one is named, of this dtype; copied only if it is not so already."""
    if isinstance(value, np.ndarray):
        return np.asarray(value, dtype, order="C")  # np.ascontiguousarray gives () a dimension
    if not hasattr(value, "contiguous"):
        return sys.modules["cupy"].ascontiguousarray(value, dtype)
    if dtype is not None:
        value = value.to(getattr(sys.modules["torch"], dtype))
    return value.contiguous()


def as_bytes(value: Any) -> Any:
    """Numbers or flags of one byte as uint8: the same memory, but for a view that is negated lazily."""
    if isinstance(value, np.ndarray):
        return value.view(np.uint8)
    return (
        value.resolve_neg().view(sys.modules["torch"].uint8)
        if is_torch(value)
        else value.view("uint8")
    )


def unit_stride(value: Any) -> Any:
    """The array itself if neighbours in the last dimension lie side by side, else a copy where they do."""
    if value.ndim == 0 or value.shape[-1] <= 1:
        return value
    if isinstance(value, np.ndarray) or not hasattr(value, "stride"):
        contiguous = value.strides[-1] == value.itemsize
        return value if contiguous else value.copy()
    return value if value.stride(-1) == 1 else value.contiguous()


def is_torch(x: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def assign(target: Any, value: Any) -> None:
    """Write a NumPy array, or one of the target's own library, into the target."""
    if isinstance(target, np.ndarray):
        with np.errstate(over="ignore", invalid="ignore"):
            target[...] = value
    elif is_torch(target):
        torch = sys.modules["torch"]
        with torch.no_grad():
            target.copy_(torch.from_numpy(value) if isinstance(value, np.ndarray) else value)
    else:
        target[...] = sys.modules["cupy"].asarray(value)


def as_column(x: Any) -> Any:
    if x.ndim != 1:
        return x
    return x.reshape(-1, 1) if int(x.shape[0]) <= 1 else x[:, None]


def compiling() -> bool:
    """Whether torch.compile is tracing the caller."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def arange(like: Any, count: int) -> Any:
    """0 to count - 1 as int64, of the kind and on the device of ``like``."""
    if isinstance(like, np.ndarray):
        return np.arange(count, dtype=np.int64)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.arange(count, dtype=torch.int64, device=like.device)
    return sys.modules["cupy"].arange(count, dtype="int64")
