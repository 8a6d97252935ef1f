# SPDX-License-Identifier: Apache-2.0
"""The order of expert rows against torch's stable sort, and against a loop over slots; laws and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures import threads
from helpers import strided, with_threads
from hotloop import moe
from hotloop.moe import Dispatch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import Table, assert_refused, refused
from torch import Tensor

IMPLS = ("cpu", "reference")
by_impl = pytest.mark.parametrize("impl", IMPLS)
one_thread = threads(1)
few = settings(max_examples=60, deadline=None)


def drawn(tokens: int, k: int, experts: int, seed: int = 0, none: bool = True) -> Tensor:
    """Ids as no router gives them: an expert may be chosen twice, a choice may be none."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1 if none else 0, experts, (tokens, k), generator=g)


def by_hand(
    ids: Tensor,
    experts: int,
    capacity: int | None = None,
    topk_weights: Tensor | None = None,
    align: int = 1,
    drop: str = "position",
) -> Dispatch:
    """Lists of slots, one per expert."""
    flat = ids.reshape(-1).tolist()
    members: list[list[int]] = [[] for _ in range(experts)]
    for slot, expert in enumerate(flat):
        if expert >= 0:
            members[expert].append(slot)
    if capacity is not None:
        if drop == "weight":
            assert topk_weights is not None
            weight = topk_weights.reshape(-1).tolist()
            best = [sorted(own, key=lambda i: (-weight[i], i))[:capacity] for own in members]
            members = [sorted(own) for own in best]
        members = [own[:capacity] for own in members]
    rows: list[int] = []
    offsets = [0]
    for own in members:
        rows += own + [-1] * (-len(own) % align)
        offsets.append(len(rows))
    total = -(-(len(flat) + experts * (align - 1)) // align) * align
    rows += [-1] * (total - len(rows))
    row_of_slot = [-1] * len(flat)
    for row, slot in enumerate(rows):
        if slot >= 0:
            row_of_slot[slot] = row
    made = (rows, row_of_slot, offsets, [len(own) for own in members])
    return Dispatch(*(torch.tensor(x, dtype=torch.int64) for x in made))


def assert_same(found: Dispatch, expected: Dispatch) -> None:
    for name, a, b in zip(Dispatch._fields, found, expected, strict=True):
        assert a.dtype == torch.int64, name
        assert torch.equal(a, b), name


# -- against oracles ---------------------------------------------------------------------------------------


@by_impl
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("experts", [1, 2, 60, 256, 4096, 65536])
def test_the_stable_sort_of_torch(experts: int, dtype: torch.dtype, impl: Any) -> None:
    ids = drawn(700, 3, experts, none=False).to(dtype)
    found = moe.dispatch(ids, experts, impl=impl)
    order = torch.argsort(ids.flatten(), stable=True)
    assert torch.equal(found.slot_of_row, order)
    assert torch.equal(found.row_of_slot, torch.argsort(order))
    counts = torch.bincount(ids.flatten(), minlength=experts)
    assert torch.equal(found.expert_counts, counts)
    assert torch.equal(found.expert_offsets[1:], counts.cumsum(0))
    assert int(found.expert_offsets[0]) == 0


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "align": {"align": 8},
    "capacity": {"capacity": 5},
    "no room": {"capacity": 0, "align": 3},
    "room for all": {"capacity": 10**12},
    "capacity, align": {"capacity": 7, "align": 4},
    "weight": {"capacity": 5, "drop": "weight"},
    "weight, align": {"capacity": 9, "drop": "weight", "align": 128},
    "weight, room for all": {"capacity": 10**6, "drop": "weight"},
}


@by_impl
@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_a_loop_over_slots(ways: dict[str, Any], impl: Any) -> None:
    for tokens, k, experts in ((0, 2, 3), (1, 1, 1), (40, 2, 7), (60, 3, 2), (5, 4, 300)):
        ids = drawn(tokens, k, experts, seed=tokens)
        weights = None
        if ways.get("drop") == "weight":  # few values: ties are the first slots'
            g = torch.Generator().manual_seed(k)
            weights = torch.randint(-2, 3, (tokens, k), generator=g).float() / 2
        found = moe.dispatch(ids, experts, topk_weights=weights, impl=impl, **ways)
        assert_same(found, by_hand(ids, experts, topk_weights=weights, **ways))


