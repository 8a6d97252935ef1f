# SPDX-License-Identifier: Apache-2.0
"""Calls of the CUDA loops without a GPU: arrays of the CPU, said to be of one, pass all checks up to the device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hotloop.front import native
from hotloop.moe import (
    AdamState,
    Norm,
    _device,
    adam_smoe_layer,
    combine,
    dispatch,
    lookahead,
    momentum_smoe_layer,
    permute,
    residual_smoe_layer,
    robust_momentum_smoe_layer,
    route,
    sequence_balance_loss,
)
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(native.cuda is None, reason="hotloop._cuda is not compiled"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device would read the memory of the host"),
]  # fmt: skip

pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class There:
    """A tensor of the CPU as an array of a CUDA device."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.detach()

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self.x.__dlpack__()
        # DLTensor: the data, then the type of the device.
        kind = ctypes.c_int32.from_address(pointer_of(capsule, b"dltensor") + 8)
        kind.value = 2
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


def there(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(there, x))
    return There(x) if isinstance(x, Tensor) else x


class Loops:
    def __getattr__(self, name: str) -> Callable[..., Any]:
        loop = getattr(native.cuda.moe, name)
        return lambda *arguments: loop(*map(there, arguments))


def workspace(count: int) -> Any:
    whole = torch.empty(count + 256, dtype=torch.uint8)
    return There(whole[-whole.data_ptr() % 256 :][:count])


@pytest.fixture
def to_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def loops(like: Tensor, memory: bool = True) -> tuple[Any, tuple[Any, ...]]:
        return Loops(), (workspace, 0, 0) if memory else (0, 0)

    return lambda: monkeypatch.setattr(_device, "loops", loops)


def refused(op: str, call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=rf"\[{op}\] device: expected a usable CUDA device"):
        call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_router(dtype: torch.dtype, to_gpu: Callable[[], None]) -> None:
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    mask, bias = torch.arange(9) % 2 > 0, torch.zeros(12, dtype=dtype)
    found = route(x, 3, token_mask=mask, bias=bias)
    loss = sequence_balance_loss(x, 3, cu_seqlens=torch.tensor([0, 4, 9]))
    to_gpu()
    refused("route", lambda: route(x, 3, token_mask=mask, bias=bias))
    refused("route", lambda: route(x.detach()[:0], 3, dispatch=False))
    refused("route", lambda: sequence_balance_loss(x, 3, cu_seqlens=torch.tensor([0, 4, 9])))
    refused("route", (found.topk_weights.sum() + found.logsumexp.sum()).backward)
    refused("route", loss.backward)


def test_order(to_gpu: Callable[[], None]) -> None:
    ids, weights = torch.tensor([[0, 2], [-1, 1]]), torch.ones(2, 2, dtype=torch.float16)
    to_gpu()
    refused("dispatch", lambda: dispatch(ids, 3))
    refused("dispatch", lambda: dispatch(ids.int(), 3, align=4, capacity=1))
    refused("dispatch", lambda: dispatch(ids, 3, capacity=1, drop="weight", topk_weights=weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows(dtype: torch.dtype, to_gpu: Callable[[], None]) -> None:
    g = torch.Generator().manual_seed(1)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype).requires_grad_()

    order = route(torch.randn(5, 4, generator=g), 2).dispatch
    assert order is not None
    x, rows, weights, state, shared = made(5, 6), made(10, 6), made(5, 2), made(5, 6), made(5, 6)
    mu, norm = torch.tensor(0.5, requires_grad=True), Norm("layer", made(6), made(6))
    rms = Norm("rms", made(6).float() if dtype != torch.float64 else made(6))
    other = torch.float32 if dtype == torch.float64 else torch.float64
    full = (rows, weights, order)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("permute", lambda: permute(x, order)),
        ("moe", lambda: combine(*full)),
        ("moe", lambda: combine(*full, shared=shared, out_dtype=other)),
        ("moe", lambda: residual_smoe_layer(x, *full, norm=norm)),
        ("moe", lambda: residual_smoe_layer(x, shared, norm=rms, post_norm=True)),
        ("moe", lambda: momentum_smoe_layer(x, state, *full, mu=mu, shared=shared, norm=norm)),
        ("moe", lambda: momentum_smoe_layer(x, None, shared)),
        ("moe", lambda: adam_smoe_layer(x, AdamState(state, state * state, None), *full, is_first=True, norm=rms)),
        ("moe", lambda: robust_momentum_smoe_layer(x, state, *full, mu=mu, gamma=0.3, alpha=mu, norm=norm)),
        ("moe", lambda: lookahead(x, state, mu, norm=rms)),
    ]  # fmt: skip
    results = []
    for _, call in calls:
        found = call()
        parts = found if isinstance(found, tuple) else (found,)
        flat = [y for part in parts for y in (part if isinstance(part, tuple) else (part,))]
        results.append(sum(y.double().sum() for y in flat if y is not None))
    to_gpu()
    for (op, call), result in zip(calls, results):
        refused(op, call)
        refused("moe", result.backward)
        with torch.no_grad():
            refused(op, call)
