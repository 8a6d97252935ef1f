# SPDX-License-Identifier: Apache-2.0
"""Divergences between two distributions: values and gradients, limits, laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_no_worse_than_torch, value_and_gradients
from hotloop.front import impl as _impl
from hotloop.logprob import (
    balanced_divergence_kd,
    forward_kl_distill,
    generalized_jsd_distill,
    linear_distill,
    linear_jsd,
    linear_kl,
    log_cosh_logit_distill,
    reverse_kl_distill,
)
from logprob_cases import EPS, LmHead, by_dtype, by_impl, make_head
from torch import Tensor
from torch.nn.functional import kl_div

KINDS = ("forward_kl", "reverse_kl", "jsd", "balanced", "log_cosh")
OF_LOGITS: dict[str, Callable[..., Tensor]] = {
    "forward_kl": lambda *a, **k: forward_kl_distill(*a, scale_by_temperature=False, **k),
    "reverse_kl": reverse_kl_distill,
    "jsd": lambda *a, **k: generalized_jsd_distill(*a, beta=0.3, **k),
    "balanced": balanced_divergence_kd,
    "log_cosh": log_cosh_logit_distill,
}
by_kind = pytest.mark.parametrize("kind", KINDS)


def gaussians(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return (2 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(dtype)


def oracle(
    kind: str, student: Tensor, teacher: Tensor, temperature: float, beta: float = 0.3
) -> Tensor:
    """Rows by the textbook, from torch's own kl_div."""
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    s, t = student.to(wide) / temperature, teacher.to(wide) / temperature
    q, p = s.log_softmax(-1), t.log_softmax(-1)
    if kind == "log_cosh":
        return temperature**2 * torch.log(torch.cosh((s - t) / 2)).sum(-1)
    forward = kl_div(q, p, reduction="none", log_target=True).sum(-1)
    reverse = kl_div(p, q, reduction="none", log_target=True).sum(-1)
    if kind == "balanced":
        student_entropy, teacher_entropy = (-(x.exp() * x).sum(-1) for x in (q, p))
        sharper = student_entropy < teacher_entropy
        return temperature**2 * torch.where(sharper, 2 * forward + reverse, forward + 2 * reverse)
    if kind == "jsd":
        m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        parts = [kl_div(m, x, reduction="none", log_target=True).sum(-1) for x in (p, q)]
        return beta * parts[0] + (1 - beta) * parts[1]
    return forward if kind == "forward_kl" else reverse


def assert_close(
    found: list[Tensor], other: list[Tensor], truth: list[Tensor], dtype: torch.dtype, size: float
) -> None:
    """``size``: of the logits. A divergence is a difference of log-sum-exps, each rounded at its own size."""
    for k, (a, b, c) in enumerate(zip(found, other, truth)):
        largest = float(c.abs().max()) if c.numel() else 0.0
        half = torch.finfo(dtype).eps / 2 if k and dtype.itemsize == 2 else 0.0
        assert_no_worse_than_torch(a, b, c, 2, EPS[dtype] * size + half, floor=max(largest, 0.1))


# Rows: none, one, a few. Classes: one; fewer than a vector; a chunk and one more; two chunks and a prime rest.
@by_dtype
@by_kind
@by_impl
def test_given_logits(impl: str, kind: str, dtype: torch.dtype) -> None:
    for n, vocabulary in ((0, 7), (1, 1), (7, 7), (5, 1025), (3, 2053)):
        for temperature in (1.0, 2.5):
            s, t = (
                gaussians(n, vocabulary, dtype=dtype),
                gaussians(n, vocabulary, seed=1, dtype=dtype),
            )
            leaf = s.clone().requires_grad_()
            rows = OF_LOGITS[kind](leaf, t, temperature=temperature, reduction="none", impl=impl)
            found = value_and_gradients(rows, [leaf])
            leaf = s.clone().requires_grad_()
            other = value_and_gradients(oracle(kind, leaf, t, temperature), [leaf])
            leaf = s.double().requires_grad_()
            truth = value_and_gradients(oracle(kind, leaf, t.double(), temperature), [leaf])
            assert_close(found, other, truth, dtype, size=10.0)


