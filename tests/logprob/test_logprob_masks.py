# SPDX-License-Identifier: Apache-2.0
"""Ignored tokens: they count for nothing, reach no product, and poison nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hotloop.logprob import linear_cross_entropy, linear_kl, linear_logprob, token_logprob
from logprob_cases import OPTIONAL, LmHead, by_dtype, by_impl, check, make_head, ours
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class ProductRows(TorchDispatchMode):
    """Sums up the rows of hidden states that take part in matrix products."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.forward, self.weight_gradient, self.nan = vocabulary, 0, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.nan |= bool(a.isnan().any() or b.isnan().any())
            if b.shape[1] == self.vocabulary:
                self.forward += a.shape[0]
            elif a.shape[0] == self.vocabulary:
                self.weight_gradient += a.shape[1]
        return func(*args, **(kwargs or {}))


def poisoned(head: LmHead) -> LmHead:
    """NaN hidden states in every ignored row."""
    hidden = torch.where((head.labels == -100).unsqueeze(1), torch.nan, head.hidden)
    return LmHead(hidden, head.weight, head.bias, head.labels)


@by_impl
@by_dtype
def test_nan_in_ignored_rows_poisons_nothing(dtype: torch.dtype, impl: str) -> None:
    head = make_head(20, 8, 37, dtype)
    clean, dirty = (ours(h, impl=impl) for h in (head, poisoned(head)))
    torch.testing.assert_close(
        [*clean[0], *clean[1], clean[2]], [*dirty[0], *dirty[1], dirty[2]], rtol=0, atol=0
    )
    ignored = head.labels == -100
    for row in dirty[0]:
        assert not row[ignored].any()
    assert not dirty[1][0][ignored].any()
    assert not dirty[2][ignored].any()


def test_ignored_rows_never_reach_a_product() -> None:
    head = poisoned(make_head(20, 8, 37)).leaves()
    with ProductRows(37) as seen:
        out = head.run()
        assert seen.forward == int((head.labels != -100).sum()) == 13
        out.logps.sum().backward()
    assert seen.weight_gradient == 13
    assert not seen.nan


@by_impl
def test_nan_in_ignored_rows_of_the_other_ops(impl: str) -> None:
    head = poisoned(make_head(20, 8, 37)).leaves()
    teacher = poisoned(make_head(20, 5, 37, seed=1))
    losses = (
        head.run(linear_cross_entropy, z_loss=0.1, impl=impl),
        head.run(linear_cross_entropy, reduction="none", impl=impl).sum(),
        linear_kl(
            head.hidden, head.weight, teacher.hidden, teacher.weight, labels=head.labels, impl=impl
        ),
    )
    for loss in losses:
        assert bool(loss.isfinite())
        for g in torch.autograd.grad(loss, head.tensors(), allow_unused=True):
            assert g is None or bool(g.isfinite().all())
    z = torch.where(
        (head.labels == -100).unsqueeze(1), torch.nan, torch.randn(20, 37)
    ).requires_grad_()
    out = token_logprob(z, head.labels, statistics=OPTIONAL, impl=impl)
    assert all(bool(r.isfinite().all()) for r in out if r is not None)
    assert bool(torch.autograd.grad(out.logps.sum() + out.entropy.sum(), z)[0].isfinite().all())


def test_nan_from_above_does_not_enter_through_an_ignored_row() -> None:
    """A loss that divides by a masked length of 0 sends NaN back to the tokens it ignores."""
    head = make_head(20, 8, 37).leaves()
    ignored = head.labels == -100
    out = head.run()
    for g in torch.autograd.grad(out.logps, head.tensors(), torch.where(ignored, torch.nan, 1.0)):
        assert bool(g.isfinite().all())
    z = torch.randn(20, 37, requires_grad=True)
    (g,) = torch.autograd.grad(
        token_logprob(z, head.labels).logps, z, torch.where(ignored, torch.nan, 1.0)
    )
    assert bool(g.isfinite().all())


@by_impl
def test_all_labels_ignored(impl: str) -> None:
    head = make_head(6, 4, 9)
    rows, grads, hit = ours(head.with_labels(torch.full((6,), -100)), impl=impl)
    for x in (*rows, *grads, hit):
        assert not x.any()
    # As torch: the mean over no token is NaN, its gradient is 0; the sum is 0.
    h = head.leaves()
    mean = linear_cross_entropy(h.hidden, h.weight, torch.full((6,), -100), impl=impl)
    assert bool(mean.isnan())
    if impl == "cpu":
        assert not any(g.any() for g in torch.autograd.grad(mean, [h.hidden, h.weight]))
    assert (
        linear_cross_entropy(h.hidden, h.weight, torch.full((6,), -100), reduction="sum", impl=impl)
        == 0
    )


