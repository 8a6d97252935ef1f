# SPDX-License-Identifier: Apache-2.0
"""The router: what it sees of tokens and memory, the same bits everywhere, laws, torch.compile, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures import CORE, LEVELS, threads
from helpers import strided, with_threads
from hotloop import moe
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Table, assert_refused, refused
from routing_oracles import DEEPSEEK, OPTIONS, assert_same, joint, joint_loss, normal, tied
from torch import Tensor

IMPLS = ("cpu", "reference")
by_impl = pytest.mark.parametrize("impl", IMPLS)
one_thread = threads(1)
few = settings(max_examples=40, deadline=None)
T = 21  # two batches of eight tokens and a part of one


# -- what is seen of tokens and memory ---------------------------------------------------------------------


@by_impl
@pytest.mark.parametrize("options", [*OPTIONS.values(), DEEPSEEK], ids=[*OPTIONS, "deepseek-v3"])
def test_padding_is_counted_nowhere_and_not_read(options: dict[str, Any], impl: Any) -> None:
    x = normal(50, 256)
    mask = torch.arange(50) % 3 > 0
    filled = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    kept = x[mask].requires_grad_()
    for form in (mask, mask.to(torch.uint8), mask.long() * 7):
        found = moe.route(filled, 8, **options, token_mask=form, impl=impl)
        alone = moe.route(kept, 8, **options, impl=impl)
        assert int(found.num_tokens) == int(mask.sum())
        assert torch.equal(found.topk_ids[mask], alone.topk_ids)
        assert torch.equal(found.topk_weights[mask], alone.topk_weights)
        assert torch.equal(found.logsumexp[mask], alone.logsumexp)
        assert torch.equal(found.expert_counts, alone.expert_counts)
        torch.testing.assert_close(found.prob_sums, alone.prob_sums)
        assert bool((found.topk_ids[~mask] == -1).all())
        assert bool((found.topk_weights[~mask] == 0).all())
        assert bool((found.logsumexp[~mask] == 0).all())
        assert torch.equal(found.dispatch.expert_counts, found.expert_counts)
        assert bool((found.dispatch.row_of_slot.view(50, 8)[~mask] == -1).all())
        slope = joint(filled, found)
        assert bool((slope[~mask] == 0).all())
        assert bool(slope.isfinite().all())
    nothing = moe.route(
        filled, 8, **options, token_mask=torch.zeros(50, dtype=torch.bool), impl=impl
    )
    assert int(nothing.num_tokens) == int(nothing.expert_counts.sum()) == 0
    assert bool((nothing.prob_sums == 0).all())
    assert bool((nothing.dispatch.slot_of_row == -1).all())


@by_impl
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, impl: Any) -> None:
    for experts, k in ((1, 1), (6, 2), (256, 8)):
        x = normal(tokens, experts).requires_grad_()
        found = moe.route(x, k, impl=impl)
        assert found.topk_ids.shape == found.topk_weights.shape == (tokens, k)
        assert found.logsumexp.shape == (tokens,)
        assert found.expert_counts.shape == found.prob_sums.shape == (experts,)
        assert int(found.num_tokens) == tokens
        assert int(found.expert_counts.sum()) == tokens * k
        torch.testing.assert_close(float(found.prob_sums.sum().detach()), float(tokens))
        assert found.dispatch.slot_of_row.shape == (tokens * k,)
        assert joint(x, found).shape == x.shape


@by_impl
def test_memory_of_any_form(impl: Any) -> None:
    """Rows and columns with strides, transposed, shifted, one row for all; and nothing is written to."""
    x = normal(T, 64)
    wide = normal(T + 1, 200)
    wide[:T, 3:67] = x
    before = wide.clone()
    expected = moe.route(x, 8, impl=impl)
    rtol = 1e-6 if impl == "reference" else 0
    for form in (
        strided(x),
        wide[:T, 3:67],
        x.T.contiguous().T,
        x.flip(0).flip(0),
        wide[:, 3:67][:T],
    ):
        assert torch.equal(form, x)
        leaf = form.detach().requires_grad_()
        found = moe.route(leaf, 8, impl=impl)
        assert_same(found, expected, rtol)
        assert joint(leaf, found).shape == x.shape
    assert torch.equal(wide, before)
    row = moe.route(x[:1].expand(T, 64), 8, impl=impl)
    assert torch.equal(row.topk_ids, expected.topk_ids[:1].expand(T, 8))
    bias = normal(128) / 9
    mask = torch.arange(2 * T) % 3 > 0
    found = moe.route(x, 8, bias=bias[::2], token_mask=mask[::2], impl=impl)
    plain = moe.route(x, 8, bias=bias[::2].clone(), token_mask=mask[::2].clone(), impl=impl)
    assert_same(found, plain)


def test_gradients_from_above_of_any_form() -> None:
    x = normal(T, 60).requires_grad_()
    found = moe.route(x, 4)
    values = [found.topk_weights, found.prob_sums, found.logsumexp]
    grads = [normal(*v.shape, seed=4) for v in values]
    expected = torch.autograd.grad(values, x, grads, retain_graph=True)[0]
    strides = [strided(g) for g in grads]
    assert torch.equal(torch.autograd.grad(values, x, strides, retain_graph=True)[0], expected)
    ones = torch.autograd.grad(sum(v.sum() for v in values), x)[0]  # gradients with a stride of 0
    assert bool(ones.isfinite().all())


def test_a_dispatch_is_that_of_the_ids() -> None:
    x = normal(3000, 60)
    mask = torch.arange(3000) % 5 > 0
    found = moe.route(x, 4, token_mask=mask)
    assert_same(found.dispatch, moe.dispatch(found.topk_ids, 60, impl="reference"))
    assert moe.route(x, 4, dispatch=False).dispatch is None


# -- the same numbers everywhere ---------------------------------------------------------------------------

EVERYWHERE: dict[str, tuple[int, int, dict[str, Any]]] = {
    "softmax": (60, 4, {}),
    "sums": (256, 8, {"renormalize": False}),
    "deepseek-v3": (256, 8, DEEPSEEK),
    "late": (129, 20, {"order": "topk_then_softmax", "bias": normal(129)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERYWHERE)
def test_same_bits_at_every_level_and_number_of_threads(name: str, dtype: torch.dtype) -> None:
    experts, k, options = EVERYWHERE[name]
    x = normal(1500, experts, dtype=dtype).requires_grad_()
    mask = torch.arange(1500) % 7 > 0

    def run() -> list[Any]:
        found = moe.route(x, k, **options, token_mask=mask, impl="cpu")
        return [*found[:6], *found.dispatch, joint(x, found)]

    expected = run()
    for level in LEVELS:
        CORE.force_simd_level(level)
        for count in (1, 2):
            found = with_threads(count, run)
            assert CORE.last_simd_level() == level
            assert_same(found, expected)


def test_a_token_has_the_same_numbers_in_any_batch() -> None:
    x = normal(100, 60).requires_grad_()
    whole = moe.route(x, 4)
    for begin, end in ((0, 1), (3, 12), (50, 100)):
        part = moe.route(x[begin:end], 4)
        assert torch.equal(part.topk_ids, whole.topk_ids[begin:end])
        assert torch.equal(part.topk_weights, whole.topk_weights[begin:end])
        assert torch.equal(part.logsumexp, whole.logsumexp[begin:end])


@pytest.mark.slow
@pytest.mark.parametrize("experts", [*range(1, 80), 127, 129, 255, 257, 511, 1023, 2049, 4095])
def test_every_number_of_experts_and_choices(experts: int) -> None:
    g = torch.Generator().manual_seed(experts)
    for k in sorted({1, 2, 8, 15, 16, 17, 64, 127, 128, experts - 1, experts}):
        if not 1 <= k <= min(experts, 128):
            continue
        for x in (normal(19, experts, seed=k), tied(19, experts, seed=k)):
            bias = torch.randint(-2, 3, (experts,), generator=g) / 4
            for options in (*OPTIONS.values(), {"order": "topk_then_softmax", "bias": bias}):
                found, plain = (moe.route(x, k, **options, impl=impl) for impl in IMPLS)  # type: ignore[arg-type]
                assert_same(found, plain, rtol=3e-6, atol=1e-6)


# -- laws --------------------------------------------------------------------------------------------------


@st.composite
def cases(draw: Any) -> tuple[Tensor, int, dict[str, Any], Tensor]:
    """Logits that are all different, k, options, and which tokens count."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    size = draw(st.integers(1, 40))
    open_ = draw(st.integers(1, groups))
    k = draw(st.integers(1, min(size * open_, 20)))
    tokens = draw(st.integers(0, 30))
    experts = groups * size
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    each = torch.rand((tokens, experts), generator=g).argsort(-1)
    options: dict[str, Any] = {"n_group": groups, "topk_group": open_, "group_score": "max"}
    options |= draw(st.sampled_from(list(OPTIONS.values())))
    mask = torch.rand(tokens, generator=g) < 0.8
    return each.float() / 8 - 2, k, options, mask