@by_dtype
@by_kind
@by_impl
@pytest.mark.usefixtures("small_tiles")
def test_two_heads(impl: str, kind: str, dtype: torch.dtype) -> None:
    """The widths of student and teacher differ. Columns: one; a tile and one more; two tiles and a rest."""
    for n, vocabulary in ((0, 7), (1, 1), (7, 513), (20, 1031)):
        student, teacher = (
            make_head(n, 8, vocabulary, dtype),
            make_head(n, 5, vocabulary, dtype, seed=1),
        )

        def plain(s: LmHead, t: LmHead) -> list[Tensor]:
            wide = torch.float64 if s.weight.dtype == torch.float64 else torch.float32
            zs, zt = (h.hidden @ h.weight.t() for h in (s, t))
            rows = oracle(kind, zs.to(wide), zt.to(wide), 1.5)
            return value_and_gradients(
                torch.where(s.labels != -100, rows, 0.0), [s.hidden, s.weight]
            )

        s = student.leaves()
        rows = linear_distill(
            s.hidden, s.weight, teacher.hidden, teacher.weight, divergence_kind=kind, labels=s.labels, beta=0.3,
            temperature=1.5, reduction="none", impl=impl,
        )  # fmt: skip
        assert _impl.last_impl("linear_distill") == impl
        found = value_and_gradients(rows, [s.hidden, s.weight])
        truth = plain(student.to(torch.float64).leaves(), teacher.to(torch.float64))
        assert_close(found, plain(student.leaves(), teacher), truth, dtype, size=20.0)


@by_impl
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_biases_shapes_and_reductions(reduction: str, impl: str) -> None:
    s, t = make_head(24, 4, 30, torch.float64).leaves(), make_head(24, 6, 30, torch.float64, seed=1)
    for name, call, options in (
        ("forward_kl", linear_kl, {}),
        ("reverse_kl", linear_kl, {"direction": "reverse"}),
        ("jsd", linear_jsd, {"beta": 0.3}),
    ):
        found = call(
            s.hidden.reshape(4, 6, 4), s.weight, t.hidden.reshape(4, 6, 6), t.weight, student_bias=s.bias,
            teacher_bias=t.bias, labels=s.labels.reshape(4, 6), temperature=0.8, reduction=reduction, impl=impl,
            **options,
        )  # fmt: skip
        zs, zt = (h.hidden @ h.weight.t() + h.bias for h in (s, t))
        rows = torch.where(s.labels != -100, oracle(name, zs, zt, 0.8), 0.0)
        count = (s.labels != -100).sum()
        expected = {"none": rows.reshape(4, 6), "sum": rows.sum(), "mean": rows.sum() / count}[
            reduction
        ]
        torch.testing.assert_close(found, expected)
        grads = [torch.autograd.grad(x.sum(), s.tensors()) for x in (found, expected)]
        torch.testing.assert_close(*grads)


@by_impl
@by_kind
def test_zero_with_zero_gradient_where_student_and_teacher_agree(kind: str, impl: str) -> None:
    s = gaussians(6, 300, dtype=torch.float32).requires_grad_()
    loss = OF_LOGITS[kind](s, s.detach().clone(), reduction="sum", impl=impl)
    assert abs(loss.item()) < 1e-4
    assert float(torch.autograd.grad(loss, s)[0].abs().max()) < 1e-6


@by_impl
@by_kind
def test_not_negative(kind: str, impl: str) -> None:
    s, t = gaussians(50, 20), gaussians(50, 20, seed=1)
    assert bool((OF_LOGITS[kind](s, t, reduction="none", impl=impl) >= 0).all())
    near = t + 1e-3 * s
    assert bool((OF_LOGITS[kind](near, t, reduction="none", impl=impl) >= 0).all())


@by_impl
def test_jsd_is_symmetric_at_one_half_and_bounded_by_log_two(impl: str) -> None:
    s, t = 6 * gaussians(50, 40), 6 * gaussians(50, 40, seed=1)
    there, back = (
        generalized_jsd_distill(a, b, reduction="none", impl=impl) for a, b in ((s, t), (t, s))
    )
    torch.testing.assert_close(there, back)
    assert bool((there <= math.log(2) + 1e-12).all())
    apart = torch.full((1, 4), -80.0, dtype=torch.float64)
    one, two = apart.clone(), apart.clone()
    one[0, 0] = two[0, 1] = 80.0
    assert float(generalized_jsd_distill(one, two, impl=impl)) == pytest.approx(math.log(2))
    # Swapping the two and beta for 1 - beta is the same thing.
    a = generalized_jsd_distill(s, t, beta=0.2, impl=impl)
    torch.testing.assert_close(a, generalized_jsd_distill(t, s, beta=0.8, impl=impl))


