# SPDX-License-Identifier: Apache-2.0
"""The router: the choice of experts, its numbers and their gradients, against oracles. Laws: test_route_laws.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures import threads
from helpers import assert_no_worse_than_torch
from hotloop import moe
from routing_oracles import (
    DEEPSEEK,
    OPTIONS,
    assert_same,
    chosen,
    compared,
    joint,
    joint_loss,
    normal,
    numbers,
    tied,
    truth,
)
from torch import Tensor
from torch.nn import functional

IMPLS = ("cpu", "reference")
by_impl = pytest.mark.parametrize("impl", IMPLS)
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
one_thread = threads(1)
SIZES = [
    (1, 1), (2, 1), (2, 2), (3, 2), (60, 4), (60, 60), (128, 8), (160, 6), (160, 17), (256, 8), (256, 128), (1000, 8),
    (1000, 100), (4096, 8), (4096, 128),
]  # fmt: skip
BASIC = [OPTIONS[name] for name in ("softmax", "sigmoid", "late")]
T = 21  # two batches of eight tokens and a part of one


def assert_slope(x: Tensor, found: moe.Routing, options: dict[str, Any], slope: Tensor) -> None:
    """As near to the truth as autograd in the dtype of the logits, which loses 1 - sigmoid where that is small."""
    _, plain = truth(x, found.topk_ids, options, x.dtype)
    size = float(slope.abs().max())
    assert_no_worse_than_torch(joint(x, found), plain, slope, floor=size)


# -- against oracles ---------------------------------------------------------------------------------------


@by_impl
@pytest.mark.parametrize(("experts", "k"), SIZES, ids=lambda v: str(v))
def test_choice_numbers_and_gradient(experts: int, k: int, impl: Any) -> None:
    tokens = T if experts < 1000 else 9
    x = normal(tokens, experts, seed=k).requires_grad_()
    ids = chosen(x.detach(), k)
    counts = torch.bincount(ids.reshape(-1), minlength=experts)
    for options in OPTIONS.values() if experts < 1000 else BASIC:
        found = moe.route(x, k, **options, impl=impl)
        assert torch.equal(found.topk_ids, ids)
        assert torch.equal(found.expert_counts, counts)
        assert int(found.num_tokens) == tokens
        (weights, sums, z), slope = truth(x, ids, options)
        torch.testing.assert_close(found.topk_weights.double(), weights, rtol=3e-6, atol=1e-9)
        torch.testing.assert_close(found.prob_sums.double(), sums, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(found.logsumexp.double(), z, rtol=1e-6, atol=1e-6)
        assert_slope(x, found, options, slope)


@by_impl
@by_options
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype: torch.dtype, options: dict[str, Any], impl: Any) -> None:
    """16-bit logits are computed with in float32, as if they had been given so; only their gradient is rounded."""
    for experts, k in ((60, 4), (128, 8), (17, 17)):
        x = normal(T, experts, dtype=dtype).requires_grad_()
        found = moe.route(x, k, **options, impl=impl)
        assert torch.equal(found.topk_ids, chosen(x.detach(), k))
        (weights, sums, z), slope = truth(x, found.topk_ids, options)
        wide = dtype == torch.float64
        result = torch.float64 if wide else torch.float32
        tolerance = 1e-13 if wide else 3e-6
        for ours, theirs in (
            (found.topk_weights, weights),
            (found.prob_sums, sums),
            (found.logsumexp, z),
        ):
            assert ours.dtype == result
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
        gradient = joint(x, found)
        assert gradient.dtype == dtype
        rounded = slope.to(dtype).double()
        error = (gradient.double() - rounded).abs()
        spacing = torch.finfo(dtype).eps * rounded.abs() + torch.finfo(dtype).smallest_normal
        # At most the next number of the dtype; and what float32 itself loses.
        assert bool((error <= spacing + tolerance * 1e-1).all()), error.max()


@by_impl
@pytest.mark.parametrize(("experts", "k"), SIZES, ids=lambda v: str(v))
def test_ties_by_index_and_minus_infinity(experts: int, k: int, impl: Any) -> None:
    """Also where fewer than k logits are finite, and with zeros of both signs."""
    x = tied(T if experts < 1000 else 9, experts)
    x[0] = -0.0
    x[1] = 0.0
    x[2, 1::2] = -0.0
    x[3, :-1] = -torch.inf
    x.requires_grad_()
    ids = chosen(x.detach(), k)
    for options in OPTIONS.values() if experts < 1000 else BASIC:
        found = moe.route(x, k, **options, impl=impl)
        assert torch.equal(found.topk_ids, ids)
        (weights, sums, z), _ = truth(x, ids, options)
        torch.testing.assert_close(found.topk_weights.double(), weights, rtol=3e-6, atol=1e-9)
        torch.testing.assert_close(found.prob_sums.double(), sums, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(found.logsumexp.double(), z, rtol=1e-6, atol=1e-6)
        assert bool(joint(x, found).isfinite().all())


@by_impl
def test_extreme_logits(impl: Any) -> None:
    """The sum of exponentials overflows nowhere; sigmoids that are all 0 give weights of 0, not NaN."""
    x = torch.tensor(
        [[3e38, -3e38, 3e38, 0.0], [-3e38, -3e38, -3e38, -3e38], [1e-45, 0.0, -1e-45, -1e-38]]
    )
    for options in OPTIONS.values():
        x.requires_grad_()
        found = moe.route(x, 2, **options, impl=impl)
        assert found.topk_ids.tolist() == [[0, 2], [0, 1], [0, 1]]
        for value in (found.topk_weights, found.prob_sums, found.logsumexp, joint(x, found)):
            assert bool(value.isfinite().all())
    found = moe.route(x, 2, scoring="sigmoid", impl=impl)
    assert found.topk_weights[1].tolist() == [0.0, 0.0]


# -- groups and bias ---------------------------------------------------------------------------------------

GROUPS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "deepseek-v3": (256, 8, DEEPSEEK),
    "deepseek-v2": (160, 6, {"n_group": 8, "topk_group": 3, "group_score": "max", "renormalize": False}),
    "kimi-like": (384, 8, {"scoring": "sigmoid", "bias": normal(384) / 50}),
    "of 3": (60, 5, {"n_group": 20, "topk_group": 2}),
    "of 1": (40, 7, {"n_group": 40, "topk_group": 9, "group_score": "top2"}),
    "of 17, late": (51, 9, {"n_group": 3, "topk_group": 1, "order": "topk_then_softmax"}),
    "of 17, max": (51, 17, {"n_group": 3, "topk_group": 1, "group_score": "max", "order": "topk_then_softmax"}),
    "all open": (60, 8, {"n_group": 4, "topk_group": 4, "scoring": "sigmoid"}),
    "all of one": (64, 16, {"n_group": 4, "topk_group": 1, "scoring": "sigmoid"}),
    "more than 16": (512, 100, {"n_group": 8, "topk_group": 4, "scoring": "sigmoid", "bias": normal(512) / 10}),
    "late, bias": (33, 4, {"order": "topk_then_softmax", "bias": 5 * normal(33)}),
    "bias against softmax": (100, 8, {"bias": normal(100) / 100}),
    "4096": (4096, 32, {"n_group": 16, "topk_group": 5, "bias": normal(4096) / 4096}),
}  # fmt: skip


@by_impl
@pytest.mark.parametrize("name", GROUPS)
def test_groups_and_bias(name: str, impl: Any) -> None:
    experts, k, options = GROUPS[name]
    x = normal(T, experts, seed=9).requires_grad_()
    found = moe.route(x, k, **options, impl=impl)
    choice = {
        key: options[key] for key in ("n_group", "topk_group", "group_score") if key in options
    }
    c = compared(x, options)
    best = chosen(c, k, **choice)
    # Scores are compared in float32, so equal ones may stand in another order than in float64.
    torch.testing.assert_close(c.gather(1, found.topk_ids), c.gather(1, best), rtol=1e-6, atol=1e-7)
    assert (found.topk_ids != best).double().mean() < 0.01
    assert all(len(set(row)) == k for row in found.topk_ids.tolist())
    assert torch.equal(
        found.expert_counts, torch.bincount(found.topk_ids.reshape(-1), minlength=experts)
    )
    (weights, sums, z), slope = truth(x, found.topk_ids, options)
    torch.testing.assert_close(found.topk_weights.double(), weights, rtol=3e-6, atol=1e-9)
    torch.testing.assert_close(found.prob_sums.double(), sums, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(found.logsumexp.double(), z, rtol=1e-6, atol=1e-6)
    assert_slope(x, found, options, slope)


@by_impl
def test_groups_of_equal_worth_are_taken_by_index(impl: Any) -> None:
    x = tied(40, 48, seed=5)
    for score in ("top2", "max"):
        for experts in (48, 6):
            rows = x[:, -experts:]
            options: Any = {
                "n_group": 6,
                "topk_group": 3,
                "group_score": score,
                "order": "topk_then_softmax",
            }
            found = moe.route(rows, 3, **options, impl=impl)
            assert torch.equal(found.topk_ids, chosen(rows, 3, 6, 3, score))


@by_impl
def test_weights_are_of_the_chosen_alone_where_the_best_is_left_out(impl: Any) -> None:
    """Beside the largest logit, whose group is worth less, or that a bias keeps out, the chosen ones are nothing."""
    x = torch.tensor([[0.0, 1.0, 300.0, -900.0]], requires_grad=True)
    late: Any = {"order": "topk_then_softmax", "impl": impl}
    for options in (
        {"n_group": 2, "topk_group": 1},
        {"bias": torch.tensor([0.0, 0.0, -1e4, 0.0])},
    ):
        found = moe.route(x, 2, **late, **options)
        assert found.topk_ids.tolist() == [[1, 0]]
        torch.testing.assert_close(found.topk_weights, torch.tensor([[1.0, 0.0]]).softmax(-1))
        slope = torch.autograd.grad(found.topk_weights[0, 0], x)[0]
        p = float(found.topk_weights[0, 0].detach())
        torch.testing.assert_close(slope, torch.tensor([[-p * (1 - p), p * (1 - p), 0, 0]]))


@by_impl
def test_chosen_experts_that_are_all_excluded_weigh_nothing(impl: Any) -> None:
    """A group with one finite logit is worth -inf, and so is the first one."""
    x = torch.tensor([[-torch.inf] * 3 + [1.0]], requires_grad=True)
    found = moe.route(x, 2, n_group=2, topk_group=1, order="topk_then_softmax", impl=impl)
    assert found.topk_ids.tolist() == [[0, 1]]
    assert found.topk_weights.tolist() == [[0.0, 0.0]]
    assert torch.autograd.grad(found.topk_weights[0, 0], x)[0].tolist() == [[0.0] * 4]


# -- the catalogue's oracles -------------------------------------------------------------------------------


@by_impl
def test_both_orders_are_the_same_when_normalised(impl: Any) -> None:
    x = normal(T, 60)
    first, second = (
        moe.route(x, 4, order=order, impl=impl)
        for order in ("softmax_then_topk", "topk_then_softmax")
    )
    assert_same(first, second, rtol=1e-6)


@by_impl
def test_all_experts_are_the_dense_softmax(impl: Any) -> None:
    x = normal(T, 24)
    found = moe.route(x, 24, renormalize=False, impl=impl)
    dense = torch.zeros(T, 24).scatter(1, found.topk_ids, found.topk_weights)
    torch.testing.assert_close(dense, x.softmax(-1), rtol=1e-6, atol=1e-8)
    uniform = moe.route(torch.zeros(T, 24), 24, impl=impl)
    torch.testing.assert_close(uniform.topk_weights, torch.full((T, 24), 1 / 24))


@by_impl
def test_bias_decides_the_choice_alone(impl: Any) -> None:
    x, bias = normal(T, 32), normal(32) / 4
    s = x.sigmoid()
    plain: Any = {"scoring": "sigmoid", "impl": impl}
    none = moe.route(x, 4, **plain)
    assert torch.equal(none.topk_ids, torch.topk(s, 4).indices)
    assert_same(moe.route(x, 4, bias=torch.zeros(32), **plain), none, rtol=1e-6)
    found = moe.route(x, 4, bias=bias, **plain)
    assert torch.equal(found.topk_ids, torch.topk(s + bias, 4).indices)
    assert not torch.equal(found.topk_ids, none.topk_ids)
    assert_same(moe.route(x, 4, bias=bias + 0.5, **plain), found)
    kept = s.gather(1, found.topk_ids)
    torch.testing.assert_close(found.topk_weights, kept / kept.sum(-1, keepdim=True))


def test_the_gate_of_megablocks() -> None:
    """LearnedRouter: softmax, top-k, and the p-norm with p = 1 where weights are normalised."""
    x = normal(T, 16)
    scores = functional.softmax(x, dim=-1)
    weights, ids = torch.topk(scores, 2, dim=-1)
    found = moe.route(x, 2, renormalize=False)
    assert torch.equal(found.topk_ids, ids)
    torch.testing.assert_close(found.topk_weights, weights)
    weights = weights / torch.norm(weights, p=1, dim=-1, keepdim=True)
    torch.testing.assert_close(moe.route(x, 2).topk_weights, weights)


def test_the_gate_of_deepseek_v3_as_flashinfer_tests_it() -> None:
    x, bias = normal(64, 256), DEEPSEEK["bias"]
    s = x.sigmoid()
    c = s + bias
    groups = c.view(64, 8, 32).topk(2, dim=-1).values.sum(-1).topk(4, dim=-1).indices
    kept = torch.zeros(64, 8).scatter(1, groups, 1.0).repeat_interleave(32, dim=1)
    ids = torch.where(kept > 0, c, -torch.inf).topk(8, dim=-1).indices
    weights = s.gather(1, ids)
    weights = 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)
    found = moe.route(x, 8, **DEEPSEEK)
    assert torch.equal(found.topk_ids, ids)
    torch.testing.assert_close(found.topk_weights, weights)


# -- gradients ---------------------------------------------------------------------------------------------

MORE: dict[str, dict[str, Any]] = {
    "groups": {"scoring": "sigmoid", "n_group": 3, "topk_group": 2},
    "softmax-groups": {"n_group": 3, "topk_group": 2},
    "late-bias": {"order": "topk_then_softmax", "bias": normal(6, dtype=torch.float64)},
    "bias": {"bias": normal(6, dtype=torch.float64)},
    "masked": {"token_mask": torch.tensor([True, False, True])},
}


@pytest.mark.parametrize("options", (OPTIONS | MORE).values(), ids=OPTIONS | MORE)
def test_gradcheck(options: dict[str, Any]) -> None:
    x = normal(3, 6, seed=2, dtype=torch.float64).requires_grad_()

    def values(x: Tensor) -> tuple[Tensor, ...]:
        found = moe.route(x, 2, **options, impl="cpu")
        return found.topk_weights, found.prob_sums, found.logsumexp

    assert torch.autograd.gradcheck(values, (x,))
    assert torch.autograd.gradgradcheck(values, (x,))


@by_impl
@pytest.mark.parametrize("options", (OPTIONS | MORE).values(), ids=OPTIONS | MORE)
def test_gradients_add_up(options: dict[str, Any], impl: Any) -> None:
    """Of weights, sums and log-sum-exp by themselves, two at a time, and all at once."""
    x = normal(3, 6, seed=2, dtype=torch.float64).requires_grad_()

    def slope(use: tuple[str, ...]) -> Tensor:
        found = moe.route(x, 2, **options, impl=impl)
        return torch.autograd.grad(joint_loss(*(getattr(found, name) for name in use)), x)[0]

    names = ("topk_weights", "prob_sums", "logsumexp")
    each = [slope((name,)) for name in names]
    for i in range(3):
        others = [j for j in range(3) if j != i]
        torch.testing.assert_close(
            slope(tuple(names[j] for j in others)), each[others[0]] + each[others[1]]
        )
    torch.testing.assert_close(slope(names), sum(each))


def test_what_has_no_gradient() -> None:
    x = normal(5, 6).requires_grad_()
    bias = torch.zeros(6, requires_grad=True)
    found = moe.route(x, 2, bias=bias)
    assert [v.requires_grad for v in found[:6]] == [False, True, False, True, True, False]
    assert not any(v.requires_grad for v in found.dispatch)
    assert torch.autograd.grad(joint_loss(*found[1:2]), [x, bias], allow_unused=True)[1] is None
    with torch.no_grad():
        assert not any(v.requires_grad for v in moe.route(x, 2)[:6])


# -- the oracle --------------------------------------------------------------------------------------------


def test_numbers_is_not_the_reference() -> None:
    """The oracle of this file on numbers worked out by hand: logits log 1, log 2, log 5."""
    x = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log()
    found = numbers(x, torch.tensor([[2, 1]]), routed_scale=7.0)
    assert chosen(x, 2).tolist() == [[2, 1]]
    torch.testing.assert_close(found.weights, torch.tensor([[5.0, 2.0]], dtype=torch.float64))
    torch.testing.assert_close(found.prob_sums, torch.tensor([1, 2, 5], dtype=torch.float64) / 8)
    torch.testing.assert_close(found.logsumexp.exp(), torch.tensor([8.0], dtype=torch.float64))
