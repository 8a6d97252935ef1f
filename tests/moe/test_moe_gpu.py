# SPDX-License-Identifier: Apache-2.0
"""The CUDA router and passes over rows: values and gradients of the reference, no wait, in graphs, the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, captured, no_waiting
from helpers import misaligned, strided
from hotloop.front import impl as front
from hotloop.front import native
from hotloop.moe import (
    AdamState,
    Dispatch,
    Norm,
    Routing,
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

IMPL: Any = DEVICE
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(DEVICE == "cuda" and native.cuda is None, reason="hotloop._cuda is not compiled"),
]  # fmt: skip

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "plain": {"renormalize": False, "routed_scale": 2.0},
    "late": {"order": "topk_then_softmax"},
    "sigmoid": {"scoring": "sigmoid", "routed_scale": 2.5},
    "deepseek": {"scoring": "sigmoid", "n_group": 4, "topk_group": 2, "bias": True},
    "largest": {"n_group": 2, "topk_group": 1, "group_score": "max"},
}
by_option = pytest.mark.parametrize("name", OPTIONS)


def logits(tokens: int, experts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=g, dtype=torch.float64).to(dtype).to(DEVICE)


def options(name: str, experts: int, dtype: torch.dtype) -> dict[str, Any]:
    found = dict(OPTIONS[name])
    if found.pop("bias", False):
        found["bias"] = logits(1, experts, dtype, seed=7)[0] / 8
    return found


def parts(x: Tensor, k: int, impl: str, **how: Any) -> tuple[Routing, Tensor]:
    """A routing, and the gradient of the logits from weights, score sums and log-sum-exp."""
    leaf = x.detach().requires_grad_()
    found = route(leaf, k, impl=impl, **how)
    assert front.last_impl("route") == impl
    weights = torch.linspace(
        -1, 1, found.topk_weights.numel(), device=x.device, dtype=torch.float64
    )
    loss = (found.topk_weights.double() * weights.view_as(found.topk_weights)).sum()
    loss = loss + (found.prob_sums.double() * weights[: x.shape[1]]).sum() / 4
    loss = loss + found.logsumexp.double().square().sum() / 8
    (slope,) = torch.autograd.grad(loss, [leaf])
    return found, slope


@by_option
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1, 16, 1), (300, 60, 4), (1000, 256, 8), (70, 1000, 40)]
)
def test_as_the_reference(tokens: int, experts: int, k: int, dtype: torch.dtype, name: str) -> None:
    x, how = logits(tokens, experts, dtype), options(name, experts, dtype)
    how["token_mask"] = torch.arange(tokens, device=x.device) % 5 != 1
    found, slope = parts(x, k, IMPL, **how)
    # Of half precision the reference in float32: experts are chosen by scores that are not rounded.
    exact, wanted = parts(x if dtype == torch.float64 else x.float(), k, "reference", **how)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert found.dispatch is not None
    assert exact.dispatch is not None
    for a, b in zip((*found[:6], *found.dispatch), (*exact[:6], *exact.dispatch)):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    coarse = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, tolerance)
    torch.testing.assert_close(slope.to(wanted.dtype), wanted, rtol=coarse, atol=coarse)


@pytest.mark.parametrize("lay", [strided, misaligned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(lay: Any, dtype: torch.dtype) -> None:
    x = logits(40, 128, dtype)
    for a, b in zip(route(lay(x), 4, impl=IMPL)[:6], route(x, 4, impl=IMPL)[:6]):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "how", [{}, {"align": 16}, {"capacity": 30, "align": 8}, {"capacity": 30, "drop": "weight"}]
)
@pytest.mark.parametrize("experts", [3, 64, 300])
def test_orders(experts: int, how: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(experts)
    ids = torch.randint(-1, experts, (5000, 2), generator=g).to(DEVICE)
    if "drop" in how:
        how = {**how, "topk_weights": (torch.randn(5000, 2, generator=g) * 4).round().to(DEVICE)}
    found = dispatch(ids, experts, impl=IMPL, **how)
    for a, b in zip(found, dispatch(ids, experts, impl="reference", **how)):
        assert torch.equal(a, b)


def test_sequences() -> None:
    x = logits(100, 16)
    offsets = torch.tensor([0, 0, 7, 64, 100], device=DEVICE)
    losses, slopes = [], []
    for impl in (IMPL, "reference"):
        leaf = x.clone().requires_grad_()
        loss = sequence_balance_loss(leaf, 2, cu_seqlens=offsets, impl=impl)
        losses.append(loss)
        slopes.append(torch.autograd.grad(loss, [leaf])[0])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-7)


def test_the_same_bits_twice() -> None:
    x = logits(5000, 128)
    first, slope = parts(x, 8, IMPL)
    for _ in range(3):
        again, other = parts(x, 8, IMPL)
        assert torch.equal(slope, other)
        assert all(torch.equal(a, b) for a, b in zip(first[:6], again[:6]))


@pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU only")
@by_option
def test_nothing_waits_for_the_device(name: str) -> None:
    x, how = logits(257, 64), options(name, 64, torch.float32)
    wanted = parts(x, 4, IMPL, **how)
    torch.cuda.synchronize()
    with no_waiting():
        leaf = x.detach().requires_grad_()
        found = route(leaf, 4, impl=IMPL, **how)
        loss = found.topk_weights.sum() + found.prob_sums.square().sum() + found.logsumexp.sum()
        loss.backward()
        dispatch(
            found.topk_ids,
            64,
            capacity=8,
            drop="weight",
            topk_weights=found.topk_weights,
            impl=IMPL,
        )
    assert torch.equal(found.topk_ids, wanted[0].topk_ids)


@pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU only")
def test_a_captured_step_follows_its_inputs() -> None:
    x = logits(257, 64).requires_grad_()

    def step() -> list[Tensor]:
        found = route(x, 4, impl=IMPL)
        assert found.dispatch is not None
        loss = found.topk_weights.square().sum() + found.prob_sums.square().sum()
        again = dispatch(found.topk_ids, 64, impl=IMPL)
        return [loss, *torch.autograd.grad(loss, [x]), *found[:6], *found.dispatch, *again]

    graph, filled = captured(step)
    for seed in (1, 2):
        with torch.no_grad():
            x.copy_(logits(257, 64, seed=seed))
        graph.replay()
        found = [y.clone() for y in filled]
        torch.testing.assert_close(found, step(), rtol=0, atol=0)


# -- rows --------------------------------------------------------------------------------------------------


def order_of(tokens: int, k: int) -> Dispatch:
    """Of experts with a capacity and aligned runs: slots and rows that are none."""
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, 5, (tokens, k), generator=g)
    found = dispatch(ids, 5, capacity=max(1, tokens * k // 6), align=4, impl="cpu")
    return Dispatch(*(x.to(DEVICE) for x in found))


Layer = Callable[..., Any]


def layers(order: Dispatch, other: torch.dtype) -> dict[str, Layer]:
    """Of streams, two states, expert rows, weights, numbers, and a norm's weight and bias."""

    def adam(
        x: Tensor,
        s: Tensor,
        d: Tensor,
        y: Tensor,
        w: Tensor,
        n: Tensor,
        nw: Tensor,
        nb: Tensor,
        **how: Any,
    ) -> Any:
        before, norm = AdamState(s, d.square() + 0.25, None), Norm("rms", nw)
        return adam_smoe_layer(x, before, y, w, order, is_first=True, mu=n[0], norm=norm, **how)

    return {
        "permute": lambda x, s, d, y, w, n, nw, nb, **how: permute(x, order, **how),
        "combine": lambda x, s, d, y, w, n, nw, nb, **how: combine(
            y, w, order, shared=x, out_dtype=other, **how
        ),
        "residual": lambda x, s, d, y, w, n, nw, nb, **how: residual_smoe_layer(
            x, y, w, order, norm=Norm("layer", nw, nb), **how
        ),
        "momentum": lambda x, s, d, y, w, n, nw, nb, **how: momentum_smoe_layer(
            x, s, y, w, order, mu=n[0], gamma=n[1], shared=d, norm=Norm("layer", nw, nb), **how
        ),
        "post": lambda x, s, d, y, w, n, nw, nb, **how: momentum_smoe_layer(
            x, None, s, norm=Norm("rms", nw), post_norm=True, **how
        ),
        "adam": adam,
        "robust": lambda x, s, d, y, w, n, nw, nb, **how: robust_momentum_smoe_layer(
            x, s, y, w, order, mu=n[0], gamma=n[1], alpha=n[2], norm=Norm("rms", nw), **how
        ),
        "lookahead": lambda x, s, d, y, w, n, nw, nb, **how: lookahead(
            x, s, n[2], norm=Norm("layer", nw, nb), **how
        ),
    }


