# SPDX-License-Identifier: Apache-2.0
"""Derivatives of derivatives: every gradient of this room can be differentiated again, or says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hotloop.logprob import (
    balanced_divergence_kd,
    bonsai_synthesis_loss,
    forward_kl_distill,
    generalized_jsd_distill,
    linear_cross_entropy,
    linear_distill,
    linear_jsd,
    linear_kl,
    linear_logprob,
    log_cosh_logit_distill,
    reverse_kl_distill,
    token_logprob,
)
from hotloop.preference import dpo_loss, linear_preference_loss
from logprob_cases import make_head
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

N, D, V = 6, 3, 11
OPTIONAL = ("entropy", "lse", "sum_p2", "mean_logit")


def penalised(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of loss + the squares of its gradients: what a gradient penalty asks for."""
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    total = loss + sum((g * g).sum() for g in first)
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("impl", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_gradient_penalty_on_cross_entropy(reduction: str, impl: str) -> None:
    h = torch.tensor([[1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    y = torch.tensor([0, 1])
    loss = linear_cross_entropy(h, w, y, reduction=reduction, impl=impl).sum()
    (found,) = penalised(loss, [h])
    # By hand: logits (h, -h), so l = softplus(-2h) and softplus(2h); g = -2 s(-2h) and 2 s(2h), times
    # 1/2 for the mean; the derivative of l + g^2 is g + 2 g dg/dh with dg/dh = 4 s(2h) s(-2h).
    by_mean = torch.tensor([[-0.169265], [1.051394]], dtype=torch.float64)
    by_sum = torch.tensor([[-0.438655], [2.241548]], dtype=torch.float64)
    expected = by_mean if reduction == "mean" else by_sum
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


# Each form beside the same in plain torch, written here.


def logits_of(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    z = h @ w.t()
    return z if b is None else z + b


def all_statistics(
    z: Tensor, y: Tensor, cap: float = 4.0, temperature: float = 0.7
) -> list[Tensor]:
    z = cap * torch.tanh(z / cap) / temperature
    valid = y != -100
    logp = log_softmax(z, -1)
    rows = [
        logp.gather(1, y.clamp(min=0).unsqueeze(1)).squeeze(1),
        -(logp.exp() * logp).sum(1),
        z.logsumexp(1),
        (2 * logp).exp().sum(1),
        z.mean(1),
    ]
    return [torch.where(valid, r, 0.0) for r in rows]


def mixed(rows: Any) -> Tensor:
    """A scalar that bends in every statistic, so that the gradients from above have a graph too."""
    return sum((k + 1) * (0.1 * r + (0.3 * r).sin()).sum() for k, r in enumerate(rows))  # type: ignore[return-value]


def statistics_of(out: Any) -> list[Tensor]:
    return [out.logps, out.entropy, out.lse, out.sum_p2, out.mean_logit]


OFFSETS = torch.tensor([0, 2, 2, 6])


def kl_rows(s: Tensor, t: Tensor, kind: str, temperature: float = 1.5) -> Tensor:
    q, p = log_softmax(s / temperature, -1), log_softmax(t / temperature, -1)
    forward = (p.exp() * (p - q)).sum(-1)
    reverse = (q.exp() * (q - p)).sum(-1)
    if kind == "forward_kl":
        return forward
    if kind == "reverse_kl":
        return reverse
    if kind == "jsd":
        m = (0.3 * p.exp() + 0.7 * q.exp()).log()
        return 0.3 * (p.exp() * (p - m)).sum(-1) + 0.7 * (q.exp() * (q - m)).sum(-1)
    if kind == "balanced":
        sharper = -(p.exp() * p).sum(-1) > -(q.exp() * q).sum(-1)
        a, b = torch.where(sharper, 2.0, 1.0), torch.where(sharper, 1.0, 2.0)
        return temperature**2 * (a * forward + b * reverse)
    return temperature**2 * (0.5 * (s - t) / temperature).cosh().log().sum(-1)


KINDS = ("forward_kl", "reverse_kl", "jsd", "balanced", "log_cosh")


def of_heads(kind: str, teacher: Any, h: Tensor, w: Tensor, b: Tensor | None, y: Tensor) -> Tensor:
    options: dict[str, Any] = {"labels": y, "temperature": 1.5, "reduction": "none"}
    if kind == "jsd":
        return linear_jsd(h, w, *teacher, student_bias=b, beta=0.3, **options)
    if kind in ("forward_kl", "reverse_kl"):
        direction = kind.removesuffix("_kl")
        return linear_kl(h, w, *teacher, student_bias=b, direction=direction, **options)
    if b is not None:  # this one takes no bias: it is one more column of width
        h, w = torch.cat((h, h.new_ones(N, 1)), 1), torch.cat((w, b.unsqueeze(1)), 1)
    return linear_distill(h, w, *teacher, divergence_kind=kind, **options)


def of_logits(kind: str, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    options: dict[str, Any] = {"labels": y, "temperature": 1.5, "reduction": "none"}
    if kind == "jsd":
        return generalized_jsd_distill(s, t, beta=0.3, **options)
    call = {
        "forward_kl": forward_kl_distill,
        "reverse_kl": reverse_kl_distill,
        "balanced": balanced_divergence_kd,
        "log_cosh": log_cosh_logit_distill,
    }[kind]
    return call(s, t, **options)


def cases() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], bool]]:
    """Ours of (hidden, weight, bias, labels) and torch's; whether ours takes a head (else: the logits)."""
    t = make_head(N, 4, V, torch.float64, seed=1)
    teacher = (t.hidden, t.weight)
    zt = t.hidden @ t.weight.t()

    def summed(z: Tensor, y: Tensor) -> Tensor:
        rows = all_statistics(z, y)
        return mixed([torch.stack([r[:2].sum(), r[2:2].sum(), r[2:].sum()]) for r in rows])

    made: dict[str, Any] = {
        "linear_logprob": (
            lambda h, w, b, y: mixed(statistics_of(linear_logprob(
                h, w, y, bias=b, softcap=4.0, temperature=0.7, statistics=OPTIONAL))),
            lambda z, y: mixed(all_statistics(z, y)), True,
        ),
        "linear_logprob of sequences": (
            lambda h, w, b, y: mixed(statistics_of(linear_logprob(
                h, w, y, bias=b, softcap=4.0, temperature=0.7, statistics=OPTIONAL, cu_seqlens=OFFSETS))),
            summed, True,
        ),
        "token_logprob": (
            lambda z, y: mixed(statistics_of(token_logprob(
                z, y, softcap=4.0, temperature=0.7, statistics=OPTIONAL))),
            lambda z, y: mixed(all_statistics(z, y)), False,
        ),
        "bonsai_synthesis_loss": (
            lambda z, y: bonsai_synthesis_loss(z.unsqueeze(0), y.unsqueeze(0)).sin(),
            lambda z, y: cross_entropy(z, y).sin(), False,
        ),
        **{
            f"linear_cross_entropy {reduction}": (
                lambda h, w, b, y, reduction=reduction: linear_cross_entropy(
                    h, w, y, bias=b, label_smoothing=0.1, z_loss=0.01, reduction=reduction).sin().sum(),
                lambda z, y, reduction=reduction: smoothed(z, y, reduction).sin().sum(), True,
            )
            for reduction in ("mean", "sum", "none")
        },
        **{
            f"heads {kind}": (
                lambda h, w, b, y, kind=kind: of_heads(kind, teacher, h, w, b, y).sin().sum(),
                lambda z, y, kind=kind: torch.where(y != -100, kl_rows(z, zt, kind), 0.0).sin().sum(), True,
            )
            for kind in KINDS
        },
        **{
            f"logits {kind}": (
                lambda z, y, kind=kind: of_logits(kind, z, zt, y).sin().sum(),
                lambda z, y, kind=kind: torch.where(
                    y != -100,
                    # Hinton's factor is this function's default.
                    (2.25 if kind == "forward_kl" else 1.0) * kl_rows(z, zt, kind), 0.0,
                ).sin().sum(), False,
            )
            for kind in KINDS
        },
    }  # fmt: skip
    return made


def smoothed(z: Tensor, y: Tensor, reduction: str) -> Tensor:
    rows = cross_entropy(z, y, label_smoothing=0.1, reduction="none")
    rows = rows + torch.where(y != -100, 0.01 * z.logsumexp(1) ** 2, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / (y != -100).sum()


CASES = cases()
FOLDED = ("heads balanced", "heads log_cosh")


def assert_same_penalties(
    call: Callable[..., Tensor], plain: Callable[..., Tensor], of_head: bool
) -> None:
    head = make_head(N, D, V, torch.float64).leaves()
    z = logits_of(head.hidden, head.weight, head.bias)
    if of_head:
        found = penalised(call(*head.tensors(), head.labels), head.tensors())
        expected = penalised(plain(z, head.labels), head.tensors())
    else:
        z = z.detach().requires_grad_()
        found, expected = (penalised(f(z, head.labels), [z]) for f in (call, plain))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_gradient_penalties(name: str) -> None:
    assert_same_penalties(*CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_their_gradients_by_differences(name: str) -> None:
    call, _, of_head = CASES[name]
    head = make_head(N, D, V, torch.float64).leaves()
    if of_head:
        inputs: tuple[Tensor, ...] = tuple(head.tensors())
        f: Callable[..., Tensor] = lambda h, w, b: call(h, w, b, head.labels)  # noqa: E731
    else:
        inputs = (logits_of(*head.tensors()).detach().requires_grad_(),)
        f = lambda z: call(z, head.labels)  # noqa: E731
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c[2]])
def test_hidden_states_that_depend_on_the_weight(name: str) -> None:
    """Tied embeddings: the path from the weight to the hidden states is not the operator's to count."""
    call, plain, _ = CASES[name]
    head = make_head(N, D, V, torch.float64)
    ids = torch.tensor([0, 1, 4, 4, 9, 10])

    def both(f: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        w = head.weight.clone().requires_grad_()
        return penalised(f(w[ids].tanh(), w), [w])

    found = both(lambda h, w: call(h, w, None, head.labels))
    expected = both(lambda h, w: plain(logits_of(h, w, None), head.labels))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("subset", range(1, 8))
@pytest.mark.parametrize("name", ["linear_logprob", "linear_cross_entropy mean", "heads jsd"])
def test_any_subset_of_inputs(name: str, subset: int) -> None:
    call, plain, _ = CASES[name]
    head = make_head(N, D, V, torch.float64).leaves()
    for k, x in enumerate(head.tensors()):
        x.requires_grad_(bool(subset >> k & 1))
    needed = [x for x in head.tensors() if x.requires_grad]
    found = penalised(call(head.hidden, head.weight, head.bias, head.labels), needed)
    z = logits_of(head.hidden, head.weight, head.bias)
    torch.testing.assert_close(
        found, penalised(plain(z, head.labels), needed), rtol=1e-8, atol=1e-10
    )


def test_masked_rows_of_nan_poison_no_second_derivative() -> None:
    head = make_head(N, D, V, torch.float64)
    head.hidden[head.labels == -100] = torch.nan
    h = head.leaves()
    for loss in (
        h.run(linear_cross_entropy),
        h.run().logps.sum(),
        linear_kl(h.hidden, h.weight, h.hidden, h.weight.flip(0), labels=h.labels),
    ):
        for g in penalised(loss, [h.hidden, h.weight]):
            assert bool(g.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    head = make_head(N, D, V).to(dtype).leaves()
    wide = make_head(N, D, V).to(dtype).to(torch.float64).leaves()
    loss = head.run(linear_cross_entropy)
    found = penalised(loss, head.tensors())
    z = logits_of(wide.hidden, wide.weight, wide.bias)
    expected = penalised(cross_entropy(z, wide.labels), wide.tensors())
    eps = torch.finfo(dtype).eps
    for a, b in zip(found, expected):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=8 * eps, atol=8 * eps)


def test_autocast_around_a_differentiable_gradient_narrows_nothing() -> None:
    head = make_head(N, D, V)
    results = []
    for enabled in (False, True):
        h = head.leaves()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = h.run(linear_cross_entropy)
            results.append(torch.autograd.grad(loss, h.tensors(), create_graph=True))
    for a, b in zip(*results):
        assert torch.equal(a, b)


# -- the registered operators --------------------------------------------------------------------------------

REGISTERED: dict[str, Callable[..., Tensor]] = {
    "linear_logprob": lambda h, w, b, y: mixed(
        torch.ops.hotloop.linear_logprob(h, w, b, y, -100, 0.7, 1.0, 4.0, "cpu")[0].unbind(0)
    ),
    "token_logprob": lambda z, y: mixed(
        torch.ops.hotloop.token_logprob(z, y, -100, 0.7, 1.0, 4.0, "cpu")[0].unbind(0)
    ),
}


def registered_divergence(kind: str, of_head: bool) -> Callable[..., Tensor]:
    t = make_head(N, 4, V, torch.float64, seed=1)
    numbers = [1.5, 1.0, 0.0, 1.5, 1.0, 0.0]
    zt = t.hidden @ t.weight.t()
    # The operator's KL has no factor T^2, and its rows of given logits are masked by the front door.
    if of_head:
        return lambda h, w, b, y: torch.ops.hotloop.linear_divergence(
            h, w, b, t.hidden, t.weight, None, y, -100, kind, 0.3, 2.0, numbers, "cpu"
        )[0].sin().sum()  # fmt: skip
    return lambda z, y: torch.where(
        y != -100, torch.ops.hotloop.logit_divergence(z, zt, kind, 0.3, 2.0, numbers, "cpu")[0], 0.0
    ).sin().sum()  # fmt: skip


@pytest.mark.parametrize(
    "name", [*REGISTERED, *(f"heads {k}" for k in KINDS), *(f"logits {k}" for k in KINDS)]
)
def test_registered_operators(name: str) -> None:
    _, plain, of_head = CASES[name]
    if name == "logits forward_kl":
        plain = CASES["heads forward_kl"][1]
    call = REGISTERED.get(name) or registered_divergence(name.split()[1], of_head)
    assert_same_penalties(call, plain, of_head)


# What the operator is given are inputs of the graph. Of values made inside it AOTAutograd leaves the second derivative
# out in silence, of torch's own operators too (torch.exp, torch.sigmoid); docs/numerics.md says so.
@pytest.mark.parametrize("name", [n for n in CASES if n[:5] != "bonsa" and n not in FOLDED])
def test_under_compile_a_second_derivative_is_refused(name: str) -> None:
    call, _, of_head = CASES[name]
    head = make_head(N, D, V, torch.float64).leaves()
    torch.compiler.reset()
    made = torch.compile(call, fullgraph=True, backend="aot_eager")
    if of_head:
        head.weight.requires_grad_(False)
        inputs = [head.hidden]
        loss = made(*head.tensors(), head.labels)
    else:
        inputs = [logits_of(*head.tensors()).detach().requires_grad_()]
        loss = made(inputs[0], head.labels)
    with pytest.raises(RuntimeError, match=r"does not currently support double backward"):
        penalised(loss, inputs)


# -- losses that are not twice differentiable say so ---------------------------------------------------------


def test_a_preference_loss_over_a_head_refuses_create_graph() -> None:
    h = torch.randn(4, 3, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    w = make_head(N, D, V).weight
    y = torch.zeros(4, 3, dtype=torch.int64)
    loss, _ = linear_preference_loss(h, w, y, ref_logps=torch.zeros(4))
    with pytest.raises(RuntimeError, match=r"create_graph: expected False, got True"):
        torch.autograd.grad(loss, h, create_graph=True)


def pairs() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    p = [torch.randn(4, generator=g, dtype=torch.float64) for _ in range(4)]
    return [x.requires_grad_(k < 2) for k, x in enumerate(p)]


def test_the_registered_pair_loss_refuses_create_graph() -> None:
    p = pairs()
    loss = torch.ops.hotloop.pointwise(
        p[:2], p[2:], "preference.dpo", [0.1], "mean", [], 1, None, None, -1
    )[0]
    with pytest.raises(RuntimeError, match=r"create_graph: expected False, got True"):
        torch.autograd.grad(loss, p[:2], create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_compiled_pair_loss_refuses_a_second_derivative(reduction: str) -> None:
    torch.compiler.reset()
    made = torch.compile(
        lambda *p: dpo_loss(*p, reduction=reduction).sum(), fullgraph=True, backend="aot_eager"
    )
    p = pairs()
    with pytest.raises(RuntimeError, match=r"does not currently support double backward"):
        penalised(made(*p), p[:2])