@by_impl
@pytest.mark.parametrize("ignore_index", [-1, 0, 5, 2**40])
def test_other_values_of_ignore_index(ignore_index: int, impl: str) -> None:
    """Also a label that exists: index 0 is the padding token of many tokenizers."""
    head = make_head(20, 8, 9, ignore=False)
    labels = head.labels.clone()
    labels[::4] = ignore_index
    check(head.with_labels(labels), impl=impl, ignore_index=ignore_index)


@by_impl
def test_cu_seqlens_sums_over_sequences(impl: str) -> None:
    """Empty sequences first, in the middle and last; the second holds only ignored tokens."""
    head = make_head(20, 8, 37)
    labels = head.labels.clone()
    labels[3:5] = -100
    offsets = torch.tensor([0, 0, 3, 5, 5, 17, 20, 20])
    h = head.leaves()
    rows = linear_logprob(h.hidden, h.weight, labels, statistics=OPTIONAL, impl=impl)
    for cu_seqlens in (offsets, offsets.int()):
        sums = linear_logprob(
            h.hidden, h.weight, labels, statistics=OPTIONAL, cu_seqlens=cu_seqlens, impl=impl
        )
        for row, total in zip(rows, sums):
            assert row is not None
            assert total is not None
            assert total.shape == (7,)
            expected = torch.stack([row[a:b].sum() for a, b in pairwise(offsets)])
            torch.testing.assert_close(total, expected)
        assert sums.argmax_hit is not None
        assert sums.argmax_hit.dtype == torch.int64
    weights = torch.randn(7)
    found = torch.autograd.grad((sums.logps * weights).sum(), [h.hidden, h.weight])
    token_weights = weights.repeat_interleave(offsets.diff())
    expected_grads = torch.autograd.grad((rows.logps * token_weights).sum(), [h.hidden, h.weight])
    torch.testing.assert_close(found, expected_grads)


def test_cu_seqlens_of_no_sequence_and_of_no_token() -> None:
    w = torch.randn(5, 3)
    none = torch.zeros(0, dtype=torch.int64)
    assert linear_logprob(torch.zeros(0, 3), w, none, cu_seqlens=torch.tensor([0])).logps.shape == (
        0,
    )
    empty = linear_logprob(torch.zeros(0, 3), w, none, cu_seqlens=torch.tensor([0, 0, 0])).logps
    assert empty.tolist() == [0.0, 0.0]


def test_no_grad_and_inference_mode() -> None:
    head = make_head(20, 8, 37).leaves()
    expected = linear_logprob(head.hidden, head.weight, head.labels).logps
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out: Tensor = linear_logprob(head.hidden, head.weight, head.labels).logps
            assert not out.requires_grad
            assert torch.equal(out, expected)
            loss = linear_cross_entropy(head.hidden, head.weight, head.labels)
            torch.testing.assert_close(loss, -expected.sum() / (head.labels != -100).sum())


@by_impl
@pytest.mark.parametrize("compiled", [False, True])
def test_a_masked_row_is_no_hit_whatever_its_label_is(impl: str, compiled: bool) -> None:
    """-1 is a usual ignore_index, and inside the head the argmax of a row that was left out."""
    torch._dynamo.reset()
    hidden, weight = torch.eye(3), torch.eye(3)
    labels = torch.tensor([0, -1, 1])

    def hits(hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
        wanted: Any = {"statistics": ("argmax_hit",), "ignore_index": -1, "impl": impl}
        head = linear_logprob(hidden, weight, labels, **wanted)
        return head.argmax_hit, token_logprob(hidden @ weight.T, labels, **wanted).argmax_hit

    run = torch.compile(hits, backend="aot_eager", fullgraph=True) if compiled else hits
    for hit in run(hidden):
        assert hit is not None
        assert hit.tolist() == [True, False, False]
    packed = linear_logprob(
        hidden, weight, labels, ignore_index=-1, statistics=("argmax_hit",),
        cu_seqlens=torch.tensor([0, 3]), impl=impl,
    )  # fmt: skip
    assert packed.argmax_hit is not None
    assert packed.argmax_hit.tolist() == [1]
