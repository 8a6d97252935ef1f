# SPDX-License-Identifier: Apache-2.0
"""permute and combine against loops over slots in float64; laws, gradients, bits, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_no_worse_than_torch, misaligned, strided, with_threads
from hotloop import moe
from hotloop.moe import Dispatch
from refusals import Table, assert_refused, refused
from row_oracles import FLOATS, ORDERS, Given, converted, gradients, leaves, mixture, normal, routed
from torch import Tensor

IMPLS = ("cpu", "reference")
by_impl = pytest.mark.parametrize("impl", IMPLS)
SIZES = ((1, 1, 1), (7, 3, 5), (4, 5, 16), (5, 4, 37), (3, 2, 1029))
"""T, k, D: one, odd, the lanes, lanes and a rest, more than a chunk."""


def call(
    order: str, tokens: int, k: int, columns: int, dtype: torch.dtype = torch.float32, shared: bool = True
) -> Given:  # fmt: skip
    """Arguments of combine."""
    dispatch = ORDERS[order](tokens, k)
    given: Given = {
        "expert_rows": normal(len(dispatch.slot_of_row), columns, dtype=dtype),
        "topk_weights": normal(tokens, k),
        "dispatch": dispatch,
    }
    if shared:
        given["shared"] = normal(tokens, columns, seed=1, dtype=dtype)
    return with_gradients(given)


def with_gradients(given: Given) -> Given:
    """The same arguments as new leaves."""
    return {
        k: v.detach().clone().requires_grad_() if isinstance(v, Tensor) else v
        for k, v in given.items()
    }


def by_hand(given: Given) -> Tensor:
    rest = {k: v for k, v in given.items() if k not in ("expert_rows", "impl")}
    return mixture(given["expert_rows"], **rest)


def taken(x: Tensor, dispatch: Dispatch) -> Tensor:
    """permute: row by row."""
    k = len(dispatch.row_of_slot) // max(1, len(x))
    slots = dispatch.slot_of_row.tolist()
    rows = [x[s // k] if s >= 0 else x.new_zeros(x.shape[1]) for s in slots]
    return torch.stack(rows) if rows else x.new_zeros((0, x.shape[1]))


def assert_exact(run: Any, given: Given, formula: Any) -> None:
    """Values and gradients no worse than those of the reference, against float64."""
    steps = []
    for how, arguments in (
        (lambda a: run(**a, impl="cpu"), given),
        (lambda a: run(**a, impl="reference"), with_gradients(given)),
        (lambda a: formula(a), converted(given, torch.float64)),
    ):
        out = how(arguments)
        steps.append([out, *gradients([out], arguments).values()])
    for ours, other, truth in zip(*steps, strict=True):
        assert ours.dtype == other.dtype
        assert_no_worse_than_torch(ours, other, truth)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("tokens", "k", "columns"), SIZES)
def test_combine_is_the_sum_over_slots(order: str, tokens: int, k: int, columns: int) -> None:
    assert_exact(moe.combine, call(order, tokens, k, columns), by_hand)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("tokens", "k", "columns"), SIZES)
def test_permute_takes_the_row_of_each_slot(order: str, tokens: int, k: int, columns: int) -> None:
    dispatch = ORDERS[order](tokens, k)
    x = normal(tokens, columns).requires_grad_()
    found = moe.permute(x, dispatch, impl="cpu")
    assert torch.equal(found, taken(x, dispatch))
    assert_exact(moe.permute, {"x": x, "dispatch": dispatch}, lambda a: taken(**a))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [5, 37, 1029])
def test_half_precision(dtype: torch.dtype, columns: int, level: str) -> None:
    given = call("shuffled", 6, 3, columns, dtype)
    assert_exact(moe.combine, given, by_hand)
    x = with_gradients({"x": normal(6, columns, dtype=dtype)})["x"]
    assert_exact(moe.permute, {"x": x, "dispatch": given["dispatch"]}, lambda a: taken(**a))


@pytest.mark.parametrize("shared", [False, True])
def test_gradcheck(shared: bool) -> None:
    given = converted(call("shuffled", 4, 3, 5, shared=shared), torch.float64)
    names = list(leaves(given))

    def combined(*values: Tensor) -> Tensor:
        return moe.combine(**{**given, **dict(zip(names, values))}, impl="cpu")

    assert torch.autograd.gradcheck(combined, list(leaves(given).values()))
    x = normal(4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: moe.permute(v, given["dispatch"], impl="cpu"), x)


def test_each_gradient_alone_has_the_bits_of_all_together() -> None:
    given = call("shuffled", 6, 3, 37)
    together = gradients([moe.combine(**given)], given)
    for name in together:
        alone = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
        alone[name].requires_grad_()
        assert torch.equal(gradients([moe.combine(**alone)], alone)[name], together[name]), name


@by_impl
def test_there_and_back(impl: Any) -> None:
    """Weights of 1 give each token k times; of one choice, the tokens themselves, to the last bit."""
    x = normal(9, 20)
    for k in (1, 4):
        order = moe.dispatch(torch.stack([torch.randperm(5)[:k] for _ in range(9)]), 5, align=3)
        back = moe.combine(moe.permute(x, order, impl=impl), torch.ones(9, k), order, impl=impl)
        torch.testing.assert_close(back, k * x)
        assert k > 1 or torch.equal(back, x)


@by_impl
def test_every_expert_alike_is_the_dense_average(impl: Any) -> None:
    x, experts = normal(6, 8), normal(4, 8)
    order = moe.dispatch(torch.arange(4).expand(6, 4).contiguous(), 4)
    rows = moe.permute(x, order, impl=impl) * experts.repeat_interleave(6, 0)
    found = moe.combine(rows, torch.full((6, 4), 0.25), order, impl=impl)
    torch.testing.assert_close(found, x * experts.mean(0))


@by_impl
def test_another_order_of_rows_changes_no_bit(impl: Any) -> None:
    given = call("routed", 8, 4, 33)
    turn = torch.randperm(len(given["expert_rows"]), generator=torch.Generator().manual_seed(0))
    order = given["dispatch"]
    rows = order.row_of_slot
    moved = torch.where(rows < 0, rows, turn.argsort()[rows.clamp(min=0)])
    other = {
        **given,
        "expert_rows": given["expert_rows"][turn],
        "dispatch": order._replace(slot_of_row=order.slot_of_row[turn], row_of_slot=moved),
    }
    assert torch.equal(moe.combine(**other, impl=impl), moe.combine(**given, impl=impl))


@by_impl
def test_what_goes_nowhere_is_not_read(impl: Any) -> None:
    """A NaN in the weight of a dropped slot or in a row of nothing reaches nothing; both have gradient 0."""
    given = call("shuffled", 6, 3, 10)
    order, rows, weights = (given[k] for k in ("dispatch", "expert_rows", "topk_weights"))
    expected = moe.combine(**given)
    nothing, nowhere = order.slot_of_row < 0, order.row_of_slot.view(6, 3) < 0
    assert bool(nothing.any())
    assert bool(nowhere.any())
    dirty = {
        **given,
        "expert_rows": rows.detach().masked_fill(nothing[:, None], math.nan).requires_grad_(),
        "topk_weights": weights.detach().masked_fill(nowhere, math.nan).requires_grad_(),
    }
    out = moe.combine(**dirty, impl=impl)
    torch.testing.assert_close(out, expected)
    found = gradients([out], dirty)
    assert not bool(found["expert_rows"][nothing].any())
    assert not bool(found["topk_weights"][nowhere].any())
    assert all(bool(g.isfinite().all()) for g in found.values())


@by_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_rounded_once(dtype: torch.dtype, impl: Any) -> None:
    """1 and eight terms of half its last bit: a sum that is rounded after every term stays at 1."""
    order = moe.dispatch(torch.arange(9).view(1, 9), 9)
    rows = torch.full((9, 4), 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11).to(dtype)
    rows[0] = 1.0
    weights = torch.ones(1, 9)
    total = 1 + 8 * float(rows[1, 0])
    assert moe.combine(rows, weights, order, impl=impl).tolist() == [[total] * 4]
    wide = moe.combine(rows, weights / 3, order, out_dtype=torch.float32, impl=impl)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, torch.full((1, 4), total / 3))


@by_impl
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing(tokens: int, impl: Any) -> None:
    order = moe.dispatch(torch.full((tokens, 2), -1), 3, align=2 if tokens else 1)
    rows = normal(len(order.slot_of_row), 4).requires_grad_()
    x = normal(tokens, 4).requires_grad_()
    out = moe.combine(rows, torch.ones(tokens, 2), order, impl=impl)
    assert torch.equal(out, torch.zeros(tokens, 4))
    moved = moe.permute(x, order, impl=impl)
    assert torch.equal(moved, torch.zeros_like(rows))
    (out.sum() + moved.sum()).backward()
    for leaf in (rows, x):
        assert leaf.grad is not None
        assert not bool(leaf.grad.any())


@by_impl
def test_no_columns(impl: Any) -> None:
    order = routed(4, 2)
    rows = moe.permute(torch.zeros(4, 0), order, impl=impl)
    assert moe.combine(rows, torch.ones(4, 2), order, impl=impl).shape == (4, 0)


def test_threads_change_no_bit() -> None:
    given = call("routed", 700, 4, 96)
    x = normal(700, 96).requires_grad_()

    def run() -> list[Tensor]:
        out = moe.combine(**given)
        moved = moe.permute(x, given["dispatch"])
        (back,) = torch.autograd.grad(moved.cos().sum(), x)
        return [out, *gradients([out], given).values(), moved, back]

    for one, two in zip(with_threads(1, run), with_threads(2, run), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("change", [misaligned, strided, lambda x: x.t().contiguous().t()])
def test_any_strides(change: Any) -> None:
    given = call("shuffled", 5, 3, 18)
    other = {
        k: change(v.detach()).requires_grad_() if isinstance(v, Tensor) else v
        for k, v in given.items()
    }
    out, same = moe.combine(**other), moe.combine(**given)
    assert torch.equal(out, same)
    expected = gradients([same], given)
    for name, g in gradients([out], other).items():
        assert torch.equal(g, expected[name])
    x = normal(5, 18)
    assert torch.equal(moe.permute(change(x), given["dispatch"]), moe.permute(x, given["dispatch"]))


def test_an_input_changed_before_backward_is_noticed() -> None:
    given = call("shuffled", 5, 3, 8)
    for name in ("expert_rows", "topk_weights"):
        out = moe.combine(**given)
        with torch.no_grad():
            given[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    order = mapped_dispatch(given["dispatch"])
    x = normal(5, 8).requires_grad_()
    for out in (moe.permute(x, order), moe.combine(**{**given, "dispatch": order})):
        order.row_of_slot.add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def mapped_dispatch(order: Dispatch) -> Dispatch:
    return Dispatch(*(x.clone() for x in order))


@by_impl
def test_second_derivatives_and_transforms_are_those_of_the_reference(impl: Any) -> None:
    given = converted(call("shuffled", 4, 2, 3), torch.float64)
    x = normal(4, 3, dtype=torch.float64).requires_grad_()

    def run(v: Tensor) -> Tensor:
        rows = moe.permute(v, given["dispatch"], impl=impl)
        return moe.combine(rows.sin(), given["topk_weights"].detach(), given["dispatch"], impl=impl)

    if impl == "reference":
        assert torch.autograd.gradgradcheck(run, x)
        assert torch.func.grad(lambda v: run(v).sum())(x).shape == x.shape
        return
    with pytest.raises(NotImplementedError, match=r"impl: expected 'reference' for a gradient"):
        torch.autograd.grad(run(x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"expected 'reference' inside a torch\.func"):
        torch.func.grad(lambda v: run(v).sum())(x)


def test_inference_mode() -> None:
    given = call("shuffled", 5, 3, 8)
    with torch.inference_mode():
        found = moe.combine(**given)
        assert torch.equal(moe.permute(found, given["dispatch"]), taken(found, given["dispatch"]))
    assert torch.equal(found, moe.combine(**given))


# -- errors --------------------------------------------------------------------------------------------------

ORDER = Dispatch(*map(torch.tensor, ([2, 0, 1, -1], [1, 2, 0, -1], [0, 1, 4], [1, 2])))
CALL: Given = {"expert_rows": torch.ones(4, 3), "topk_weights": torch.ones(2, 2), "dispatch": ORDER}


def slots(*numbers: int) -> Given:
    return {"dispatch": ORDER._replace(row_of_slot=torch.tensor(numbers))}


def rows(*numbers: int) -> Given:
    return {"dispatch": ORDER._replace(slot_of_row=torch.tensor(numbers))}


VALUES: Table = {
    r"expert_rows: expected 2 dimension": torch.ones(4),
    r"topk_weights: expected 2 dimension": torch.ones(4),
    r"topk_weights: expected shape \(T, k\) with k >= 1, got \(2, 0\)": {"topk_weights": torch.ones(2, 0)},
    r"dispatch.row_of_slot: expected shape \(6,\) \(T \* k,\) like topk_weights": {"topk_weights": torch.ones(3, 2)},
    r"dispatch.slot_of_row: expected shape \(5,\) \(R,\) like expert_rows": {"expert_rows": torch.ones(5, 3)},
    r"dispatch.row_of_slot: expected -1 to 3, got 4 at \[0\]": slots(4, 2, 0, -1),
    r"dispatch.row_of_slot: expected -1 to 3, got -2 at \[3\]": slots(1, 2, 0, -2),
    r"dispatch.slot_of_row: expected the inverse of row_of_slot, got 0 at \[1\] \(1 of 4\)": slots(2, 2, 0, -1),
    r"dispatch.row_of_slot: expected the inverse of slot_of_row, got 3 at \[3\]": slots(1, 2, 0, 3),
    r"shared: expected shape \(2, 3\)": torch.ones(4, 3),
    r"topk_weights: expected device cpu like expert_rows, got meta": torch.ones(2, 2, device="meta"),
}  # fmt: skip
TYPES: Table = {
    r"expert_rows: expected dtype .*, got int64": torch.ones(4, 3, dtype=torch.long),
    r"expert_rows: expected a torch.Tensor, got list": [[1.0]],
    r"topk_weights: expected dtype": torch.ones(2, 2, dtype=torch.int32),
    r"dispatch: expected a Dispatch, got tuple. Pass routing.dispatch": (1, 2),
    r"dispatch.row_of_slot: expected dtype int64, got int32": {
        "dispatch": ORDER._replace(row_of_slot=ORDER.row_of_slot.int())
    },
    r"shared: expected no float64 beside expert_rows float32, got float64": torch.ones(2, 3, dtype=torch.float64),
    r"out_dtype: expected a float dtype of torch, got torch.int32": torch.int32,
}  # fmt: skip


@by_impl
@refused(VALUES, TYPES)
def test_combine_refuses(text: str, changes: Given, kind: type[Exception], impl: str) -> None:
    assert_refused(moe.combine, {**CALL, **changes, "impl": impl}, kind, text)


PERMUTED: Table = {
    r"x: expected 2 dimension": torch.ones(2),
    r"dispatch.row_of_slot: expected shape \(T \* k,\) with T = 3, got \(4,\). Pass": torch.ones(3, 2),
    r"dispatch.slot_of_row: expected -1 to 3, got 4 at \[0\]": rows(4, 0, 1, -1),
    r"dispatch.slot_of_row: expected the inverse of row_of_slot, got 0 at \[3\]": rows(2, 0, 1, 0),
    r"dispatch.row_of_slot: expected the inverse of slot_of_row, got 3 at \[3\]": slots(1, 2, 0, 3),
}  # fmt: skip


@by_impl
@refused(PERMUTED, {r"x: expected dtype": torch.ones(2, 2, dtype=torch.int32)})
def test_permute_refuses(text: str, changes: Given, kind: type[Exception], impl: str) -> None:
    first = text.partition(":")[0]
    if first.startswith("dispatch") and not isinstance(changes.get("dispatch"), Dispatch):
        changes = {"x": changes[first]}
    arguments = {"x": torch.ones(2, 3), "dispatch": ORDER, **changes, "impl": impl}
    assert_refused(moe.permute, arguments, kind, text)
