# SPDX-License-Identifier: Apache-2.0
"""Backward more than once over one graph: what is handed out as a gradient belongs to whoever gets it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hotloop.logprob import (
    forward_kl_distill,
    generalized_jsd_distill,
    linear_cross_entropy,
    linear_distill,
    linear_kl,
    linear_logprob,
    token_logprob,
)
from hotloop.preference import dpo_loss, orpo_loss
from logprob_cases import make_head
from torch import Tensor

N, D, V = 6, 3, 11
TEACHER = make_head(N, 4, V, seed=1, bias=False)
HEAD = make_head(N, D, V)
OFFSETS = torch.tensor([0, 2, 6])


def pair(*inputs: Tensor) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(N, generator=g).to(x.dtype) for x in inputs]


def head_operator(h: Tensor, w: Tensor) -> Tensor:
    out = torch.ops.hotloop.linear_logprob(h, w, None, HEAD.labels, -100, 1.0, 1.0, 0.0, "cpu")[0]
    return (out * torch.arange(1, 6).unsqueeze(1)).sum()


NUMBERS = [1.5, 1.0, 0.0, 1.5, 1.0, 0.0]
WITH_HEAD: dict[str, Callable[..., Tensor]] = {
    "linear_cross_entropy": lambda h, w: linear_cross_entropy(h, w, HEAD.labels),
    "linear_cross_entropy sum": lambda h, w: linear_cross_entropy(h, w, HEAD.labels, reduction="sum"),
    "linear_logprob": lambda h, w: linear_logprob(h, w, HEAD.labels).logps.sum(),
    "linear_logprob of sequences": lambda h, w: (
        linear_logprob(h, w, HEAD.labels, cu_seqlens=OFFSETS).logps.sum()
    ),
    "linear_kl": lambda h, w: linear_kl(h, w, TEACHER.hidden, TEACHER.weight),
    "linear_distill": lambda h, w: linear_distill(
        h, w, TEACHER.hidden, TEACHER.weight, divergence_kind="log_cosh", labels=HEAD.labels
    ),
    "hotloop::linear_logprob": head_operator,
    "hotloop::linear_divergence": lambda h, w: torch.ops.hotloop.linear_divergence(
        h, w, None, TEACHER.hidden, TEACHER.weight, None, HEAD.labels, -100, "jsd", 0.3, 2.0, NUMBERS, "cpu"
    )[0].sum(),
}  # fmt: skip
Z = HEAD.hidden @ HEAD.weight.t()
ZT = TEACHER.hidden @ TEACHER.weight.t()
WITH_LOGITS: dict[str, Callable[..., Tensor]] = {
    "token_logprob": lambda z: token_logprob(z, HEAD.labels).logps.sum(),
    "forward_kl_distill": lambda z: forward_kl_distill(z, ZT),
    "generalized_jsd_distill": lambda z: generalized_jsd_distill(z, ZT, labels=HEAD.labels),
    "hotloop::token_logprob": lambda z: torch.ops.hotloop.token_logprob(
        z, HEAD.labels, -100, 1.0, 1.0, 0.0, "cpu"
    )[0].sum(),
    "hotloop::logit_divergence": lambda z: torch.ops.hotloop.logit_divergence(
        z, ZT, "jsd", 0.3, 2.0, NUMBERS, "cpu"
    )[0].sum(),
}  # fmt: skip
REFERENCE = torch.linspace(-1.0, 1.0, N)
OF_PAIRS: dict[str, Callable[..., Tensor]] = {
    "dpo_loss": lambda a, b: dpo_loss(a, b, REFERENCE, -REFERENCE),
    "dpo_loss sum": lambda a, b: dpo_loss(a, b, REFERENCE, -REFERENCE, reduction="sum"),
    "dpo_loss none": lambda a, b: dpo_loss(a, b, REFERENCE, -REFERENCE, reduction="none").sum(),
    "orpo_loss": lambda a, b: orpo_loss(-a.exp(), -b.exp(), torch.ones(N)),
    "hotloop::pointwise": lambda a, b: torch.ops.hotloop.pointwise(
        [a, b], [REFERENCE, -REFERENCE], "preference.dpo", [0.1], "mean", [], 1, None, None, -1
    )[0],
}


def made(
    name: str, dtype: torch.dtype = torch.float32
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    if name in WITH_HEAD:
        call, given = WITH_HEAD[name], [HEAD.hidden, HEAD.weight]
    elif name in WITH_LOGITS:
        call, given = WITH_LOGITS[name], [Z]
    else:
        call, given = OF_PAIRS[name], [torch.linspace(-2, -1, N), torch.linspace(-1, -3, N)]
    return call, [x.detach().clone().to(dtype).requires_grad_() for x in given]


NAMES = [*WITH_HEAD, *WITH_LOGITS, *OF_PAIRS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_three_backwards_of_a_retained_graph(dtype: torch.dtype) -> None:
    h, w = (torch.eye(2, dtype=dtype, requires_grad=True) for _ in range(2))
    loss = linear_cross_entropy(h, w, torch.tensor([0, 1]))
    # softmax(1, 0) = .7311, .2689; the gradient of h[0, 0] is (.7311 - 1) / 2 for each of two columns of W.
    for k, expected in ((1, 0.13447), (2, 0.26894), (3, 0.40341)):
        loss.backward(retain_graph=True)
        assert h.grad is not None
        assert w.grad is not None
        found = [-float(h.grad[0, 0]), float(h.grad[0, 1]), -float(w.grad[1, 1])]
        assert found == pytest.approx([expected] * 3, rel=2e-3), k


@pytest.mark.parametrize("name", NAMES)
def test_gradients_add_up(name: str) -> None:
    call, inputs = made(name)
    loss = call(*inputs)
    once = torch.autograd.grad(call(*inputs), inputs)
    for k in (1, 2, 3, 4):
        loss.backward(retain_graph=k < 4)
        for x, g in zip(inputs, once):
            torch.testing.assert_close(x.grad, k * g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hidden_from_autograd", [False, True])
def test_gradients_that_were_edited(name: str, hidden_from_autograd: bool) -> None:
    """As optimizers and clipping do: in place, and through ``.data``, which no version counter sees."""
    call, inputs = made(name)
    loss = call(*inputs)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        (g.data if hidden_from_autograd else g).fill_(7.0)
    for retain in (True, False):
        again = torch.autograd.grad(loss, inputs, retain_graph=retain)
        torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_spent_graph_says_so(name: str) -> None:
    call, inputs = made(name)
    loss = call(*inputs)
    torch.autograd.grad(loss, inputs)
    with pytest.raises(RuntimeError, match=r"second time"):
        torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_kl", "linear_logprob"])
def test_two_threads_over_one_graph(name: str) -> None:
    """One of them gets the tiles, the other computes them again."""
    call, inputs = made(name)
    expected = torch.autograd.grad(call(*inputs), inputs)
    for _ in range(20):
        loss = call(*inputs)
        found: list[Any] = []
        workers = [
            threading.Thread(
                target=lambda loss=loss, found=found: found.append(
                    torch.autograd.grad(loss, inputs, retain_graph=True)
                )
            )
            for _ in range(2)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(found) == 2
        for grads in found:
            torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_dropped_loss_leaves_nothing_behind(name: str) -> None:
    """Without a cycle that waits for the collector: what forward kept may be a workspace of megabytes."""
    call, inputs = made(name)
    gc.collect()
    gc.disable()
    try:
        copy = [x * 1.0 for x in inputs]
        watched = [weakref.ref(x) for x in copy]
        loss = call(*copy)
        assert loss.requires_grad
        del loss, copy
        assert all(ref() is None for ref in watched)
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("op", [linear_kl, linear_distill])
def test_a_teacher_changed_in_place_is_noticed(what: str, op: Callable[..., Tensor]) -> None:
    if what == "bias" and op is linear_distill:
        return
    _, (h, w) = made("linear_kl")
    teacher = {
        "hidden": TEACHER.hidden.clone(),
        "weight": TEACHER.weight.clone(),
        "bias": torch.zeros(V),
    }
    options = {"teacher_bias": teacher["bias"]} if op is linear_kl else {}
    loss = op(h, w, teacher["hidden"], teacher["weight"], **options)
    teacher[what].add_(1.0)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()
