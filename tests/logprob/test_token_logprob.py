# SPDX-License-Identifier: Apache-2.0
"""The same statistics from logits that exist already."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_no_worse_than_torch, misaligned, strided
from hotloop.front import impl as _impl
from hotloop.logprob import bonsai_synthesis_loss, linear_logprob, token_logprob
from hotloop.reference import logprob as reference
from logprob_cases import (
    DIFFERENTIABLE,
    EPS,
    OPTIONAL,
    backward,
    by_dtype,
    by_impl,
    differentiable,
    upstream,
)
from torch import Tensor


def make(n: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + vocabulary)
    logits = (2 * torch.randn(n, vocabulary, generator=g, dtype=torch.float64)).to(dtype)
    labels = torch.randint(0, vocabulary, (n,), generator=g)
    if n > 1:
        labels[::3] = -100
    return logits, labels


def run(logits: Tensor, labels: Tensor, **options: object) -> tuple[list[Tensor], Tensor]:
    leaf = logits.detach().requires_grad_()
    rows = differentiable(token_logprob(leaf, labels, statistics=OPTIONAL, **options))
    return rows, backward(rows, upstream(labels.numel()), [leaf])[0]


def plain(logits: Tensor, labels: Tensor, **options: float | None) -> tuple[list[Tensor], Tensor]:
    leaf = logits.detach().requires_grad_()
    found = reference.statistics(reference.map_logits(leaf, **options), labels)
    rows = [found[name] for name in DIFFERENTIABLE]
    return rows, backward(rows, upstream(labels.numel()), [leaf])[0]


# Rows: none, one, some. Vocabulary: one class; less than a vector; a chunk of 1024 less one, whole, and one more;
# two chunks and a prime rest.
@by_dtype
@by_impl
@pytest.mark.parametrize("vocabulary", [1, 7, 1023, 1024, 1025, 2053])
def test_no_worse_than_torch(vocabulary: int, impl: str, dtype: torch.dtype) -> None:
    for n in (0, 1, 7, 33):
        logits, labels = make(n, vocabulary, dtype)
        for options in ({}, {"temperature": 0.7, "logit_scale": 1.3, "softcap": 4.0}):
            rows, grad = run(logits, labels, impl=impl, **options)
            assert _impl.last_impl("token_logprob") == impl
            other_rows, other_grad = plain(logits, labels, **options)
            true_rows, true_grad = plain(logits.double(), labels, **options)
            size = max([1.0, *true_rows[2].detach().abs().tolist()])
            for name, a, b, c in zip(DIFFERENTIABLE, rows, other_rows, true_rows):
                assert_no_worse_than_torch(
                    a, b, c.detach(), 2, EPS[dtype], size if name == "entropy" else 1.0
                )
            eps = EPS[dtype] * size + (torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0)
            assert grad.dtype == dtype
            assert_no_worse_than_torch(grad, other_grad, true_grad, 2, eps)


@by_dtype
@pytest.mark.parametrize(
    "case", ["strided", "transposed", "sliced", "misaligned", "expanded", "batch"]
)
def test_layouts(case: str, dtype: torch.dtype) -> None:
    logits, labels = make(12, 40, dtype)
    if case == "expanded":
        logits = logits[1:2].expand(12, 40).contiguous()
    rows, grad = run(logits, labels)
    shape = (3, 4, 40) if case == "batch" else (12, 40)
    changed = {
        "strided": lambda: strided(logits),
        "transposed": lambda: logits.t().contiguous().t(),
        "sliced": lambda: torch.nn.functional.pad(logits, (3, 2))[:, 3:-2],
        "misaligned": lambda: misaligned(logits),
        "expanded": lambda: logits[:1].expand(12, 40),
        "batch": lambda: logits.reshape(shape),
    }[case]()
    before = changed.clone()
    again, found = run(changed, labels.reshape(shape[:-1]))
    assert torch.equal(changed, before)  # the gradient is written elsewhere
    for a, b in zip(again, rows):
        assert torch.equal(a.reshape(-1), b)
    assert torch.equal(found.reshape(12, 40), grad)


@by_impl
def test_equal_to_the_fused_head(impl: str) -> None:
    g = torch.Generator().manual_seed(0)
    h, w = torch.randn(9, 5, generator=g), torch.randn(37, 5, generator=g)
    y = torch.randint(0, 37, (9,), generator=g)
    a = linear_logprob(h, w, y, statistics=OPTIONAL, softcap=3.0, temperature=0.5, impl=impl)
    b = token_logprob(h @ w.t(), y, statistics=OPTIONAL, softcap=3.0, temperature=0.5, impl=impl)
    for x, z in zip(a, b):
        torch.testing.assert_close(x, z)


@by_impl
def test_second_backward_and_no_grad(impl: str) -> None:
    logits, labels = make(9, 40, torch.float32)
    leaf = logits.requires_grad_()
    out = token_logprob(leaf, labels, impl=impl).logps
    first, second = (torch.autograd.grad(out.sum(), leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with torch.no_grad():
        assert not token_logprob(leaf, labels, impl=impl).logps.requires_grad


@by_impl
def test_gradcheck(impl: str) -> None:
    logits, labels = make(4, 6, torch.float64)

    def call(z: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            differentiable(
                token_logprob(z, labels, statistics=OPTIONAL, temperature=0.6, impl=impl)
            )
        )

    assert torch.autograd.gradcheck(call, [logits.requires_grad_()])


@by_impl
def test_bonsai_is_cross_entropy_per_head(impl: str) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 8, 5, generator=g, requires_grad=True)
    labels = torch.randint(0, 5, (3, 8), generator=g)
    labels[1, :3] = -100
    heads = [torch.nn.functional.cross_entropy(z, y) for z, y in zip(logits, labels)]
    loss = bonsai_synthesis_loss(logits, labels, impl=impl)
    torch.testing.assert_close(loss, sum(heads))
    for a, b in zip(torch.autograd.grad(loss, logits), torch.autograd.grad(sum(heads), logits)):
        torch.testing.assert_close(a, b)
    total = bonsai_synthesis_loss(logits, labels, reduction="sum", impl=impl)
    terms = bonsai_synthesis_loss(logits, labels, reduction="none", impl=impl)
    assert terms.shape == (3, 8)
    torch.testing.assert_close(total, terms.sum())
    # One head: plain hard-label distillation. Swapping heads changes nothing.
    torch.testing.assert_close(bonsai_synthesis_loss(logits[:1], labels[:1], impl=impl), heads[0])
    torch.testing.assert_close(
        bonsai_synthesis_loss(logits.flip(0), labels.flip(0), impl=impl), loss
    )