def inputs(tokens: int, columns: int, order: Dispatch, dtype: torch.dtype) -> list[Tensor]:
    def made(*shape: int, seed: int, of: torch.dtype = dtype) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(of).to(DEVICE)

    k = order.row_of_slot.shape[0] // tokens
    rows = (tokens, columns)
    return [
        *(made(*rows, seed=i) for i in range(3)),
        made(order.slot_of_row.shape[0], columns, seed=3),
        made(tokens, k, seed=4),
        torch.tensor([0.7, 0.9, 0.2], device=DEVICE),
        made(columns, seed=5),
        made(columns, seed=6),
    ]


def both(layer: Layer, given: list[Tensor], impl: str) -> tuple[list[Tensor], list[Tensor | None]]:
    leaves = [x.detach().requires_grad_() for x in given]
    found = layer(*leaves, impl=impl)
    parts = found if isinstance(found, tuple) else (found,)
    flat = [y for part in parts for y in (part if isinstance(part, tuple) else (part,))]
    out = [y for y in flat if y is not None]
    loss = sum(
        (
            y.double() * torch.linspace(-1, 1, y.shape[-1], device=y.device, dtype=torch.float64)
        ).sum()
        for y in out
    )
    assert isinstance(loss, Tensor)
    return [y.detach() for y in out], list(torch.autograd.grad(loss, leaves, allow_unused=True))