@by_impl
def test_weights_of_any_dtype(impl: Any) -> None:
    ids = drawn(50, 3, 4)
    g = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        weights = torch.randn((50, 3), generator=g).to(dtype)
        weights[0] = torch.inf
        weights[1] = -torch.inf
        ways: dict[str, Any] = {"capacity": 6, "drop": "weight", "topk_weights": weights}
        assert_same(moe.dispatch(ids, 4, impl=impl, **ways), by_hand(ids, 4, **ways))


@by_impl
def test_memory_of_any_form(impl: Any) -> None:
    ids = drawn(30, 4, 9)
    weights = torch.rand(30, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    ways: dict[str, Any] = {"capacity": 4, "drop": "weight"}
    expected = by_hand(ids, 9, topk_weights=weights.detach(), **ways)
    for form, of_weights in (
        (ids, weights),
        (strided(ids), strided(weights)),
        (ids.T.contiguous().T, weights.T.contiguous().T),
    ):
        found = moe.dispatch(form, 9, topk_weights=of_weights, impl=impl, **ways)
        assert_same(found, expected)
        assert not any(x.requires_grad for x in found)
    same = moe.dispatch(torch.tensor([[3], [-1]]).expand(2, 5), 9, impl=impl)
    assert same.expert_counts.tolist() == [0, 0, 0, 5, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS)
def test_one_and_two_threads_give_the_same_order(ways: dict[str, Any]) -> None:
    """With as many slots as are worth two threads, of many experts and of few."""
    for experts in (3, 512):
        ids = drawn(12_000, 4, experts)
        weights = None
        if ways.get("drop") == "weight":
            weights = torch.rand((12_000, 4), generator=torch.Generator().manual_seed(3)).half()

        def run(impl: Any) -> Dispatch:
            return moe.dispatch(ids, experts, topk_weights=weights, impl=impl, **ways)  # noqa: B023

        expected = run("reference")
        for count in (1, 2):
            assert_same(with_threads(count, lambda: run("cpu")), expected)


# -- laws --------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: Any) -> tuple[Tensor, int, dict[str, Any]]:
    experts, tokens, k = draw(st.integers(1, 9)), draw(st.integers(0, 12)), draw(st.integers(1, 4))
    ids = drawn(tokens, k, experts, seed=draw(st.integers(0, 2**32)))
    ways: dict[str, Any] = {"align": draw(st.integers(1, 5))}
    if draw(st.booleans()):
        ways["capacity"] = draw(st.integers(0, 6))
        if draw(st.booleans()):
            g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
            ways |= {
                "drop": "weight",
                "topk_weights": torch.randint(0, 4, (tokens, k), generator=g) / 4,
            }
    return ids, experts, ways


@few
@given(calls(), st.sampled_from(IMPLS))
def test_no_slot_is_lost(call: Any, impl: Any) -> None:
    """Every slot has one row, but for those of nobody and, of a full expert, as many as there is no room for."""
    ids, experts, ways = call
    found = moe.dispatch(ids, experts, impl=impl, **ways)
    assert_same(found, by_hand(ids, experts, **ways))
    flat, rows = ids.reshape(-1), found.slot_of_row
    kept = found.row_of_slot >= 0
    assert torch.equal(rows[found.row_of_slot[kept]], kept.nonzero()[:, 0])
    assert int((rows >= 0).sum()) == int(kept.sum()) == int(found.expert_counts.sum())
    assert not bool(kept[flat < 0].any())
    counts = torch.bincount(flat[flat >= 0], minlength=experts)
    limit = ways.get("capacity")
    assert torch.equal(found.expert_counts, counts if limit is None else counts.clamp(max=limit))
    assert bool((found.expert_offsets % ways["align"] == 0).all())
    assert int(found.expert_offsets[-1]) <= len(rows)
    assert len(rows) == len(moe.dispatch(torch.zeros_like(ids), experts, **ways).slot_of_row)
    for e in range(experts):
        own = rows[found.expert_offsets[e] : found.expert_offsets[e + 1]]
        mine = own[: int(found.expert_counts[e])]
        assert bool((flat[mine] == e).all())
        assert torch.equal(mine, mine.sort().values)
        assert bool((own[len(mine) :] == -1).all())


def test_of_a_full_expert_the_heaviest_slots_stay() -> None:
    ids = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])
    weights = torch.tensor([[0.2, 0.9], [0.5, 0.9], [0.5, 0.1], [0.6, 0.9]])
    found = moe.dispatch(ids, 2, capacity=2, drop="weight", topk_weights=weights)
    assert found.slot_of_row.tolist() == [2, 6, 1, 3, -1, -1, -1, -1]
    first = moe.dispatch(ids, 2, capacity=2)
    assert first.slot_of_row.tolist() == [0, 2, 1, 3, -1, -1, -1, -1]


