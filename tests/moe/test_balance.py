# SPDX-License-Identifier: Apache-2.0
"""Losses of a router against formulas written out in float64, their closed forms, and balance by a bias."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from fixtures import threads
from helpers import assert_no_worse_than_torch, with_threads
from hotloop import moe
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Table, assert_refused, refused
from routing_oracles import chosen, compared, normal, numbers
from torch import Tensor
from torch.nn import functional

IMPLS = ("cpu", "reference")
by_impl = pytest.mark.parametrize("impl", IMPLS)
one_thread = threads(1)
few = settings(max_examples=40, deadline=None)
CONVENTIONS = ("switch", "mixtral", "fastmoe")
T, E, K = 30, 12, 3


def balance(p: Tensor, ids: Tensor, convention: str) -> Tensor:
    """As the papers and their code write it, from probabilities (T, E) and ids (T, k)."""
    (tokens, experts), k = p.shape, ids.shape[1]
    counts = torch.bincount(ids.reshape(-1), minlength=experts).to(p.dtype)
    if convention == "switch":
        return experts * ((counts / (tokens * k)) * p.mean(0)).sum()
    if convention == "mixtral":
        per_choice = functional.one_hot(ids, experts).to(p.dtype).mean(0)  # (k, E), as transformers
        return experts * (per_choice * p.mean(0)[None]).sum()
    return experts * ((counts / (tokens * k)) * (p.sum(0) / (tokens * k))).sum()


# -- load balance ------------------------------------------------------------------------------------------


@by_impl
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_by_its_formula(convention: Any, scoring: Any, impl: Any) -> None:
    x = normal(T, E).requires_grad_()
    found = moe.route(x, K, scoring=scoring, impl=impl)
    loss = moe.load_balance_loss(found, convention)
    slopes = []
    for dtype in (torch.float64, torch.float32):
        wide = x.detach().to(dtype).requires_grad_()
        p = wide.softmax(-1)
        if scoring == "sigmoid":
            p = wide.sigmoid() / wide.sigmoid().sum(-1, keepdim=True)
        plain = balance(p, found.topk_ids, convention)
        if dtype == torch.float64:
            torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=0)
        slopes.append(torch.autograd.grad(plain, wide)[0])
    (slope,) = torch.autograd.grad(loss, x)
    truth, same_dtype = slopes
    assert_no_worse_than_torch(slope, same_dtype, truth, floor=float(truth.abs().max()))


def test_the_gradient_of_the_catalogue() -> None:
    """dL / dlogit = P_t (a - <P_t, a>), a_i = E f_i / T."""
    x = normal(T, E, dtype=torch.float64).requires_grad_()
    found = moe.route(x, K)
    (slope,) = torch.autograd.grad(moe.load_balance_loss(found), x)
    p = x.detach().softmax(-1)
    a = E * (found.expert_counts / (T * K)) / T
    torch.testing.assert_close(slope, p * (a - (p * a).sum(-1, keepdim=True)))


def test_closed_forms() -> None:
    """Balanced and uniform: 1, k and 1 / k. All on one expert: E, and E for every convention with k = 1."""
    uniform = moe.route(
        torch.eye(E).repeat(4, 1) * 1e-4 + torch.eye(E).roll(1, 1).repeat(4, 1) * 1e-4, 2
    )
    assert uniform.expert_counts.tolist() == [8] * E
    one = moe.route(functional.one_hot(torch.full((T,), 5), E) * 200.0, 1)
    for convention, value in zip(CONVENTIONS, (1.0, 2.0, 0.5)):
        found = float(moe.load_balance_loss(uniform, convention))  # type: ignore[arg-type]
        assert found == pytest.approx(value, rel=1e-5)
        found = float(moe.load_balance_loss(one, convention))  # type: ignore[arg-type]
        assert found == pytest.approx(E)


def test_the_loss_of_megablocks() -> None:
    """batched_load_balancing_loss: E * w / (layers * T * k) * <counts, mean P>, summed over layers; here w = layers."""
    x = normal(T, E)
    found = moe.route(x, K)
    counts, scores = found.expert_counts.float(), x.softmax(-1)
    wanted = E / (T * K) * torch.dot(counts, scores.mean(0))
    torch.testing.assert_close(moe.load_balance_loss(found), wanted)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_layers_count_as_one_with_all_their_tokens(convention: Any) -> None:
    """Also layers of different lengths, and tokens left out of some."""
    xs = [normal(n, E, dtype=torch.float64).requires_grad_() for n in (T, 7, 16)]
    masks = [None, torch.arange(7) != 2, torch.arange(16) > 3]
    layers = [moe.route(x, K, token_mask=mask) for x, mask in zip(xs, masks)]
    rows = torch.cat([x if mask is None else x[mask] for x, mask in zip(xs, masks)])
    ids = torch.cat([layer.topk_ids[layer.topk_ids[:, 0] >= 0] for layer in layers])
    wanted = balance(rows.softmax(-1), ids, convention)
    found = moe.load_balance_loss(layers, convention)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, xs), torch.autograd.grad(wanted, xs), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(moe.router_z_loss(layers), rows.logsumexp(-1).square().mean())


def test_counts_of_all_ranks() -> None:
    """Two ranks with the counts of both have the mean of their losses equal to the loss of the whole batch."""
    x = normal(2 * T, E, dtype=torch.float64)
    whole = moe.route(x, K)
    ranks = [moe.route(part, K) for part in (x[:T], x[T:])]
    counts = ranks[0].expert_counts + ranks[1].expert_counts
    for more in ({}, {"num_tokens": 2 * T}, {"num_tokens": torch.tensor(2 * T)}):
        parts = [moe.load_balance_loss(rank, expert_counts=counts, **more) for rank in ranks]  # type: ignore[arg-type]
        torch.testing.assert_close(sum(parts) / 2, moe.load_balance_loss(whole))
        halves = moe.load_balance_loss(ranks[0], expert_counts=counts.float() / 2, num_tokens=T)
        torch.testing.assert_close(halves, parts[0])


def test_one_pass_back_gives_all_gradients_of_a_training_step() -> None:
    """Weights, load balance and z-loss together, as autograd gives them; with padding that is NaN."""
    x = normal(64, E, dtype=torch.float64)
    mask = torch.arange(64) % 4 > 0
    outputs = normal(64, K, seed=8, dtype=torch.float64)
    padded = torch.where(mask[:, None], x, torch.nan).requires_grad_()
    found = moe.route(padded, K, token_mask=mask)
    loss = (found.topk_weights * outputs).sum()
    loss = loss + 0.5 * moe.load_balance_loss(found) + 0.1 * moe.router_z_loss(found)
    kept = x[mask].requires_grad_()
    ids = found.topk_ids[mask]
    weights, _, z = numbers(kept, ids)
    plain = (weights * outputs[mask]).sum() + 0.1 * z.square().mean()
    plain = plain + 0.5 * balance(kept.softmax(-1), ids, "switch")
    torch.testing.assert_close(loss, plain)
    (slope,), (wanted,) = torch.autograd.grad(loss, padded), torch.autograd.grad(plain, kept)
    torch.testing.assert_close(slope[mask], wanted)
    assert bool((slope[~mask] == 0).all())


def test_no_token_is_no_loss() -> None:
    for x, mask in ((normal(0, E), None), (normal(4, E), torch.zeros(4, dtype=torch.bool))):
        x.requires_grad_()
        for run in (
            lambda *a, **b: moe.load_balance_loss(moe.route(*a, **b)),
            lambda *a, **b: moe.router_z_loss(moe.route(*a, **b)),
            moe.sequence_balance_loss,
        ):
            loss = run(x, K, token_mask=mask)
            assert float(loss.detach()) == 0.0
            assert bool((torch.autograd.grad(loss, x)[0] == 0).all())


# -- z-loss ------------------------------------------------------------------------------------------------


@by_impl
def test_z_loss(impl: Any) -> None:
    x = normal(T, E, dtype=torch.float64).requires_grad_()
    loss = moe.router_z_loss(moe.route(x, K, impl=impl))
    z = x.detach().logsumexp(-1)
    torch.testing.assert_close(loss.detach(), z.square().mean())
    (slope,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(slope, 2 / T * z[:, None] * x.detach().softmax(-1))
    none = moe.route(torch.full((T, 8), -float(torch.tensor(8.0).log())), K, impl=impl)
    assert float(moe.router_z_loss(none)) < 1e-12
    shifted = moe.route(x.detach() + 3, K, impl=impl)
    torch.testing.assert_close(moe.router_z_loss(shifted), (z + 3).square().mean())


# -- balance inside sequences ------------------------------------------------------------------------------


def by_sequence(x: Tensor, ids: Tensor, offsets: list[int], mask: Tensor, scoring: str) -> Tensor:
    """A loop over sequences; ids are those of all tokens."""
    losses = []
    for begin, end in itertools.pairwise(offsets):
        use = mask[begin:end]
        rows, own = x[begin:end][use], ids[begin:end][use]
        if not len(rows):
            continue
        s = rows.sigmoid() if scoring == "sigmoid" else rows.softmax(-1)
        p = (s / s.sum(-1, keepdim=True)).mean(0)
        f = torch.bincount(own.reshape(-1), minlength=x.shape[1]).to(x.dtype)
        losses.append((f * x.shape[1] / (own.shape[1] * len(rows)) * p).sum())
    return torch.stack(losses).mean()


OFFSETS = [0, 0, 5, 6, 18, 18, 30]
SEQUENCES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "softmax": {"scoring": "softmax"},
    "biased": {"bias": normal(E, dtype=torch.float64) / 3},
    "groups": {"n_group": 4, "topk_group": 2},
    "groups, max": {"n_group": 4, "topk_group": 2, "group_score": "max", "scoring": "softmax"},
}


@by_impl
@pytest.mark.parametrize("options", SEQUENCES.values(), ids=SEQUENCES)
def test_a_loop_over_sequences(options: dict[str, Any], impl: Any) -> None:
    x = normal(T, E, dtype=torch.float64).requires_grad_()
    scoring = options.get("scoring", "sigmoid")
    groups = {key: value for key, value in options.items() if key not in ("scoring", "bias")}
    ids = chosen(compared(x, {"scoring": "sigmoid", **options}), K, **groups)
    every, some = torch.ones(T, dtype=torch.bool), torch.arange(T) % 3 > 0
    some[5] = False  # a sequence of one token, which is padding
    for mask in (every, some):
        wanted = by_sequence(x, ids, OFFSETS, mask, scoring)
        given: dict[str, Any] = {"token_mask": None if bool(mask.all()) else mask, "impl": impl}
        for dtype in (torch.int32, torch.int64):
            offsets = torch.tensor(OFFSETS, dtype=dtype)
            found = moe.sequence_balance_loss(x, K, cu_seqlens=offsets, **given, **options)
            torch.testing.assert_close(found, wanted)
        (slope,), (plain,) = torch.autograd.grad(found, x), torch.autograd.grad(wanted, x)
        torch.testing.assert_close(slope, plain)
        # One sequence, and a batch of sequences of one length.
        found = moe.sequence_balance_loss(x, K, **given, **options)
        torch.testing.assert_close(found, by_sequence(x, ids, [0, T], mask, scoring))
        given["token_mask"] = None if bool(mask.all()) else mask.view(5, 6)
        found = moe.sequence_balance_loss(x.view(5, 6, E), K, **given, **options)
        torch.testing.assert_close(found, by_sequence(x, ids, list(range(0, 31, 6)), mask, scoring))


def test_at_balance_the_sequence_loss_is_one() -> None:
    x = torch.stack([torch.eye(E).roll(shift, 1) for shift in (0, 5)]) * 20
    torch.testing.assert_close(float(moe.sequence_balance_loss(x, 1, scoring="softmax")), 1.0)
    none = [moe.sequence_balance_loss(x[:0], 1, impl=impl) for impl in IMPLS]  # type: ignore[arg-type]
    packed = moe.sequence_balance_loss(x[0, :0], 1, cu_seqlens=torch.tensor([0]))
    assert [float(loss) for loss in (*none, packed)] == [0.0] * 3


def test_the_sequence_loss_has_the_same_bits_with_two_threads() -> None:
    x = normal(4000, 60).requires_grad_()
    offsets = torch.tensor([0, 100, 100, 1777, 1778, 4000])

    def run() -> list[Tensor]:
        loss = moe.sequence_balance_loss(x, 4, cu_seqlens=offsets)
        return [loss.detach(), *torch.autograd.grad(loss, x)]

    for a, b in zip(with_threads(1, run), with_threads(2, run), strict=True):
        assert torch.equal(a, b)


# -- balance by a bias -------------------------------------------------------------------------------------


def test_the_bias_moves_by_the_sign_of_the_lack() -> None:
    counts = torch.tensor([10, 0, 4, 5, 6])
    for dtype in (torch.float32, torch.float64):
        bias = torch.zeros(5, dtype=dtype)
        assert moe.update_routing_bias(bias, counts, 0.5) is bias
        assert bias.tolist() == [-0.5, 0.5, 0.5, 0.0, -0.5]
        moe.update_routing_bias(bias, counts.double() / 3, 0.25)
        # 10 / 3 and its like are not exact, and neither is their mean: all but the middle one are far from it.
        assert bias[[0, 1, 2, 4]].tolist() == [-0.75, 0.75, 0.75, -0.75]
    balanced = normal(5)
    before = balanced.clone()
    for even in (torch.full((5,), 7), torch.zeros(5), torch.full((5,), 2**60)):
        moe.update_routing_bias(balanced, even)
    assert torch.equal(balanced, before)


@few
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=40), st.integers(0, 2**32))
def test_the_centred_step_differs_by_a_constant(counts: list[int], seed: int) -> None:
    """So it routes alike, and keeps the sum; and the sign of a lack of one in 2^40 is right."""
    bias = normal(len(counts), seed=seed, dtype=torch.float64)
    given_ = torch.tensor(counts)
    plain = moe.update_routing_bias(bias.clone(), given_, 1e-3)
    centred = moe.update_routing_bias(bias.clone(), given_, 1e-3, centred=True)
    n, total = len(counts), sum(counts)
    signs = [(total > n * c) - (total < n * c) for c in counts]
    torch.testing.assert_close(plain, bias + 1e-3 * torch.tensor(signs, dtype=torch.float64))
    gap = plain - centred
    torch.testing.assert_close(gap, gap[:1].expand(n), rtol=0, atol=1e-14)
    torch.testing.assert_close(centred.sum(), bias.sum(), rtol=0, atol=1e-12)
    x = normal(8, n, seed=seed, dtype=torch.float64)
    for k in (1, (n + 1) // 2):
        first, second = (moe.route(x, k, scoring="sigmoid", bias=b) for b in (plain, centred))
        assert torch.equal(first.topk_ids, second.topk_ids)


@pytest.mark.parametrize(
    ("rate", "steps"), [(1e-2, 250), pytest.param(1e-3, 4000, marks=pytest.mark.slow)]
)
def test_a_skewed_router_becomes_balanced(rate: float, steps: int) -> None:
    """The catalogue's run: E = 8, k = 2, 512 tokens; the load of the fullest expert over the mean."""
    g = torch.Generator().manual_seed(0)
    skew = torch.linspace(1.5, -1.5, 8)
    bias, loads = torch.zeros(8), []
    for _ in range(steps):
        x = torch.randn(512, 8, generator=g) + skew
        counts = moe.route(x, 2, scoring="sigmoid", bias=bias, dispatch=False).expert_counts
        loads.append(float(counts.max()) / 128)
        moe.update_routing_bias(bias, counts, rate)
    assert loads[0] > 2
    assert sum(loads[-20:]) / 20 < 1.2