@by_impl
def test_jsd_at_the_ends_is_a_divergence_by_definition_and_a_limit_by_slope(impl: str) -> None:
    s, t = gaussians(20, 30), gaussians(20, 30, seed=1)
    forward, reverse = (
        OF_LOGITS[k](s, t, reduction="none", impl=impl) for k in ("forward_kl", "reverse_kl")
    )
    torch.testing.assert_close(
        generalized_jsd_distill(s, t, beta=0, reduction="none", impl=impl), forward
    )
    torch.testing.assert_close(
        generalized_jsd_distill(s, t, beta=1, reduction="none", impl=impl), reverse
    )
    small = generalized_jsd_distill(s, t, beta=1e-5, reduction="none", impl=impl) / 1e-5
    torch.testing.assert_close(small, forward, rtol=1e-2, atol=1e-3)
    small = generalized_jsd_distill(s, t, beta=1 - 1e-5, reduction="none", impl=impl) / 1e-5
    torch.testing.assert_close(small, reverse, rtol=1e-2, atol=1e-3)


@by_impl
def test_hintons_scale_and_limit(impl: str) -> None:
    """T^2 KL tends to half the mean square of the centred logit gap as T grows."""
    s, t = gaussians(20, 30), gaussians(20, 30, seed=1)
    plain = forward_kl_distill(s, t, temperature=3.0, scale_by_temperature=False, impl=impl)
    torch.testing.assert_close(forward_kl_distill(s, t, temperature=3.0, impl=impl), 9 * plain)
    reverse = reverse_kl_distill(s, t, temperature=3.0, impl=impl)
    scaled = reverse_kl_distill(s, t, temperature=3.0, scale_by_temperature=True, impl=impl)
    torch.testing.assert_close(scaled, 9 * reverse)
    gap = (s - s.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))
    limit = (gap * gap).mean(1) / 2
    for call in (
        forward_kl_distill,
        lambda *a, **k: reverse_kl_distill(*a, scale_by_temperature=True, **k),
    ):
        hot = call(s, t, temperature=1e3, reduction="none", impl=impl)
        torch.testing.assert_close(hot, limit, rtol=2e-2, atol=0)


@by_impl
def test_balanced_weights(impl: str) -> None:
    """delta on KL(p||q) where the student is the more certain, on KL(q||p) where it is not; none at delta 1."""
    t = gaussians(20, 30)
    for scale, first in ((1.5, True), (0.5, False)):  # a sharper and a flatter student
        s = scale * t
        forward, reverse = (
            OF_LOGITS[k](s, t, temperature=4.0, reduction="none", impl=impl) for k in KINDS[:2]
        )
        found = balanced_divergence_kd(s, t, delta=3.0, reduction="none", impl=impl)
        expected = 16 * (3 * forward + reverse if first else forward + 3 * reverse)
        torch.testing.assert_close(found, expected)
        jeffreys = balanced_divergence_kd(s, t, delta=1.0, reduction="none", impl=impl)
        torch.testing.assert_close(jeffreys, 16 * (forward + reverse))
    # Equal entropies (the same logits in another order) count as the second case, whichever way it is asked.
    s = t.flip(1)
    equal = balanced_divergence_kd(s, t, delta=3.0, reduction="none", impl="reference")
    forward, reverse = (
        OF_LOGITS[k](s, t, temperature=4.0, reduction="none", impl=impl) for k in KINDS[:2]
    )
    choices = torch.stack((16 * (forward + 3 * reverse), 16 * (3 * forward + reverse)))
    assert bool(((choices - equal).abs().min(0).values < 1e-9).all())


@by_impl
def test_log_cosh_forms(impl: str) -> None:
    s, t = gaussians(9, 30), gaussians(9, 30, seed=1)
    found = log_cosh_logit_distill(s, t, temperature=2.0, reduction="none", impl=impl)
    d = (s - t) / 2
    sigma = torch.sigmoid(d)
    half = torch.full_like(sigma, 0.5)
    binary = half * (half / sigma).log() + half * (half / (1 - sigma)).log()
    torch.testing.assert_close(found, 4 * binary.sum(1))
    small = log_cosh_logit_distill(t + 1e-3 * s, t, temperature=2.0, reduction="none", impl=impl)
    torch.testing.assert_close(small, ((1e-3 * s) ** 2).sum(1) / 8, rtol=1e-5, atol=0)
    far = log_cosh_logit_distill(t + 500, t, temperature=2.0, reduction="none", impl=impl)
    torch.testing.assert_close(
        far, torch.full((9,), 30 * (2 * 500 / 2 - 4 * math.log(2)), dtype=torch.float64)
    )


@by_impl
@by_kind
def test_shift_invariance_of_what_has_it(kind: str, impl: str) -> None:
    s, t = gaussians(9, 30), gaussians(9, 30, seed=1)
    a = OF_LOGITS[kind](s, t, reduction="none", impl=impl)
    b = OF_LOGITS[kind](s + 3.0, t - 2.0, reduction="none", impl=impl)
    if kind == "log_cosh":  # it matches logits, not distributions
        assert not torch.allclose(a, b)
    else:
        torch.testing.assert_close(a, b)


