# SPDX-License-Identifier: Apache-2.0
"""Arrays whose memory is not their elements, and views that are: what every argument of every op must survive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

NONE = object()
"""There is no such array of this shape or dtype."""


class Mine(torch.Tensor):
    """A subclass with nothing of its own."""


class OwnFunction(torch.Tensor):
    """A subclass whose operators are its own: every one of them sees the numbers doubled."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class OwnUfunc(np.ndarray):
    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        return NotImplemented


def imaginary_part_of_a_conjugate(x: torch.Tensor) -> Any:
    if x.dtype not in (torch.float32, torch.float64, torch.float16):
        return NONE
    return torch.complex(torch.ones_like(x), -x.detach()).conj().imag


def dtensor(x: torch.Tensor) -> Any:
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    return DTensor.from_local(x, init_device_mesh("cpu", (1,)), [Replicate()])


def masked(x: torch.Tensor) -> Any:
    from torch.masked import masked_tensor

    return masked_tensor(x.detach().clone(), torch.ones_like(x, dtype=torch.bool))


def quantized(x: torch.Tensor) -> Any:
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8) if x.dtype == torch.float32 else NONE


def nested(x: torch.Tensor) -> Any:
    return torch.nested.nested_tensor([x.detach()]) if x.is_floating_point() else NONE


def jagged(x: torch.Tensor) -> Any:
    return torch.nested.nested_tensor([x.detach()], layout=torch.jagged) if x.ndim else NONE


def in_zero_gradients(x: torch.Tensor) -> Any:
    return torch._efficientzerotensor(x.shape, dtype=x.dtype) if not x.any() else NONE


# Elements are what the memory holds, or can be copied there: the result must be that of a plain array.
RIGHT: dict[str, Callable[[torch.Tensor], Any]] = {
    "negated view": lambda x: torch._neg_view(-x) if x.dtype != torch.bool else NONE,
    "imag of conj": imaginary_part_of_a_conjugate,
    "subclass": lambda x: x.as_subclass(Mine),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "buffer": lambda x: torch.nn.Buffer(x),
    "zeros without memory": in_zero_gradients,
    "strided": lambda x: torch.stack((x, x), -1)[..., 0] if x.ndim else NONE,
}

# Anything else: the right result or a TypeError.
REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "dtensor": dtensor,
    "fake": lambda x: FakeTensorMode().from_tensor(x),
    "functional": torch._to_functional_tensor,
    "two tensor": lambda x: TwoTensor(x.clone(), x.clone()),
    "own function": lambda x: x.as_subclass(OwnFunction),
    "masked": masked,
    "nested": nested,
    "jagged": jagged,
    "sparse": lambda x: x.to_sparse() if x.ndim else NONE,
    "csr": lambda x: x.to_sparse_csr() if x.ndim == 2 else NONE,
    "mkldnn": lambda x: x.to_mkldnn() if x.dtype == torch.float32 and x.ndim else NONE,
    "quantized": quantized,
    "complex": lambda x: x.to(torch.complex64) if x.dtype == torch.float32 else NONE,
    "uninitialized": lambda x: torch.nn.parameter.UninitializedParameter(),
}


def shifted(x: np.ndarray) -> Any:
    """Memory that starts inside an element."""
    raw = np.zeros(x.nbytes + 1, np.uint8)
    raw[1:] = np.frombuffer(x.tobytes(), np.uint8)
    return raw[1:].view(x.dtype).reshape(x.shape) if x.itemsize > 1 and x.size else NONE


def read_only(x: np.ndarray) -> Any:
    out = x.copy()
    out.flags.writeable = False
    return out


def backwards(x: np.ndarray) -> Any:
    return np.ascontiguousarray(x[::-1])[::-1] if x.ndim else NONE


NUMPY_RIGHT: dict[str, Callable[[np.ndarray], Any]] = {
    "negative stride": backwards,
    "strided": lambda x: np.stack((x, x), -1)[..., 0],
    "Fortran order": np.asfortranarray,
}

NUMPY_REFUSED: dict[str, Callable[[np.ndarray], Any]] = {
    "masked": lambda x: np.ma.array(x.copy(), mask=np.arange(x.size).reshape(x.shape) == 0),
    "matrix": lambda x: np.asmatrix(x.copy()) if x.ndim == 2 else NONE,
    "own ufunc": lambda x: x.copy().view(OwnUfunc),
    "object": lambda x: x.astype(object),
    "records": lambda x: x.astype([("a", x.dtype)]),
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")) if x.itemsize > 1 else NONE,
    "complex": lambda x: x.astype(complex),
    "shifted": shifted,
    "read-only": read_only,
}