# -- torch.compile -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_what_is_left_out_compiles(dynamic: bool) -> None:
    """Ids and capacity that follow from tensors of the graph: number of experts, capacity and align may be symbols."""

    def run(scores: Tensor, capacity: int, align: int) -> Dispatch:
        weights, ids = scores.topk(2)
        return moe.dispatch(
            ids,
            scores.shape[1],
            capacity=capacity,
            align=align,
            drop="weight",
            topk_weights=weights,
        )

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    g = torch.Generator().manual_seed(0)
    for tokens, experts, capacity, align in ((9, 5, 3, 4), (17, 6, 4, 2))[: 2 if dynamic else 1]:
        scores = torch.rand((tokens, experts), generator=g)
        assert_same(compiled(scores, capacity, align), run(scores, capacity, align))
    with pytest.raises(ValueError, match=r"\[dispatch\] topk_weights: expected numbers, got nan"):
        compiled(scores * torch.nan, capacity, align)


# -- errors ------------------------------------------------------------------------------------------------

IDS = torch.tensor([[0, 1], [2, -1]])
WEIGHTS = torch.ones(2, 2)
HEAVY = {"capacity": 1, "drop": "weight", "topk_weights": WEIGHTS}
VALUES: Table = {
    r"topk_ids: expected 2 dimension\(s\), got shape \(2,\)": IDS[0],
    r"topk_ids: expected -1 to 1, got 2 at \[1, 0\] \(1 of 4\). -1 goes nowhere": {"num_experts": 2},
    r"topk_ids: expected -1 to 2, got -2 at \[0, 0\]": IDS - 2,
    r"topk_ids: expected -1 to 2, got 2147483647 at \[0, 0\]": (IDS * 0 + 2**31 - 1).int(),
    "num_experts: expected an integer >= 1 and <= 65536, got 0": 0,
    "num_experts: expected an integer >= 1 and <= 65536, got 65537": 65537,
    "capacity: expected an integer >= 0, got -1": -1,
    "capacity: expected a value beside drop='weight', got None": {**HEAVY, "capacity": None},
    "topk_weights: expected a value beside drop='weight', got None": {**HEAVY, "topk_weights": None},
    "topk_weights: expected None with drop='position', got a tensor": {**HEAVY, "drop": "position"},
    r"topk_weights: expected shape \(2, 2\), got \(2,\)": {**HEAVY, "topk_weights": WEIGHTS[0]},
    r"topk_weights: expected numbers, got nan at \[0, 0\] \(4 of 4\)": {**HEAVY, "topk_weights": WEIGHTS * torch.nan},
    "drop: expected one of position, weight, got 'first'": "first",
    "align: expected an integer >= 1 and <= 65536, got 0": 0,
    "impl: expected one of": "gpu",
}  # fmt: skip
TYPES: Table = {
    "topk_ids: expected a torch.Tensor, got list": [[0]],
    "topk_ids: expected dtype int64, int32, got float32": WEIGHTS,
    "num_experts: expected an integer": 2.5,
    "capacity: expected an integer": 2.5,
    "topk_weights: expected dtype": {**HEAVY, "topk_weights": IDS},
}


@by_impl
@refused(VALUES, TYPES)
def test_refused(text: str, changes: dict[str, Any], kind: type[Exception], impl: str) -> None:
    arguments = {"topk_ids": IDS, "num_experts": 3, "impl": impl} | changes
    assert_refused(moe.dispatch, arguments, kind, text)
