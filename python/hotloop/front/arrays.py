"""NumPy, torch and CuPy arrays alike: what rooms without gradients read and give back.

The kind and device of an op's first array decide what its results are. torch and CuPy are never imported here:
an array of theirs can only be passed once they are.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Literal

import numpy as np

from . import plain

Kind = Literal["numpy", "torch", "cupy"]

FLOATS = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int64", "int32")


def kind(op: str, name: str, value: Any) -> Kind:
    """Which library an array belongs to; anything else, and what is not plain memory, is refused."""
    if type(value) is np.ndarray:
        return "numpy"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_nested:
            plain.check(op, name, value)
        return "torch"
    if isinstance(value, np.ndarray):
        plain.check(op, name, value)
        return "numpy"
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(value, cupy.ndarray):
        return "cupy"
    raise TypeError(
        f"[{op}] {name}: expected a NumPy, torch or CuPy array, got {type(value).__name__}. Use numpy.asarray(...)."
    )


def device(value: Any) -> str:
    """ "cpu", or "cuda:<index>"."""
    if isinstance(value, np.ndarray):
        return "cpu"
    if type(value).__module__.partition(".")[0] == "cupy":
        return f"cuda:{value.device.id}"
    return str(value.device)


def dtype(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return _numpy_name(value.dtype)
    return str(value.dtype).removeprefix("torch.")


# NumPy puts the name of a dtype together anew every time: 3 us, which is a tenth of a small call.
@functools.lru_cache(maxsize=256)
def _numpy_name(given: np.dtype[Any]) -> str:
    return str(given)


def checked(op: str, name: str, value: Any, dtypes: tuple[str, ...], *ndims: int) -> Any:
    """Refuse what is no array, of another dtype, or of another number of dimensions."""
    kind(op, name, value)
    if dtype(value) not in dtypes:
        raise TypeError(
            f"[{op}] {name}: expected dtype {', '.join(dtypes)}, got {dtype(value)}. Convert it first."
        )
    if ndims and value.ndim not in ndims:
        wanted = " or ".join(map(str, ndims))
        raise ValueError(
            f"[{op}] {name}: expected {wanted} dimension(s), got shape {tuple(value.shape)}."
        )
    return value


def same_place(op: str, name: str, value: Any, like: str, other: Any) -> None:
    """Refuse an array of another library or on another device than ``other``."""
    if kind(op, name, value) != kind(op, like, other):
        raise TypeError(
            f"[{op}] {name}: expected a {kind(op, like, other)} array like {like}, got {kind(op, name, value)}. "
            "Convert it first."
        )
    if device(value) != device(other):
        raise ValueError(
            f"[{op}] {name}: expected device {device(other)} like {like}, got {device(value)}. Move it first."
        )


def exported(value: Any) -> Any:
    """The form the compiled loops read without a copy: the array, which passes the gate of ``plain`` there."""
    return value


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
        return value
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        return torch.from_numpy(np.ascontiguousarray(value)).to(like.device)
    return sys.modules["cupy"].asarray(value)


def unit_stride(value: Any) -> Any:
    """The array itself if neighbours in the last dimension lie side by side, else a copy where they do."""
    if value.ndim == 0 or value.shape[-1] <= 1:
        return value
    if isinstance(value, np.ndarray) or not hasattr(value, "stride"):
        contiguous = value.strides[-1] == value.itemsize
        return value if contiguous else value.copy()
    return value if value.stride(-1) == 1 else value.contiguous()


def compiling() -> bool:
    """Whether torch.compile is tracing the caller."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())
