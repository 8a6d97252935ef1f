# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of a head against torch.nn.functional.cross_entropy."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_no_worse_than_torch, value_and_gradients
from hotloop.front import impl as _impl
from hotloop.logprob import linear_cross_entropy
from logprob_cases import EPS, LmHead, by_dtype, by_impl, make_head
from torch import Tensor
from torch.nn.functional import cross_entropy

by_reduction = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])


def ours(head: LmHead, **options: object) -> list[Tensor]:
    h = head.leaves()
    return value_and_gradients(h.run(linear_cross_entropy, **options), h.tensors())


def torchs(
    head: LmHead, *, z_loss: float = 0.0, reduction: str = "mean", **options: object
) -> list[Tensor]:
    h = head.leaves()
    wide = torch.float64 if h.weight.dtype == torch.float64 else torch.float32
    z = (h.hidden @ h.weight.t()).to(wide)
    z = z if h.bias is None else z + h.bias.to(wide)
    loss = cross_entropy(z, h.labels, reduction=reduction, **options)
    if z_loss:
        valid = h.labels != options.get("ignore_index", -100)
        extra = torch.where(valid, z_loss * z.logsumexp(1) ** 2, 0.0)
        loss = (
            loss + {"none": extra, "sum": extra.sum(), "mean": extra.sum() / valid.sum()}[reduction]
        )
    return value_and_gradients(loss, h.tensors())


@by_dtype
@by_reduction
@by_impl
def test_no_worse_than_torch(impl: str, reduction: str, dtype: torch.dtype) -> None:
    # One token; a few; a block, with ignored ones. One class; fewer than a vector; more than a tile.
    for n, vocabulary in ((1, 7), (7, 1), (7, 513), (64, 1031)):
        head = make_head(n, 8, vocabulary, dtype)
        for options in (
            {},
            {"label_smoothing": 0.2},
            {"z_loss": 0.05},
            {"label_smoothing": 0.1, "z_loss": 0.01},
        ):
            options = {"reduction": reduction, **options}
            found = ours(head, impl=impl, **options)
            assert _impl.last_impl("linear_cross_entropy") == impl
            other, truth = torchs(head, **options), torchs(head.to(torch.float64), **options)
            assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            half = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
            for k, (a, b, c) in enumerate(zip(found, other, truth)):
                size = float(c.abs().max())
                # k = 3 where half types round: torch adds the gradients of its two terms before it rounds.
                assert_no_worse_than_torch(
                    a,
                    b,
                    c,
                    3.0 if half else 2.0,
                    EPS[dtype] * 2 + (half if k else 0),
                    floor=max(size, 0.1),
                )


@by_impl
def test_scalar_gradient_from_above_and_none(impl: str) -> None:
    head = make_head(12, 4, 20).leaves()
    loss = head.run(linear_cross_entropy, impl=impl)
    one = torch.autograd.grad(loss, head.tensors(), retain_graph=True)
    scaled = torch.autograd.grad(loss, head.tensors(), torch.tensor(-2.5))
    for a, b in zip(one, scaled):
        torch.testing.assert_close(-2.5 * a, b)


@by_impl
@pytest.mark.parametrize("subset", range(1, 8))
def test_any_subset_of_inputs_may_require_grad(subset: int, impl: str) -> None:
    head = make_head(12, 4, 20)
    whole = ours(head, impl=impl)[1:]
    h = head.leaves()
    for k, x in enumerate(h.tensors()):
        x.requires_grad_(bool(subset >> k & 1))
    loss = h.run(linear_cross_entropy, impl=impl)
    needed = [x for x in h.tensors() if x.requires_grad]
    expected = [g for g, x in zip(whole, h.tensors()) if x.requires_grad]
    for a, b in zip(torch.autograd.grad(0.5 * loss, needed), expected):
        torch.testing.assert_close(a, b)


@by_impl
@by_reduction
def test_ignore_index_and_shapes(reduction: str, impl: str) -> None:
    head = make_head(24, 4, 20, ignore=False)
    labels = head.labels.clone()
    labels[::5] = 3
    expected = torchs(head.with_labels(labels), reduction=reduction, ignore_index=3)[0]
    found = linear_cross_entropy(
        head.hidden.reshape(4, 6, 4), head.weight, labels.reshape(4, 6), bias=head.bias, reduction=reduction,
        ignore_index=3, impl=impl,
    )  # fmt: skip
    assert found.shape == ((4, 6) if reduction == "none" else ())
    torch.testing.assert_close(found.reshape(expected.shape), expected)


@by_impl
@by_reduction
def test_no_tokens(reduction: str, impl: str) -> None:
    h, w = torch.zeros(0, 4, requires_grad=True), torch.ones(5, 4, requires_grad=True)
    y = torch.zeros(0, dtype=torch.int64)
    found = linear_cross_entropy(h, w, y, reduction=reduction, impl=impl)
    expected = cross_entropy(h @ w.t(), y, reduction=reduction)
    torch.testing.assert_close(found, expected, equal_nan=True)
    if reduction == "sum":
        assert not torch.autograd.grad(found, w)[0].any()


@by_impl
def test_softcap_and_scale(impl: str) -> None:
    head = make_head(12, 4, 20, torch.float64)
    h = head.leaves()
    z = 3 * torch.tanh(0.5 * (h.hidden @ h.weight.t() + h.bias) / 3)
    expected = value_and_gradients(cross_entropy(z, h.labels), h.tensors())
    found = ours(head, softcap=3.0, logit_scale=0.5, impl=impl)
    torch.testing.assert_close(found, expected)