NAMES = list(layers(Dispatch(*[torch.zeros(0, dtype=torch.int64)] * 4), torch.float32))
SIZES = [(1, 8, 1), (7, 33, 3), (300, 1024, 8), (2100, 64, 2), (3, 9000, 4)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "columns", "k"), SIZES)
def test_rows_as_the_reference(
    tokens: int, columns: int, k: int, dtype: torch.dtype, name: str
) -> None:
    order = order_of(tokens, k)
    layer = layers(order, dtype if dtype == torch.float64 else torch.float32)[name]
    given = inputs(tokens, columns, order, dtype)
    found, slopes = both(layer, given, IMPL)
    if dtype == torch.float64:
        wanted, exact = both(layer, given, "reference")
    else:  # in float32 of the same numbers
        wanted, exact = both(layer, [x.float() for x in given], "reference")
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 4e-3}.get(dtype, 3e-2)
    for a, b in zip((*found, *slopes), (*wanted, *exact)):
        assert (a is None) == (b is None)
        if a is None or b is None:
            continue
        scale = float(b.abs().max()) + 1e-30
        torch.testing.assert_close(a.to(b.dtype) / scale, b / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lay", [strided, misaligned])
@pytest.mark.parametrize("name", NAMES)
def test_layouts_of_rows(name: str, lay: Any) -> None:
    order = order_of(20, 2)
    layer, given = layers(order, torch.float32)[name], inputs(20, 40, order, torch.bfloat16)
    plain, laid = both(layer, given, IMPL), both(layer, [lay(x) for x in given], IMPL)
    for a, b in zip((*plain[0], *plain[1]), (*laid[0], *laid[1])):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_of_rows(name: str) -> None:
    order = order_of(3000, 4)
    layer, given = layers(order, torch.float32)[name], inputs(3000, 256, order, torch.float32)
    first = both(layer, given, IMPL)
    for _ in range(2):
        again = both(layer, given, IMPL)
        for a, b in zip((*first[0], *first[1]), (*again[0], *again[1])):
            assert (a is None and b is None) or (
                a is not None and b is not None and torch.equal(a, b)
            )


@pytest.mark.skipif(DEVICE != "cuda", reason="of a GPU only")
@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_wait_and_are_captured(name: str) -> None:
    order = order_of(50, 2)
    layer, given = layers(order, torch.float32)[name], inputs(50, 64, order, torch.float32)
    wanted = both(layer, given, IMPL)
    torch.cuda.synchronize()
    with no_waiting():
        both(layer, given, IMPL)

    def step() -> list[Tensor]:
        found, slopes = both(layer, given, IMPL)
        return [*found, *(s for s in slopes if s is not None)]

    graph, filled = captured(step)
    for x in given:
        x.mul_(0.5)
    graph.replay()
    found = [y.clone() for y in filled]
    torch.testing.assert_close(found, step(), rtol=0, atol=0)
    assert not torch.equal(found[0], wanted[0][0])
