# SPDX-License-Identifier: Apache-2.0
"""The one gate between arrays of other libraries and the compiled loops, which read memory through pointers.

An array passes if its elements are what its memory holds. A lazily negated view (``x.conj().imag``) is copied. What
keeps its elements elsewhere, or gives its memory another meaning, raises a TypeError that names the way out: wrapper
subclasses (DTensor, FakeTensor), sparse, nested and quantized tensors, masked arrays. Front doors call ``check`` to
name the argument before anything is computed; ``csrc/bind/torch_tensor.cpp`` calls ``readable`` for whatever is
not obviously plain, so that nothing reaches a pointer past the gate.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


def check(op: str, name: str, value: Any) -> None:
    """Raise TypeError unless the memory of a torch tensor or NumPy array holds its elements.

    Views that are negated or conjugated lazily pass: ``readable`` copies them. Under ``torch.compile`` and
    ``torch.export`` everything but complex numbers passes: what is traced there is no tensor yet, and the operators
    take the real ones.
    """
    if isinstance(value, np.ndarray):
        reason = _numpy_reason(value)
    else:
        compiling = sys.modules["torch"].compiler.is_compiling()
        reason = _complex_reason(value) if compiling else _torch_reason(value)
    if reason is not None:
        raise TypeError(f"[{op}] {name}: {reason}")


def readable(op: str, name: str, value: Any) -> Any:
    """Return a torch tensor whose memory holds the elements of ``value``: ``value`` itself, or a copy.

    Raises:
        TypeError: there is no such memory.
    """
    torch = sys.modules["torch"]
    reason = _torch_reason(value)
    if reason is None and value.device.type == "meta":  # front doors compare devices first
        reason = f"expected a tensor with memory, got one on the meta device {tuple(value.shape)}. Pass a real tensor."
    if reason is None and value.is_neg():
        return value.detach().resolve_neg()
    # Zeros without memory, from forward-mode autograd.
    if reason is None and value._is_zerotensor():
        return torch.zeros(value.shape, dtype=value.dtype, device=value.device)
    if reason is None and value.numel() > 0 and _address(value) is None:
        reason = _freed(value) or (
            f"expected a tensor in memory, got one that torch.func transforms "
            f"({tuple(value.shape)} {_dtype(value)}). Call the op outside vmap, grad and jvp."
        )
    if reason is not None:
        raise TypeError(f"[{op}] {name}: {reason}")
    return value


def _freed(value: Any) -> str | None:
    """Why there is no memory, if its owner took it away, as FSDP does between steps."""
    try:
        if value.untyped_storage().nbytes() > 0:
            return None
    except RuntimeError:  # under torch.func there is no storage to ask
        return None
    return (
        f"expected a tensor in memory, got one whose storage was freed ({tuple(value.shape)} {_dtype(value)}). "
        "Gather it first, under FSDP inside its module's forward or summon_full_params."
    )


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def _address(value: Any) -> int | None:
    try:
        return int(value.data_ptr()) or None
    except RuntimeError:
        return None


_WAYS_OUT = {
    "DTensor": "Pass x.to_local() for the part of this rank, or x.full_tensor().",
    "FakeTensor": "Call the op with a real tensor, or under torch.compile or torch.export.",
    "FunctionalTensor": "Call the op with a real tensor, or under torch.compile or torch.export.",
    "AsyncCollectiveTensor": "Pass x.wait().",
    "MaskedTensor": "Pass x.get_data(), with the masked elements filled.",
    "NestedTensor": "Pass x.values(), with cu_seqlens where the op takes them.",
    "UninitializedParameter": "Run the lazy module once first.",
}


def _torch_reason(value: Any) -> str | None:
    """Why the memory of a tensor is not its elements, and what to do; None if it is."""
    torch = sys.modules["torch"]
    kind = type(value)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        # A class with operators of its own decides what its elements are, whatever its memory holds.
        wraps = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        function = kind.__torch_function__
        own = getattr(function, "__func__", function)
        if wraps or own not in (
            torch.Tensor.__torch_function__.__func__,
            torch._C._disabled_torch_function_impl,
        ):
            hook = "__torch_dispatch__" if wraps else "__torch_function__"
            cure = next(
                (_WAYS_OUT[c.__name__] for c in kind.__mro__ if c.__name__ in _WAYS_OUT), ""
            )
            if not cure:
                cure = "Pass a plain tensor of its values" + (
                    "." if wraps else ", such as x.as_subclass(torch.Tensor)."
                )
            return (
                f"expected a torch.Tensor in plain memory, got {kind.__name__}, whose operators are its own ({hook}). "
                f"{cure}"
            )
    if value.is_nested:
        return f"expected a dense tensor, got a nested one. {_WAYS_OUT['NestedTensor']}"
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        return f"expected a dense tensor, got layout {layout}. Pass x.to_dense()."
    if value.is_quantized:
        return f"expected a tensor of numbers, got quantized {_dtype(value)}. Pass x.dequantize()."
    if (reason := _complex_reason(value)) is not None:
        return reason
    if torch._is_functional_tensor(value):
        return f"expected a tensor in memory, got one inside functionalization. {_WAYS_OUT['FunctionalTensor']}"
    return None


def _complex_reason(value: Any) -> str | None:
    if value.is_complex():
        return f"expected real numbers, got {_dtype(value)}. Pass x.real, x.imag or x.abs()."
    return None


def _numpy_reason(value: np.ndarray) -> str | None:
    """The same for a NumPy array: subclasses in which an element is not what lies in memory, or * is a product."""
    kind = type(value)
    if isinstance(value, np.ma.MaskedArray):
        return f"expected a plain NumPy array, got {kind.__name__}, whose mask would be ignored. Pass x.filled(...)."
    if isinstance(value, np.matrix):
        return f"expected a plain NumPy array, got {kind.__name__}. Pass np.asarray(x)."
    own = ("__array_ufunc__", "__array_function__")
    if any(getattr(kind, hook) is not getattr(np.ndarray, hook) for hook in own):
        return (
            f"expected a plain NumPy array, got {kind.__name__}, whose operators are its own. "
            "Pass a plain array of its values, such as np.asarray(x)."
        )
    return None
