"""The registered operators: opcheck, torch.compile against eager, and autocast."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import hotloop.logprob
import pytest
import torch
from hotloop.logprob import (
    forward_kl_distill,
    generalized_jsd_distill,
    linear_cross_entropy,
    linear_distill,
    linear_kl,
    linear_logprob,
    log_cosh_logit_distill,
    token_logprob,
)
from logprob_cases import OPTIONAL, backward, differentiable, make_head, upstream
from torch import Tensor

OPS = torch.ops.hotloop
LOGIT = (0.7, 1.2, 5.0)  # temperature, logit_scale, softcap
PLAIN = (1.0, 1.0, 0.0)


def head_sample(
    n: int, bias: bool, dtype: torch.dtype, ignore: bool, logit: tuple[float, ...]
) -> tuple[Any, ...]:
    h = make_head(n, 4, 9, dtype, bias=bias, ignore=ignore).leaves()
    return (h.hidden, h.weight, h.bias, h.labels, -100, *logit, "cpu")


def logit_sample(n: int, dtype: torch.dtype, logit: tuple[float, ...]) -> tuple[Any, ...]:
    z = torch.randn(n, 9, dtype=torch.float64).to(dtype).requires_grad_()
    return (z, make_head(n, 4, 9).labels, -100, *logit, "cpu")


def two_heads_sample(n: int, kind: str, bias: bool, ignore: bool = True) -> tuple[Any, ...]:
    s, t = (
        make_head(n, 4, 9, bias=bias, ignore=ignore).leaves(),
        make_head(n, 6, 9, bias=bias, seed=1),
    )
    return (
        s.hidden,
        s.weight,
        s.bias,
        t.hidden,
        t.weight,
        t.bias,
        s.labels,
        -100,
        kind,
        0.3,
        2.0,
        [1.5, 1, 0, 1.5, 1, 0],
        "cpu",
    )


def two_logits_sample(n: int, kind: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    s, t = torch.randn(2, n, 9, dtype=torch.float64).to(dtype)
    return (s.requires_grad_(), t, kind, 0.3, 2.0, [1.5, 1.0, 0.0, 1.5, 1.0, 0.0], "cpu")


SAMPLES: dict[str, list[Callable[[], tuple[Any, ...]]]] = {
    "linear_logprob": [
        lambda: head_sample(7, True, torch.float32, True, LOGIT),
        lambda: head_sample(5, False, torch.float64, False, PLAIN),
        lambda: head_sample(0, True, torch.float32, False, PLAIN),
    ],
    "token_logprob": [
        lambda: logit_sample(7, torch.float32, LOGIT),
        lambda: logit_sample(5, torch.float64, PLAIN),
        lambda: logit_sample(0, torch.float32, PLAIN),
    ],
    "linear_divergence": [
        lambda: two_heads_sample(7, "forward_kl", True),
        lambda: two_heads_sample(5, "jsd", False, ignore=False),
        lambda: two_heads_sample(6, "balanced", True),
        lambda: two_heads_sample(6, "log_cosh", False),
        lambda: two_heads_sample(0, "reverse_kl", True),
    ],
    "logit_divergence": [
        lambda: two_logits_sample(7, "forward_kl"),
        lambda: two_logits_sample(5, "jsd", torch.float64),
        lambda: two_logits_sample(6, "balanced"),
        lambda: two_logits_sample(6, "log_cosh"),
        lambda: two_logits_sample(0, "reverse_kl"),
    ],
}


@pytest.mark.parametrize(
    ("name", "index"), [(n, i) for n, made in SAMPLES.items() for i in range(len(made))]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(name: str, index: int) -> None:
    torch.manual_seed(0)
    torch.library.opcheck(getattr(OPS, name).default, SAMPLES[name][index]())


def run_head(call: Callable[..., Any], n: int, ignore: bool, masked: bool = False) -> list[Tensor]:
    head = make_head(n, 4, 37, ignore=ignore).leaves()
    labels = torch.full_like(head.labels, -100) if masked else head.labels
    rows = differentiable(call(head.hidden, head.weight, labels, head.bias))
    return [*rows, *backward(rows, upstream(n), head.tensors())]


def of_head(h: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Any:
    return linear_logprob(h, w, y, bias=b, temperature=0.7, softcap=5.0, statistics=OPTIONAL)


def compiled(
    call: Callable[..., Any], backend: str = "aot_eager", dynamic: bool | None = None
) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(call, fullgraph=True, backend=backend, dynamic=dynamic)


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dynamic", [None, True])
def test_linear_logprob_compiles(dynamic: bool | None) -> None:
    """Masks, then other batch sizes, an empty batch, and a batch of ignored tokens only."""
    call = compiled(of_head, dynamic=dynamic)
    for n, ignore, masked in (
        (12, True, False),
        (12, False, False),
        (20, True, False),
        (0, False, False),
        (5, True, True),
    ):
        assert_all_close(run_head(call, n, ignore, masked), run_head(of_head, n, ignore, masked))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_linear_logprob_compiles_with_inductor() -> None:
    def loss(h: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
        out = linear_logprob(h * 1.0, w, y, bias=b, statistics=("entropy",))
        return (out.logps.exp() * out.entropy).sum()

    call = compiled(loss, "inductor")
    for n in (12, 20):
        results = []
        for f in (call, loss):
            head = make_head(n, 4, 37).leaves()
            value = f(head.hidden, head.weight, head.labels, head.bias)
            results.append([value, *torch.autograd.grad(value, head.tensors())])
        assert_all_close(*results)


def of_logits(z: Tensor, y: Tensor) -> Any:
    return token_logprob(z, y, temperature=0.7, statistics=OPTIONAL)


def test_token_logprob_compiles() -> None:
    call = compiled(of_logits)
    for n in (12, 20, 0):
        results = []
        for f in (call, of_logits):
            z = torch.randn(n, 37, generator=torch.Generator().manual_seed(0), requires_grad=True)
            rows = differentiable(f(z, make_head(n, 4, 37).labels))
            results.append([*rows, *backward(rows, upstream(n), [z])])
        assert_all_close(*results)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_compiles(reduction: str) -> None:
    def loss(h: Tensor, w: Tensor, y: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(
            h, w, y, bias=b, label_smoothing=0.1, z_loss=1e-3, reduction=reduction
        )

    call = compiled(loss)
    for n in (12, 20):
        results = []
        for f in (call, loss):
            head = make_head(n, 4, 37).leaves()
            value = f(head.hidden, head.weight, head.labels, head.bias)
            results.append([value, *torch.autograd.grad(value.sum(), head.tensors())])
        assert_all_close(*results)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "balanced", "log_cosh"])
def test_linear_divergences_compile(kind: str) -> None:
    def loss(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, y: Tensor) -> Tensor:
        return linear_distill(h, w, th, tw, divergence_kind=kind, labels=y, temperature=1.5)

    call = compiled(loss)
    for n in (12, 20):
        results = []
        for f in (call, loss):
            s, t = make_head(n, 4, 37, bias=False).leaves(), make_head(n, 6, 37, seed=1)
            value = f(s.hidden, s.weight, t.hidden, t.weight, s.labels)
            results.append([value, *torch.autograd.grad(value, s.tensors())])
        assert_all_close(*results)


def test_linear_kl_compiles_with_biases() -> None:
    def loss(h: Tensor, w: Tensor, b: Tensor, th: Tensor, tw: Tensor, tb: Tensor) -> Tensor:
        return linear_kl(h, w, th, tw, student_bias=b, teacher_bias=tb)

    results = []
    for f in (compiled(loss), loss):
        s, t = make_head(12, 4, 37).leaves(), make_head(12, 6, 37, seed=1)
        value = f(s.hidden, s.weight, s.bias, t.hidden, t.weight, t.bias)
        results.append([value, *torch.autograd.grad(value, s.tensors())])
    assert_all_close(*results)


@pytest.mark.parametrize(
    "call", [forward_kl_distill, generalized_jsd_distill, log_cosh_logit_distill]
)
def test_logit_divergences_compile(call: Callable[..., Tensor]) -> None:
    """Rows that do not count hold NaN: it must not come out in their gradient."""

    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return call(s, t, labels=y, temperature=1.5)

    made = compiled(loss)
    for n in (12, 20):
        results = []
        for f in (made, loss):
            g = torch.Generator().manual_seed(0)
            s, t = torch.randn(2, n, 37, generator=g)
            labels = make_head(n, 4, 37).labels
            s[labels == -100] = torch.nan
            s.requires_grad_()
            value = f(s, t, labels)
            results.append([value, *torch.autograd.grad(value, s)])
        assert bool(results[0][1].isfinite().all())
        assert_all_close(*results)


def test_a_forced_impl_is_kept_under_compile() -> None:
    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return linear_logprob(h, w, y, impl="reference").logps

    head = make_head(6, 4, 37)
    found = compiled(loss)(head.hidden, head.weight, head.labels)
    torch.testing.assert_close(found, loss(head.hidden, head.weight, head.labels))


# -- autocast ----------------------------------------------------------------------------------------------


def test_autocast_brings_two_dtypes_together() -> None:
    head = make_head(20, 8, 37, bias=False)
    h, w = head.hidden.bfloat16().requires_grad_(), head.weight.requires_grad_()
    with pytest.raises(TypeError, match=r"or use torch\.autocast"):
        linear_logprob(h, w, head.labels)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(h, w, head.labels).logps
    narrow = linear_logprob(h, w.bfloat16(), head.labels).logps
    assert out.dtype == torch.float32
    assert torch.equal(out, narrow)
    dh, dw = torch.autograd.grad(out.sum(), [h, w])
    assert (dh.dtype, dw.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_leaves_inputs_of_one_dtype_alone(inside: bool) -> None:
    """Every product runs in the dtype given, forward and backward, wherever backward is called."""
    head, teacher = make_head(20, 8, 37), make_head(20, 5, 37, seed=1)

    def run(cast: bool, make: Callable[..., Tensor]) -> list[Tensor]:
        h = head.leaves()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = make(h)
            if inside:
                return [loss, *torch.autograd.grad(loss, h.tensors(), allow_unused=True)]
        return [loss, *torch.autograd.grad(loss, h.tensors(), allow_unused=True)]

    for make in (
        lambda h: h.run().logps.sum(),
        lambda h: h.run(linear_cross_entropy),
        lambda h: linear_kl(
            h.hidden, h.weight, teacher.hidden, teacher.weight, labels=h.labels, student_bias=h.bias
        ),
    ):
        torch.testing.assert_close(run(True, make), run(False, make), rtol=0, atol=0)


def test_autocast_under_compile() -> None:
    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return linear_logprob(h, w, y).logps.sum()

    head = make_head(20, 8, 37, bias=False).leaves()
    made = compiled(loss)
    with torch.autocast("cpu", torch.bfloat16):
        value = made(head.hidden, head.weight, head.labels)
    found = [value, *torch.autograd.grad(value, head.tensors())]
    value = loss(head.hidden, head.weight, head.labels)
    assert_all_close(found, [value, *torch.autograd.grad(value, head.tensors())])


def test_every_public_function_is_in_all() -> None:
    assert all(callable(getattr(hotloop.logprob, name)) for name in hotloop.logprob.__all__)