# -- errors ------------------------------------------------------------------------------------------------

ROUTED = moe.route(torch.zeros(2, 4), 2)
OTHER = moe.route(torch.zeros(2, 6), 2)
FEWER = moe.route(torch.zeros(2, 4), 1)
COUNTS = torch.ones(4)
BALANCE_VALUES: Table = {
    "routing: expected at least one layer, got none": {"routing": []},
    "routing: expected 4 experts like in layer 0, got 6 in layer 1": {"routing": [ROUTED, OTHER]},
    "routing: expected 2 choices like in layer 0, got 1 in layer 2": {"routing": (ROUTED, ROUTED, FEWER)},
    "convention: expected one of switch, mixtral, fastmoe, got 'gshard'": "gshard",
    r"expert_counts: expected shape \(4,\)": torch.ones(5),
    "num_tokens: expected None without expert_counts, got 3": 3,
    r"num_tokens: expected shape \(\)": {"expert_counts": COUNTS, "num_tokens": COUNTS},
    "num_tokens: expected an integer >= 0, got -1": {"expert_counts": COUNTS, "num_tokens": -1},
}  # fmt: skip
BALANCE_TYPES: Table = {
    "routing: expected a Routing or a list of them, got Tensor": {"routing": COUNTS},
    "routing: expected a Routing or a list of them, got list": {"routing": [ROUTED, None]},
    "expert_counts: expected dtype int64, int32, float32, float64, got float16": COUNTS.half(),
    "num_tokens: expected an integer": {"expert_counts": COUNTS, "num_tokens": 2.5},
}


