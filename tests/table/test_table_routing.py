# SPDX-License-Identifier: Apache-2.0
"""Mixtures of embeddings: the grid, gradients three ways, laws, torch.compile in bfloat16, errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    assert_gradient_close,
    assert_no_worse_than_torch,
    gradients,
    misaligned,
    strided,
)
from hotloop import table
from hotloop.reference import table as reference
from table_checks import grouped, refused
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Samples, spaces, copies (0: no such dimension), dimensions.
SPACES = [
    (0, 3, 0, 5),
    (1, 1, 0, 1),
    (7, 2, 0, 13),
    (5, 14, 0, 127),
    (4, 3, 7, 128),  # as published: seven projectors
    (3, 6, 1, 129),
]
# Shape of the returns, buckets, dimensions.
BUCKETS = [
    ((0,), 3, 4),
    ((1,), 1, 1),
    ((7,), 5, 13),
    ((3, 30), 100, 128),
    ((2, 3, 5), 101, 7),
    ((), 10, 3),
]
# Largest relative error of a gradient: a few roundings of the dtype.
GRADIENT = {torch.float32: 1e-5, torch.float64: 1e-13, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def spaces(shape: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    b, e, c, d = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*((b, e, c, d) if c else (b, e, d)), generator=g, dtype=torch.float64)
    return [x.to(dtype), (2 * torch.randn(b, e, generator=g, dtype=torch.float64)).to(dtype)]


def buckets(shape: Any, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    rows, k, d = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*n: int) -> Tensor:
        return torch.randn(*n, generator=g, dtype=torch.float64)

    made = [
        2 * normal(*rows, 2),
        normal(2, k),
        normal(k, k) / k**0.5,
        normal(k, 2),
        normal(2, d),
        normal(d),
    ]
    return [x.to(dtype) for x in made]


CALLS: list[tuple[str, Callable[..., list[Tensor]], Any, dict[str, Any]]] = [
    *(("expert_space_routing", spaces, s, {"temperature": t}) for s in SPACES for t in (1.0, 0.1)),
    *(("multi_reward_embedding", buckets, s, {}) for s in BUCKETS),
    ("multi_reward_embedding", buckets, BUCKETS[2], {"negative_slope": 0.3}),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "make", "shape", "more"), CALLS)
def test_grid(op: str, make: Any, shape: Any, more: Any, dtype: torch.dtype) -> None:
    ours, plain = getattr(table, op), getattr(reference, op)
    inputs = [x.requires_grad_() for x in make(shape, dtype)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    value, same, truth = ours(*inputs, **more), plain(*inputs, **more), plain(*wide, **more)
    assert value.dtype == dtype
    # In float64 the truth is off by as much as we are.
    eps = GRADIENT[dtype] / (1 if dtype == torch.float64 else 10)
    assert_no_worse_than_torch(value, same, truth, eps=eps)
    if value.numel() == 0:
        return
    for x, y, z in zip(gradients(value, inputs), gradients(same, inputs), gradients(truth, wide)):
        scale = float(z.abs().max())
        if scale > 1e-12:
            assert_no_worse_than_torch(x / scale, y / scale, z / scale, eps=GRADIENT[dtype])
        if dtype in (torch.float32, torch.float64):
            assert_gradient_close(x, z, 20 * GRADIENT[dtype], floor=1e-3 * scale)


@pytest.mark.parametrize(("op", "make", "shape", "more"), [CALLS[4], CALLS[9], CALLS[-1]])
def test_gradcheck(op: str, make: Any, shape: Any, more: Any) -> None:
    small = (2, *shape[1:-1], 3) if op == "expert_space_routing" else ((2,), 4, 3)
    inputs = [x.requires_grad_() for x in make(small)]
    for function in (getattr(table, op), getattr(reference, op)):
        call = functools.partial(function, **more)
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


class TestRouting:
    @pytest.mark.parametrize("temperature", [1.0, 0.1])
    def test_equal_logits_are_the_plain_average(self, temperature: float) -> None:
        e, _ = spaces((5, 4, 0, 9))
        z = table.expert_space_routing(e, torch.full((5, 4), 0.7).double(), temperature=temperature)
        torch.testing.assert_close(z, torch.nn.functional.normalize(e.mean(1), dim=-1))

    def test_one_space_is_the_identity(self) -> None:
        e, r = spaces((5, 1, 0, 9))
        e = torch.nn.functional.normalize(e, dim=-1)
        torch.testing.assert_close(table.expert_space_routing(e, r), e[:, 0])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_length_is_one(self, dtype: torch.dtype) -> None:
        z = table.expert_space_routing(*spaces((50, 6, 0, 64), dtype))
        bound = 2 * torch.finfo(dtype).eps
        assert float((z.double().norm(dim=-1) - 1).abs().max()) <= bound

    def test_order_of_the_spaces_does_not_matter(self) -> None:
        e, r = spaces((5, 6, 0, 9))
        at = torch.tensor([3, 0, 5, 1, 2, 4])
        torch.testing.assert_close(
            table.expert_space_routing(e, r), table.expert_space_routing(e[:, at], r[:, at])
        )

    def test_copies_are_their_mean(self) -> None:
        e, r = spaces((5, 3, 7, 9))
        torch.testing.assert_close(
            table.expert_space_routing(e, r), table.expert_space_routing(e.mean(2), r)
        )

    def test_the_largest_weight_is_bounded(self) -> None:
        """a lies in (0, 1): with one space far ahead the weights are e and 1 over their sum."""
        e = torch.eye(3).double().unsqueeze(0)
        z = table.expert_space_routing(e, torch.tensor([[1e4, -1e4, -1e4]]).double())
        torch.testing.assert_close(z[0] / z[0, 1], torch.tensor([torch.e, 1, 1]).double())

    def test_nothing_is_divided_by_nothing(self) -> None:
        z = table.expert_space_routing(torch.zeros(2, 3, 4), torch.zeros(2, 3))
        assert torch.equal(z, torch.zeros(2, 4))


class TestBuckets:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_one_hot_is_a_table_lookup(self, dtype: torch.dtype) -> None:
        """Logits so far apart that p is one-hot: row k of a W_b + b_b."""
        k = 5
        _, _, _, anchors, weight, bias = buckets(((1,), k, 6), dtype)
        angle = torch.arange(k, dtype=torch.float64) * 2 * torch.pi / k
        w1 = 1000 * torch.stack([angle.cos(), angle.sin()]).to(dtype)
        r = torch.stack([angle.cos(), angle.sin()], -1).to(dtype)
        found = table.multi_reward_embedding(
            r, w1, torch.zeros(k, k, dtype=dtype), anchors, weight, bias
        )
        torch.testing.assert_close(found, anchors @ weight + bias)

    def test_equal_logits_are_the_mean_bucket(self) -> None:
        r, w1, w2, anchors, weight, bias = buckets(((4,), 7, 6))
        found = table.multi_reward_embedding(r, 0 * w1, w2, anchors, weight, bias)
        wanted = anchors.mean(0) @ weight + bias
        torch.testing.assert_close(found, wanted.expand(4, -1))

    def test_torch_modules(self) -> None:
        """As the published code composes it, with its anchors."""
        torch.manual_seed(0)
        first, second = torch.nn.Linear(2, 100, bias=False), torch.nn.Linear(100, 100, bias=False)
        last = torch.nn.Linear(2, 128)
        anchors = torch.arange(0, 1400, 7, dtype=torch.float32).reshape(100, 2)
        r = torch.rand(3, 30, 2) * 5
        h = torch.nn.LeakyReLU()(first(r))
        p = torch.softmax(h + second(h), -1)
        wanted = p @ last(anchors)
        call = (r, first.weight.T, second.weight.T, anchors, last.weight.T, last.bias)
        truth = reference.multi_reward_embedding(*(x.double() for x in call))
        assert_no_worse_than_torch(table.multi_reward_embedding(*call), wanted, truth, eps=1e-6)


@pytest.mark.parametrize(("op", "make", "shape", "more"), [CALLS[6], CALLS[8], CALLS[15]])
def test_layouts(op: str, make: Any, shape: Any, more: Any) -> None:
    inputs = make(shape)
    function = getattr(table, op)
    wanted = function(*inputs, **more)
    for change in (strided, misaligned, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)):
        torch.testing.assert_close(function(*map(change, inputs), **more), wanted)


@pytest.mark.parametrize(
    ("op", "make", "size"), [(*CALLS[0][:2], (4, 3, 0, 8)), (*CALLS[-1][:2], ((4, 5), 6, 8))]
)
def test_compiled_in_bfloat16_equals_eager(op: str, make: Any, size: Any) -> None:
    torch._dynamo.reset()
    function, inputs = getattr(table, op), [x.requires_grad_() for x in make(size, torch.bfloat16)]
    one = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    other = function(*inputs)
    assert one.dtype == other.dtype
    torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)
    for x, y in zip(gradients(one, inputs), gradients(other, inputs)):
        scale = float(y.abs().max()) + 1e-6
        torch.testing.assert_close(x / scale, y / scale, rtol=0, atol=3e-2)


E, R = torch.ones(2, 3, 4), torch.zeros(2, 3)
BUCKET = buckets(((2,), 3, 4), torch.float32)
NAMES = ("returns_to_go", "w1", "w2", "anchors", "bucket_weight", "bucket_bias")


def route(e: Any = E, r: Any = R, **more: Any) -> Callable[[], Any]:
    return lambda: table.expert_space_routing(e, r, **more)


def embed(more: Any = None, **changes: Any) -> Callable[[], Any]:
    return lambda: table.multi_reward_embedding(
        **{**dict(zip(NAMES, BUCKET)), **changes}, **(more or {})
    )


ROUTE, EMBED = "expert_space_routing", "multi_reward_embedding"
VALUES = [
    (ROUTE, route(E[0]), "embeddings: expected shape (B, E, D) or (B, E, C, D) with at least one of E, C and D, got "
     "(3, 4). Stack the spaces"),
    (ROUTE, route(E[:, :0], R[:, :0]), "embeddings: expected shape (B, E, D) or (B, E, C, D) with at least one of E"),
    (ROUTE, route(E[:, :2]), "router_logits: expected shape (2, 2) like embeddings, got (2, 3). Pass one logit per"),
    (ROUTE, route(r=R[0]), "router_logits: expected 2 dimension(s), got shape (3,)."),
    (ROUTE, route(r=R.to("meta")), "router_logits: expected device cpu like embeddings, got meta. Move it first."),
    (ROUTE, route(temperature=0), "temperature: expected a number > 0, got 0."),
    (EMBED, embed(returns_to_go=torch.ones(2, 3)), "returns_to_go: expected shape (..., 2), got (2, 3). Pass pairs"),
    (EMBED, embed(w1=torch.ones(3, 3)), "w1: expected shape (2, 3), got (3, 3). K comes from w1, D from bucket"),
    (EMBED, embed(w1=torch.ones(2, 0)), "w1: expected shape (2, 1), got (2, 0)."),
    (EMBED, embed(w1=torch.ones(2)), "w1: expected 2 dimension(s), got shape (2,)."),
    (EMBED, embed(w2=torch.ones(2, 3)), "w2: expected shape (3, 3), got (2, 3)."),
    (EMBED, embed(anchors=torch.ones(2, 2)), "anchors: expected shape (3, 2), got (2, 2)."),
    (EMBED, embed(bucket_weight=torch.ones(3, 4)), "bucket_weight: expected shape (2, 4), got (3, 4)."),
    (EMBED, embed(bucket_bias=torch.ones(3)), "bucket_bias: expected shape (4,), got (3,)."),
    (EMBED, embed(w2=torch.ones(3, 3, device="meta")), "w2: expected device cpu like returns_to_go, got meta."),
    (EMBED, embed({"negative_slope": -0.1}), "negative_slope: expected a number >= 0, got -0.1."),
]  # fmt: skip
TYPES = [
    (ROUTE, route([1.0]), "embeddings: expected a torch.Tensor, got list. Use torch.as_tensor(...)."),
    (ROUTE, route(r=R.long()), "router_logits: expected dtype float32, float64, float16, bfloat16, got int64. Convert"),
    (ROUTE, route(temperature="1"), "temperature: expected a number > 0, got str. Pass a float."),
    (EMBED, embed(returns_to_go=torch.ones(2, 2).long()), "returns_to_go: expected dtype float32, float64, float16"),
    (EMBED, embed(bucket_bias=None), "bucket_bias: expected a torch.Tensor, got NoneType."),
    (EMBED, embed(w2=torch.ones(3, 3).double()), "w2: expected dtype float32, got float64. Convert"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "op", "call", "text"), grouped({ValueError: VALUES, TypeError: TYPES})
)
def test_errors(error: Any, op: str, call: Callable[[], Any], text: str) -> None:
    with refused(f"[{op}] {text}", error):
        call()


def test_checks_find_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = E.clone()
    bad[1, 2, 3] = torch.nan
    route(bad)()
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    text = "embeddings: expected finite values, got nan at [1, 2, 3]"
    with refused(f"[{ROUTE}] {text}"):
        route(bad)()
    for name, x in zip(NAMES, BUCKET):
        with refused(f"[{EMBED}] {name}: expected finite values, got inf at"):
            embed(**{name: x.abs() / 0})()