@few
@given(cases())
def test_tokens_are_conserved(case: Any) -> None:
    x, k, options, mask = case
    found = moe.route(x, k, **options, token_mask=mask)
    assert int(found.expert_counts.sum()) == k * int(mask.sum()) == k * int(found.num_tokens)
    rows = found.dispatch.slot_of_row
    kept = rows[rows >= 0]
    assert sorted(kept.tolist()) == [t * k + j for t in range(len(x)) if mask[t] for j in range(k)]
    assert torch.equal(
        found.topk_ids.reshape(-1)[kept], found.topk_ids.reshape(-1)[kept].sort().values
    )
    assert torch.equal(found.dispatch.row_of_slot[kept], torch.arange(len(kept)))
    total = options.get("routed_scale", 1.0)
    if options.get("renormalize", True):
        torch.testing.assert_close(found.topk_weights.sum(-1), total * mask.float())
    torch.testing.assert_close(float(found.prob_sums.sum()), float(mask.sum()), rtol=1e-5, atol=0)


@few
@given(cases(), st.integers(0, 2**32))
def test_permuting_experts_permutes_nothing_else(case: Any, seed: int) -> None:
    x, k, options, mask = case
    options = options | {"n_group": 1, "topk_group": 1}
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))
    found, moved = (moe.route(rows, k, **options, token_mask=mask) for rows in (x, x[:, order]))
    back = torch.where(moved.topk_ids < 0, -1, order[moved.topk_ids.clamp(min=0)])
    assert torch.equal(back, found.topk_ids)
    assert torch.equal(moved.expert_counts, found.expert_counts[order])
    torch.testing.assert_close(moved.topk_weights, found.topk_weights, rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(moved.prob_sums, found.prob_sums[order], rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(moved.logsumexp, found.logsumexp, rtol=1e-6, atol=1e-6)


@few
@given(cases(), st.integers(-8, 8))
def test_a_constant_moves_the_log_sum_exp_alone(case: Any, constant: int) -> None:
    x, k, options, mask = case
    if options.get("scoring") == "sigmoid":
        return
    found, moved = (moe.route(rows, k, **options, token_mask=mask) for rows in (x, x + constant))
    assert torch.equal(moved.topk_ids, found.topk_ids)
    torch.testing.assert_close(moved.topk_weights, found.topk_weights, rtol=1e-6, atol=1e-8)
    shifted = found.logsumexp + constant * mask
    torch.testing.assert_close(moved.logsumexp, shifted, rtol=1e-6, atol=2e-6)


# -- torch.compile and torch.func --------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_training_step_compiles(dynamic: bool) -> None:
    """What the calls of the catalogue do not have: 16 bits, strides, both losses on top, a bias that is a buffer."""

    def step(x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
        found = moe.route(x, 4, **{**DEEPSEEK, "bias": bias}, token_mask=mask)
        total = joint_loss(found.topk_weights) + moe.load_balance_loss(found)
        return total + moe.router_z_loss(found) + found.dispatch.slot_of_row.sum()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (12, 20) if dynamic else (12,):
        x = strided(normal(tokens, 256, dtype=torch.bfloat16)).requires_grad_()
        mask = torch.arange(tokens) % 3 > 0
        found, expected = (run(x, mask, DEEPSEEK["bias"]) for run in (compiled, step))
        torch.testing.assert_close(found, expected)
        slopes = (torch.autograd.grad(total, x)[0] for total in (found, expected))
        assert torch.equal(*slopes)


def test_a_compiled_call_refuses_numbers_when_it_runs() -> None:
    torch.compiler.reset()
    run = torch.compile(lambda x: moe.route(x, 2).topk_weights, fullgraph=True, backend="aot_eager")
    assert run(torch.zeros(3, 4)).shape == (3, 2)
    with pytest.raises(ValueError, match=r"\[route\] router_logits: expected numbers below inf"):
        run(torch.full((3, 4), torch.nan))


def test_transforms_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"\[route\]"):
        torch.func.vmap(lambda x: moe.route(x, 2, impl="cpu").topk_weights)(normal(2, 3, 4))


# -- errors ------------------------------------------------------------------------------------------------


def spoilt(x: Tensor, value: float, *at: int) -> Tensor:
    x = x.clone()
    x[at] = value
    return x


X = torch.zeros(3, 6)
LATE = {"order": "topk_then_softmax"}
NUMBERS = "expected numbers below inf, one of each row finite, got"
VALUES: Table = {
    r"router_logits: expected 2 dimension\(s\), got shape \(6,\)": X[0],
    r"router_logits: expected 1 to 4096 experts in the last dimension, got shape \(3, 0\)": X[:, :0],
    r"router_logits: expected 1 to 4096 experts in the last dimension, got shape \(1, 4097\)": torch.zeros(1, 4097),
    rf"router_logits: {NUMBERS} nan at \[1, 2\] \(1 of 18\)": spoilt(X, torch.nan, 1, 2),
    rf"router_logits: {NUMBERS} inf at \[2, 0\] \(1 of 18\)": spoilt(X, torch.inf, 2, 0),
    rf"router_logits: {NUMBERS} -inf at \[2, 0\] \(6 of 18\)": spoilt(X, -torch.inf, 2),
    "top_k: expected an integer >= 1 and <= 6, got 7": 7,
    "top_k: expected an integer >= 1 and <= 6, got 0": 0,
    "top_k: expected an integer >= 1 and <= 128, got 129": {"router_logits": torch.zeros(1, 200), "top_k": 129},
    "scoring: expected one of softmax, sigmoid, got 'relu'": "relu",
    "order: expected one of softmax_then_topk, topk_then_softmax, got 'topk'": "topk",
    "order: expected 'softmax_then_topk' with scoring='sigmoid', got 'topk_then": {**LATE, "scoring": "sigmoid"},
    "renormalize: expected True with order='topk_then_softmax', got False": {**LATE, "renormalize": False},
    "n_group: expected a divisor of 6, the number of experts, got 4": 4,
    "n_group: expected an integer >= 1 and <= 6, got 0": 0,
    "topk_group: expected an integer >= 1 and <= 3, got 4": {"n_group": 3, "topk_group": 4},
    "topk_group: expected an integer >= 1 and <= 3, got 0": {"n_group": 3, "topk_group": 0},
    "top_k: expected at most 2, the experts of 1 of 3 groups, got 3": {"n_group": 3, "topk_group": 1, "top_k": 3},
    "group_score: expected one of top2, max, got 'sum'": "sum",
    r"bias: expected shape \(6,\)": torch.zeros(5),
    r"bias: expected finite numbers, got inf at \[1\] \(1 of 6\)": spoilt(X[0], torch.inf, 1),
    r"bias: expected finite numbers, got nan at \[0\] \(1 of 6\)": spoilt(X[0], torch.nan, 0),
    "routed_scale: expected": {"routed_scale": 0.0},
    r"token_mask: expected shape \(3,\)": torch.ones(4, dtype=torch.bool),
    "impl: expected one of": "gpu",
}  # fmt: skip
TYPES: Table = {
    "router_logits: expected a torch.Tensor, got list": [[0.0]],
    "router_logits: expected dtype float32": X.long(),
    "top_k: expected an integer": 2.0,
    "renormalize: expected": 1,
    "dispatch: expected": "yes",
    "bias: expected dtype": torch.zeros(6, dtype=torch.int64),
    "token_mask: expected dtype bool, uint8, int32, int64, got float32": torch.ones(3),
}


@by_impl
@refused(VALUES, TYPES)
def test_refused(text: str, changes: dict[str, Any], kind: type[Exception], impl: str) -> None:
    assert_refused(moe.route, {"router_logits": X, "top_k": 2, "impl": impl} | changes, kind, text)


def test_a_bad_token_of_any_block_is_found() -> None:
    """And one that the mask leaves out is not."""
    for bad in (0, 63, 64, 500, 999):
        x = normal(1000, 60)
        x[bad, 59] = torch.nan
        for dtype in (torch.float32, torch.bfloat16):
            with pytest.raises(ValueError, match=rf"got nan at \[{bad}, 59\] \(1 of 60000\)"):
                moe.route(x.to(dtype), 4)
        moe.route(x, 4, token_mask=torch.arange(1000) != bad)
