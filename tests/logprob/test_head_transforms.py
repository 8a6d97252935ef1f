# SPDX-License-Identifier: Apache-2.0
"""torch.func transforms and forward-mode AD: right through the reference, refused by the compiled loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hotloop.logprob import (
    forward_kl_distill,
    linear_cross_entropy,
    linear_kl,
    linear_logprob,
    token_logprob,
)
from hotloop.preference import dpo_loss
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softplus

G = torch.Generator().manual_seed(0)
N, D, V = 4, 5, 7
H = torch.randn(N, D, generator=G, dtype=torch.float64)
W = torch.randn(V, D, generator=G, dtype=torch.float64)
Z = torch.randn(N, V, generator=G, dtype=torch.float64)
Y = torch.randint(0, V, (N,), generator=G)


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = log_softmax(student, -1), log_softmax(teacher, -1)
    return (p.exp() * (p - q)).sum(-1).mean()


# Ours with an impl, the same in plain torch, and where both are evaluated.
CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor], Tensor]] = {
    "linear_cross_entropy": (
        lambda x, **o: linear_cross_entropy(x, W, Y, **o),
        lambda x: cross_entropy(x @ W.T, Y),
        H,
    ),
    "linear_logprob": (
        lambda x, **o: linear_logprob(x, W, Y, **o).logps.sum(),
        lambda x: -cross_entropy(x @ W.T, Y, reduction="sum"),
        H,
    ),
    "token_logprob": (
        lambda x, **o: token_logprob(x, Y, **o).logps.sum(),
        lambda x: -cross_entropy(x, Y, reduction="sum"),
        Z,
    ),
    "linear_kl": (
        lambda x, **o: linear_kl(x, W, H, W, **o),
        lambda x: plain_kl(x @ W.T, H @ W.T),
        H + 0.5,
    ),
    "forward_kl_distill": (
        lambda x, **o: forward_kl_distill(x, Z, **o),
        lambda x: plain_kl(x, Z),
        Z + H[:, :1],
    ),
    "dpo_loss": (
        lambda x, **o: dpo_loss(x, Z[0], Z[1], Z[2], **o),
        lambda x: softplus(-0.1 * ((x - Z[1]) - (Z[0] - Z[2]))).mean(),
        Z[3],
    ),
}


def forward_mode(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        out = f(forward_ad.make_dual(x, x.flip(0)))
        tangent = forward_ad.unpack_dual(out).tangent
        return torch.zeros(()) if tangent is None else tangent.clone()


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.flip(0),))[1],
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, 2 * x, -x))),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(torch.stack((x, -x))),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "forward mode": forward_mode,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CALLS)
def test_the_reference_may_be_transformed(name: str, transform: str) -> None:
    ours, plain, x = CALLS[name]
    apply = TRANSFORMS[transform]
    found = apply(lambda t: ours(t, impl="reference"), x)
    torch.testing.assert_close(found, apply(plain, x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CALLS)
def test_the_compiled_loops_refuse(name: str, transform: str) -> None:
    ours, _, x = CALLS[name]
    mode = "forward-mode AD" if transform == "forward mode" else "a torch.func transform"
    text = rf"^\[{name}\] impl: expected 'reference' inside {mode}.*Pass impl='reference'"
    with pytest.raises(NotImplementedError, match=text):
        TRANSFORMS[transform](ours, x)


def test_labels_may_be_mapped_over_by_the_reference() -> None:
    labels = torch.stack((Y, Y.flip(0)))
    found = torch.func.vmap(lambda y: linear_cross_entropy(H, W, y, impl="reference"))(labels)
    expected = torch.stack([cross_entropy(H @ W.T, y) for y in labels])
    torch.testing.assert_close(found, expected)


def test_a_level_of_forward_mode_without_tangents_is_no_obstacle() -> None:
    with forward_ad.dual_level():
        found = linear_cross_entropy(H, W, Y)
    torch.testing.assert_close(found, cross_entropy(H @ W.T, Y))


# -- autocast and float64 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", ["hidden", "weight"])
@pytest.mark.parametrize(
    "call",
    [
        lambda h, w: linear_cross_entropy(h, w, Y),
        lambda h, w: linear_logprob(h, w, Y),
        lambda h, w: linear_kl(h, w, H.float(), W.float()),
        lambda h, w: linear_kl(H.float(), W.float(), h, w),
    ],
    ids=["cross_entropy", "logprob", "student", "teacher"],
)
def test_autocast_does_not_narrow_float64(call: Callable[..., Any], wide: str) -> None:
    """As torch: a product of float64 and float32 is refused under autocast too."""
    h, w = (H, W.float()) if wide == "hidden" else (H.float(), W)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError):
            torch.nn.functional.linear(h, w)
        with pytest.raises(TypeError, match="autocast leaves float64 alone"):
            call(h, w)
