# SPDX-License-Identifier: Apache-2.0
"""What a head must hold to on a GPU and can be shown without one.

No wait, no dtype that it would narrow, nothing that an older Dynamo cannot trace, wide memory accesses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotloop.front import impl as _impl
from hotloop.logprob import (
    LogitMap,
    _call,
    _ops,
    _statistics,
    _triton,
    forward_kl_distill,
    generalized_jsd_distill,
    linear_cross_entropy,
    linear_distill,
    linear_jsd,
    linear_kl,
    linear_logprob,
    token_logprob,
)
from hotloop.preference import linear_preference_loss, modpo_loss
from logprob_cases import make_head
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HALF = make_head(6, 4, 9, bias=False)
WIDE = HALF.to(torch.float64)

CALLS: dict[str, Callable[..., Any]] = {
    "linear_logprob": lambda h, w, y, **o: linear_logprob(h, w, y, **o).logps.sum(),
    "linear_cross_entropy": lambda h, w, y, **o: linear_cross_entropy(h, w, y, **o),
    "token_logprob": lambda h, w, y, **o: token_logprob(h @ w.t(), y, **o).logps.sum(),
    "linear_kl": lambda h, w, y, **o: linear_kl(h, w, h.detach(), w.detach(), labels=y, **o),
    "linear_jsd": lambda h, w, y, **o: linear_jsd(h, w, h.detach(), w.detach(), labels=y, **o),
    "linear_distill": lambda h, w, y, **o: linear_distill(
        h, w, h.detach(), w.detach(), divergence_kind="balanced", temperature=2.0, **o
    ),
    "forward_kl_distill": lambda h, w, y, **o: forward_kl_distill(h @ w.t(), h @ w.t(), **o),
    "generalized_jsd_distill": lambda h, w, y, **o: generalized_jsd_distill(
        h @ w.t(), h @ w.t(), **o
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_float64_is_not_for_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels compute in float32; the choice falls on what computes in float64."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # makes Triton stand for this device
    with torch.no_grad():
        CALLS[name](WIDE.hidden, WIDE.weight, WIDE.labels)
    assert _impl.last_impl(name) == "cpu"
    with pytest.raises(
        NotImplementedError,
        match=r"triton +refused: dtype float64 \(supports float32, float16, bfloat16\)",
    ):
        CALLS[name](WIDE.hidden, WIDE.weight, WIDE.labels, impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_old_torch_on_cuda_is_refused_by_its_number(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
    assert _triton.refuses(like) is None
    monkeypatch.setattr(_triton, "_TORCH", (2, 9))
    assert _triton.refuses(like) == f"torch {torch.__version__} (needs 2.10 or later on CUDA)"


# -- tracing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", [*CALLS, "linear_preference_loss"])
def test_nothing_is_traced_that_torch_2_11_cannot_trace(
    name: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There Dynamo stops at ``find_spec`` and at a frozen dataclass that is made while it traces."""

    def refuse(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                raise AssertionError(f"{what} is traced")
            return real(*args, **kwargs)

        return call

    assert not any(is_dataclass(made) for made in (LogitMap, _call.LmHeadCall, _call.Divergence))
    monkeypatch.setattr(importlib.util, "find_spec", refuse("find_spec", importlib.util.find_spec))
    torch.compiler.reset()
    head = HALF.leaves()
    if name == "linear_preference_loss":
        call = lambda h, w, y, **o: linear_preference_loss(  # noqa: E731
            h.reshape(2, 3, 4), w, y.reshape(2, 3), loss="simpo", options={"beta": 2.0}, **o
        )[0]
    else:
        call = CALLS[name]
    made = torch.compile(
        lambda h, w, y: call(h, w, y, impl=impl), fullgraph=True, backend="aot_eager"
    )
    value = made(head.hidden, head.weight, head.labels)
    torch.testing.assert_close(value, call(head.hidden, head.weight, head.labels, impl=impl))
    assert bool(torch.autograd.grad(value, head.hidden)[0].isfinite().all())


# -- waiting -------------------------------------------------------------------------------------------------


class NoWait(TorchDispatchMode):
    """Refuses what on a GPU copies from the host or reads from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select"), name
        return func(*args, **(kwargs or {}))


@contextmanager
def kernels_that_answer(monkeypatch: pytest.MonkeyPatch, n: int, v: int) -> Iterator[None]:
    """Stand-ins that give the shapes of the Triton kernels: what is tested is the Python around them."""

    def forward(hidden: Tensor, *_: Any, argmax: bool = False, **__: Any) -> Any:
        device = hidden.device
        largest = torch.zeros(n, dtype=torch.int64, device=device) if argmax else None
        return torch.zeros(6, n, device=device), largest

    def backward(hidden: Tensor, weight: Tensor, *_: Any, **__: Any) -> Any:
        return torch.zeros_like(hidden), torch.zeros_like(weight), None

    stand_in = SimpleNamespace(forward=forward, backward=backward)
    monkeypatch.setattr(_triton, "kernels", lambda: stand_in)
    with NoWait():
        yield


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_head_reads_nothing_back(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where a value does not exist and cannot be asked for."""
    n, v = 6, 9
    h = torch.zeros(n, 4, device="meta", requires_grad=True)
    w = torch.zeros(v, 4, device="meta", requires_grad=True)
    y = torch.zeros(n, dtype=torch.int64, device="meta")
    with kernels_that_answer(monkeypatch, n, v):
        head = _call.LmHeadCall(h, w, None, y, -100, LogitMap(), "triton")
        rows = _ops.LinearLogprob.apply(
            *head[:3], head[3:], frozenset(_statistics.STATISTICS), True
        )
        sum(r.sum() for r in rows[:5]).backward()
        options = {"label_smoothing": 0.1, "z_loss": 0.1, "ignore_index": -100}
        loss = _ops.CrossEntropy.apply(*head[:3], head[3:], options | {"reduction": reduction})
        loss.backward()


def test_modpo_brings_its_weights_as_numbers() -> None:
    z = torch.zeros(3)
    rewards = torch.arange(6.0).reshape(3, 2)
    with NoWait():
        loss = modpo_loss(
            z,
            z,
            z,
            z,
            rewards,
            0 * rewards,
            weights=(0.5, 0.25, -1.0),
            reduction="none",
            impl="cpu",
        )
    # x = -(0.25 a - b) / 0.5 for rewards (a, b): 2, 3, 4 ... of each row.
    x = -(0.25 * rewards[:, 0] - rewards[:, 1]) / 0.5
    torch.testing.assert_close(loss, torch.nn.functional.softplus(-x))


# -- sums of sequences ---------------------------------------------------------------------------------------


def test_sums_of_sequences_are_no_race_on_cuda() -> None:
    """``index_add`` on CUDA adds by atomics, in the order that they arrive; accumulating ``index_put`` sorts first."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Watch():
        values = torch.empty(6, device="cuda")
        offsets = torch.empty(4, dtype=torch.int64, device="cuda")
        assert _statistics.sequence_sums(values, offsets).shape == (3,)
    assert "index_put" in seen
    assert not any("index_add" in name or "scatter" in name for name in seen)


# -- memory accesses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 8, 16, 773, 776])
@pytest.mark.parametrize("offset", [0, 1])
def test_operands_of_a_tile_have_aligned_rows(width: int, offset: int) -> None:
    tiles = pytest.importorskip("hotloop.kernels.logprob.tiles")
    x = torch.randn(5, width + offset, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = x[:, offset:]
    found = tiles.aligned(x)
    assert found.shape[1] % 16 == found.stride(0) % 16 == found.data_ptr() % 16 == 0
    assert found.stride(1) == 1
    assert torch.equal(found[:, :width], x)
    assert not found[:, width:].any()
    assert (found is x) == (width == 16 and offset == 0)