@refused(BALANCE_VALUES, BALANCE_TYPES)
def test_load_balance_refused(text: str, changes: dict[str, Any], kind: type[Exception]) -> None:
    assert_refused(moe.load_balance_loss, {"routing": ROUTED} | changes, kind, text)
    if set(changes) == {"routing"}:
        assert_refused(moe.router_z_loss, changes, kind, text)


X = torch.zeros(3, 4)
RISE = "expected offsets that rise from 0 to 3"
SEQUENCE_VALUES: Table = {
    r"router_logits: expected 2 or 3 dimension\(s\), got shape \(4,\)": X[0],
    "router_logits: expected numbers below inf": X * torch.nan,
    "top_k: expected an integer >= 1 and <= 4, got 5": 5,
    "scoring: expected one of softmax, sigmoid": "max",
    r"cu_seqlens: expected None beside logits of shape \(1, 3, 4\), got a tensor": {
        "router_logits": X[None],
        "cu_seqlens": torch.tensor([0, 3]),
    },
    r"cu_seqlens: expected shape \(sequences \+ 1,\), got \(0,\)": torch.tensor([], dtype=torch.int64),
    f"cu_seqlens: {RISE}": torch.tensor([0, 2]),
    rf"cu_seqlens: {RISE}, the number of values, got \[0, 2, 1, 3\]": torch.tensor([0, 2, 1, 3]),
    r"token_mask: expected shape \(3,\)": torch.ones(1, 3, dtype=torch.bool),
    r"bias: expected shape \(4,\)": torch.zeros(3),
    "n_group: expected a divisor of 4, the number of experts, got 3": 3,
    "impl: expected one of": "gpu",
}  # fmt: skip
SEQUENCE_TYPES: Table = {
    "router_logits: expected a torch.Tensor, got float": 1.0,
    "cu_seqlens: expected dtype int64, int32, got float32": torch.tensor([0.0, 3.0]),
}