@by_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_logits(dtype: torch.dtype, impl: str) -> None:
    """A token that neither can choose adds nothing; one that only the teacher rules out costs infinity in reverse."""
    s, t = gaussians(4, 30, dtype=dtype), gaussians(4, 30, seed=1, dtype=dtype)
    keep = torch.arange(30) % 3 != 0
    cut_s, cut_t = (torch.where(keep, x, -torch.inf) for x in (s, t))
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        leaf = cut_s.clone().requires_grad_()
        whole = OF_LOGITS[kind](leaf, cut_t, reduction="sum", impl=impl)
        torch.testing.assert_close(
            whole, OF_LOGITS[kind](s[:, keep], t[:, keep], reduction="sum", impl=impl)
        )
        if impl == "cpu":
            (g,) = torch.autograd.grad(whole, leaf)
            assert bool(g.isfinite().all())
            assert not g[:, ~keep].any()
    assert bool(reverse_kl_distill(s, cut_t, impl=impl) == torch.inf)
    assert bool(forward_kl_distill(s, cut_t, impl=impl).isfinite())


@by_impl
@by_kind
def test_labels_say_which_rows_count(kind: str, impl: str) -> None:
    s, t = gaussians(9, 30), gaussians(9, 30, seed=1)
    labels = torch.tensor([0, -100, 1, 2, -100, 3, 4, 5, -100])
    use = labels != -100
    leaf = s.clone().requires_grad_()
    rows = OF_LOGITS[kind](leaf, t, labels=labels, reduction="none", impl=impl)
    torch.testing.assert_close(
        rows[use], OF_LOGITS[kind](s[use], t[use], reduction="none", impl=impl)
    )
    assert not rows[~use].any()
    (g,) = torch.autograd.grad(rows.sum(), leaf)
    assert not g[~use].any()
    mean = OF_LOGITS[kind](s, t, labels=labels, impl=impl)
    torch.testing.assert_close(mean, rows.detach().sum() / 6)
    other = torch.where(use, labels, 7)
    assert torch.equal(OF_LOGITS[kind](s, t, labels=other, ignore_index=7, impl=impl), mean)


@by_kind
def test_no_gradient_for_the_teacher(kind: str) -> None:
    s, t = gaussians(3, 5).requires_grad_(), gaussians(3, 5, seed=1).requires_grad_()
    grads: Any = torch.autograd.grad(OF_LOGITS[kind](s, t), [s, t], allow_unused=True)
    assert grads[1] is None


@by_impl
@by_kind
def test_gradcheck(kind: str, impl: str) -> None:
    t = gaussians(3, 6, seed=1)
    s = gaussians(3, 6).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: OF_LOGITS[kind](z, t, reduction="none", impl=impl), [s]
    )


@by_kind
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)])
def test_any_subset_of_inputs_may_require_grad(kind: str, wanted: tuple[bool, bool]) -> None:
    s, t = make_head(6, 4, 30, bias=False), make_head(6, 5, 30, bias=False, seed=1)

    def run(flags: tuple[bool, bool]) -> list[Tensor]:
        inputs = [x.clone().requires_grad_(f) for x, f in zip((s.hidden, s.weight), flags)]
        loss = linear_distill(*inputs, t.hidden, t.weight, divergence_kind=kind, labels=s.labels)
        return list(torch.autograd.grad(loss, [x for x, f in zip(inputs, flags) if f]))

    whole = run((True, True))
    torch.testing.assert_close(run(wanted), [g for g, f in zip(whole, wanted) if f])


@by_impl
@pytest.mark.parametrize("ignore_index", [0, 1, -1])
def test_without_labels_every_row_counts(ignore_index: int, impl: str) -> None:
    """``ignore_index`` is about labels that are given: 0, a padding token, masks nothing here."""
    hidden, weight = gaussians(4, 3), gaussians(5, 3, seed=1)
    teacher, teacher_weight = gaussians(4, 2, seed=2), gaussians(5, 2, seed=3)
    s, t = hidden @ weight.T, teacher @ teacher_weight.T
    right = kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean")
    given: Any = {"ignore_index": ignore_index, "impl": impl}
    torch.testing.assert_close(forward_kl_distill(s, t, **given), right)
    heads = (hidden.requires_grad_(), weight, teacher, teacher_weight)
    loss = linear_kl(*heads, **given)
    torch.testing.assert_close(loss, right)
    loss.backward()
    assert hidden.grad is not None
    weighted = (s.softmax(-1) - t.softmax(-1)) @ weight / 4
    torch.testing.assert_close(hidden.grad, weighted)