@by_impl
@refused(SEQUENCE_VALUES, SEQUENCE_TYPES)
def test_sequence_refused(
    text: str, changes: dict[str, Any], kind: type[Exception], impl: Any
) -> None:
    arguments = {"router_logits": X, "top_k": 2, "impl": impl} | changes
    assert_refused(moe.sequence_balance_loss, arguments, kind, text)


BIAS_VALUES: Table = {
    r"bias: expected shape \(E,\) with E >= 1, got \(0,\)": torch.zeros(0),
    r"bias: expected 1 dimension\(s\), got shape \(1, 4\)": torch.zeros(1, 4),
    "bias: expected a tensor without gradient": torch.zeros(4, requires_grad=True),
    "bias: expected": torch.zeros(1).expand(4),
    r"expert_counts: expected shape \(4,\)": torch.ones(3),
    r"expert_counts: expected finite numbers >= 0, got -1.0 at \[0\] \(4 of 4\)": -COUNTS,
    r"expert_counts: expected finite numbers >= 0, got nan at \[0\] \(4 of 4\)": COUNTS * torch.nan,
    r"expert_counts: expected finite numbers >= 0, got inf at \[0\] \(4 of 4\)": COUNTS * torch.inf,
    "rate: expected a number >= 0, got -0.1": -0.1,
}
BIAS_TYPES: Table = {
    "bias: expected dtype float32, float64, got bfloat16. Keep it in float32": COUNTS.bfloat16(),
    "bias: expected dtype float32, float64, got int64": COUNTS.long(),
    "bias: expected a torch.Tensor, got list": [0.0],
    "expert_counts: expected dtype int64, int32, float32, float64, got bool": COUNTS.bool(),
    "rate: expected": "fast",
    "centred: expected": 1,
}


@refused(BIAS_VALUES, BIAS_TYPES)
def test_bias_refused(text: str, changes: dict[str, Any], kind: type[Exception]) -> None:
    bias = torch.zeros(4)
    arguments = {"bias": bias, "expert_counts": torch.arange(4)} | changes
    assert_refused(moe.update_routing_bias, arguments, kind, text)
    assert bias.tolist() == [0.0] * 4
