# SPDX-License-Identifier: Apache-2.0
"""The products of experts against a loop over tokens that is not ours, against the reference, and laws."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from hotloop import moe
from hotloop.front.impl import last_impl
from hotloop.moe import _experts_cpu
from torch import Tensor
from torch.nn import functional

from tests.helpers import assert_no_worse_than_torch

GATE = {
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "geglu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "reglu": functional.relu,
}
PLAIN = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x) ** 2,
}
GPT_OSS = moe.Activation("swiglu", interleaved=True, limit=1.0, alpha=1.702, shift=1.0)
IMPLS = ("cpu", "reference")


@pytest.mark.parametrize("impl", IMPLS)
def test_every_kind_against_a_loop_over_tokens(impl: Any) -> None:
    T, D, E, k, inner = 9, 5, 4, 2, 3
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x, weights, ids = normal(T, D), normal(T, k), torch.randint(0, E - 1, (T, k), generator=g)
    ids[3, 0] = -1
    order = moe.dispatch(ids, E)
    for kind in (*GATE, *PLAIN):
        width = 2 * inner if kind in GATE else inner
        up, down, b, c = normal(E, width, D), normal(E, D, inner), normal(E, width), normal(E, D)
        truth = torch.zeros(T, D, dtype=torch.float64)
        for t in range(T):
            for j in range(k):
                e = int(ids[t, j])
                if e < 0:
                    continue
                h = up[e] @ x[t] + b[e]
                h = GATE[kind](h[:inner]) * h[inner:] if kind in GATE else PLAIN[kind](h)
                truth[t] += weights[t, j] * (down[e] @ h + c[e])
        found = moe.expert_mlp(
            x, up, down, weights, order, activation=kind, gate_up_bias=b, down_bias=c, impl=impl
        )
        assert last_impl("expert_mlp") == impl
        torch.testing.assert_close(found, truth)


# -- against the reference -----------------------------------------------------------------------------------


class Case(NamedTuple):
    """Sizes, how tokens go to experts, and how the arguments lie."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    k: int
    routing: str = "even"
    activation: Any = "swiglu"
    transposed: bool = False
    biases: bool = False
    shared: bool = False
    strided: bool = False
    capacity: int | None = None
    align: int = 1


CASES = {
    "one token": Case(1, 8, 4, 6, 2),
    "few rows per expert": Case(5, 33, 17, 3, 2, biases=True, shared=True),
    "several blocks": Case(150, 70, 45, 4, 2, shared=True),
    "deep products": Case(40, 900, 600, 2, 1),
    "empty experts": Case(20, 16, 8, 40, 1, biases=True),
    "one expert with everything": Case(90, 24, 12, 5, 1, routing="one", biases=True),
    "no token": Case(0, 16, 8, 4, 2, biases=True, shared=True),
    "choices that go nowhere": Case(30, 16, 8, 4, 3, routing="holes", biases=True),
    "nothing goes anywhere": Case(6, 16, 8, 4, 2, routing="none", biases=True),
    "capacity": Case(60, 16, 8, 4, 2, capacity=9, biases=True),
    "aligned": Case(30, 16, 8, 4, 2, align=16, routing="holes"),
    "transposed": Case(50, 20, 36, 4, 2, transposed=True, biases=True),
    "strided": Case(50, 20, 36, 4, 2, strided=True, biases=True, shared=True),
    "gpt-oss": Case(50, 20, 36, 4, 2, activation=GPT_OSS, transposed=True, biases=True),
    "no gate": Case(50, 20, 36, 4, 2, activation="relu2", biases=True),
    "wider than a chunk of the activation": Case(9, 12, 700, 3, 2, activation="geglu"),
}
NAMES = ("x", "gate_up", "down", "topk_weights", "gate_up_bias", "down_bias", "shared")


def make(case: Case, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], moe.Dispatch]:
    """The float inputs by their names, and the dispatch."""
    T, D, inner, E, k = case[:5]
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        if not case.strided:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        turned = torch.randn([2 * n for n in reversed(shape)], generator=g, dtype=torch.float64)
        turned = turned.to(dtype)[(slice(None, None, 2),) * len(shape)]
        return turned.permute(*reversed(range(len(shape))))

    ids = torch.rand((T, E), generator=g).topk(k, dim=1).indices
    if case.routing == "one":
        ids = torch.full_like(ids, 3)
    elif case.routing == "holes":
        ids[torch.rand(ids.shape, generator=g) < 0.4] = -1
    elif case.routing == "none":
        ids = torch.full_like(ids, -1)
    gated = case.activation not in PLAIN
    width = 2 * inner if gated else inner
    up, down = normal(E, width, D) / D**0.5, normal(E, D, inner) / inner**0.5
    given: dict[str, Any] = {
        "x": normal(T, D),
        "gate_up": up.transpose(1, 2).contiguous() if case.transposed else up,
        "down": down.transpose(1, 2).contiguous() if case.transposed else down,
        "topk_weights": torch.rand((T, k), generator=g, dtype=torch.float64).to(dtype),
        "gate_up_bias": normal(E, width) if case.biases else None,
        "down_bias": normal(E, D) if case.biases else None,
        "shared": normal(T, D) if case.shared else None,
    }
    return given, moe.dispatch(ids, E, capacity=case.capacity, align=case.align)


def run(
    case: Case, given: dict[str, Any], order: moe.Dispatch, impl: Any, rows: bool, **more: Any
) -> tuple[Tensor, list[Tensor]]:
    """The result and the gradients of all float inputs, for a gradient of the result that is random."""
    leaves = {n: v.detach().requires_grad_() for n, v in given.items() if v is not None}
    options = {"activation": case.activation, "transposed": case.transposed, "impl": impl, **more}
    if rows:
        leaves.pop("topk_weights")
        leaves.pop("shared", None)
        out = moe.expert_rows(**leaves, dispatch=order, **options)
    else:
        out = moe.expert_mlp(**leaves, dispatch=order, **options)
    g = torch.Generator().manual_seed(6)
    above = torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.dtype)
    return out.detach(), list(
        torch.autograd.grad(
            out, list(leaves.values()), above, allow_unused=True, materialize_grads=True
        )
    )


@pytest.mark.parametrize("rows", [False, True], ids=["mlp", "rows"])
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_those_of_the_reference(name: str, rows: bool) -> None:
    given, order = make(CASES[name])
    ours, ours_grads = run(CASES[name], given, order, "cpu", rows)
    truth, truth_grads = run(CASES[name], given, order, "reference", rows)
    torch.testing.assert_close(ours, truth)
    for a, b in zip(ours_grads, truth_grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    [
        "few rows per expert",
        "several blocks",
        "deep products",
        "aligned",
        "one expert with everything",
        "transposed",
        "strided",
        "gpt-oss",
    ],
)
def test_narrower_types_are_no_worse_than_torch(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    given, order = make(case, dtype)
    wide = {n: None if v is None else v.double() for n, v in given.items()}
    ours = run(case, given, order, "cpu", False)
    plain = run(case, given, order, "reference", False)
    truth = run(case, wide, order, "reference", False)
    for a, b, c in zip([ours[0], *ours[1]], [plain[0], *plain[1]], [truth[0], *truth[1]], strict=True):  # fmt: skip
        assert a.dtype == dtype
        assert_no_worse_than_torch(a, b, c, k=2, eps=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_grouped_linear_against_the_reference(transposed: bool, with_bias: bool) -> None:
    g = torch.Generator().manual_seed(2)
    offsets = torch.tensor([2, 2, 9, 10, 150, 150])
    for columns in (1, 7, 64):
        x = torch.randn(160, 37, generator=g, dtype=torch.float64).requires_grad_()
        shape = (5, 37, columns) if transposed else (5, columns, 37)
        weight = torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()
        bias = torch.randn(5, columns, generator=g, dtype=torch.float64).requires_grad_()
        inputs = [x, weight, *([bias] if with_bias else [])]
        above = torch.randn(160, columns, generator=g, dtype=torch.float64)
        found = []
        for impl in IMPLS:
            out = moe.grouped_linear(*inputs[:2], offsets, *inputs[2:], transposed=transposed, impl=impl)  # type: ignore[arg-type]  # fmt: skip
            assert last_impl("grouped_linear") == impl
            found.append([out, *torch.autograd.grad(out, inputs, above)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
        assert not found[0][0][:2].any()
        assert not found[0][0][150:].any()


def test_grouped_linear_of_a_dispatch_is_0_where_rows_hold_nothing() -> None:
    given, order = make(CASES["aligned"])
    rows = torch.full((order.slot_of_row.shape[0], 16), torch.nan, dtype=torch.float64)
    held = order.slot_of_row >= 0
    rows[held] = moe.permute(given["x"], order)[held]
    found = moe.grouped_linear(rows, given["gate_up"], order, impl="cpu")
    assert not found[~held].any()
    torch.testing.assert_close(
        found, moe.grouped_linear(rows, given["gate_up"], order, impl="reference")
    )


def test_gradcheck() -> None:
    for name in ("few rows per expert", "choices that go nowhere", "gpt-oss"):
        case = CASES[name]._replace(tokens=4, hidden=3, inner=2, experts=4, shared=True)
        given, order = make(case)
        leaves = [v.detach().requires_grad_() for v in given.values()]

        def mlp(*values: Tensor, case: Case = case, order: Any = order) -> Tensor:
            options = {"activation": case.activation, "transposed": case.transposed}
            return moe.expert_mlp(**dict(zip(NAMES, values)), dispatch=order, impl="cpu", **options)

        assert torch.autograd.gradcheck(mlp, leaves)


# -- laws ----------------------------------------------------------------------------------------------------


def test_a_budget_changes_memory_and_not_one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["several blocks"]
    for dtype in (torch.float32, torch.bfloat16):
        given, order = make(case, dtype)
        row = 2 * case.inner * given["x"].element_size()
        whole = run(case, given, order, "cpu", False)
        for budget in (0, row - 1, 100 * row, 299 * row, 10**9):
            kept = []
            forward = _experts_cpu.forward

            def seen(*args: Any, kept: list[int] = kept, forward: Any = forward) -> Any:
                found = forward(*args)
                kept.append(found[1].numel() * found[1].element_size())
                return found

            with monkeypatch.context() as patch:
                patch.setattr(_experts_cpu, "forward", seen)
                part = run(case, given, order, "cpu", False, activation_budget=budget)
            assert kept[0] == min(budget // row * row, 300 * row)
            for a, b in zip([whole[0], *whole[1]], [part[0], *part[1]], strict=True):
                assert torch.equal(a, b)


def test_neither_threads_nor_the_workspace_change_one_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        for name, dtype in itertools.product(
            ("few rows per expert", "several blocks", "one expert with everything", "gpt-oss"),
            (torch.float32, torch.bfloat16),
        ):
            given, order = make(CASES[name], dtype)
            found = []
            for threads, workspace in ((1, 1 << 22), (2, 1 << 22), (5, 1 << 22), (2, 1)):
                torch.set_num_threads(threads)
                with monkeypatch.context() as patch:
                    patch.setattr(_experts_cpu, "WORKSPACE", workspace)
                    found.append(run(CASES[name], given, order, "cpu", False))
            for other in found[1:]:
                for a, b in zip([found[0][0], *found[0][1]], [other[0], *other[1]], strict=True):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("impl", IMPLS)
def test_all_experts_at_equal_weights_are_the_dense_average(impl: Any) -> None:
    T, D, inner, E = 11, 12, 6, 5
    given, _ = make(Case(T, D, inner, E, 2))
    ids = torch.stack([torch.randperm(E, generator=torch.Generator().manual_seed(t)) for t in range(T)])  # fmt: skip
    weights = torch.full((T, E), 1 / E, dtype=torch.float64)
    x, up, down = given["x"], given["gate_up"], given["down"]
    dense = torch.zeros(T, D, dtype=torch.float64)
    for e in range(E):
        gate, value = (x @ up[e].T).chunk(2, dim=1)
        dense += (functional.silu(gate) * value) @ down[e].T / E
    found = moe.expert_mlp(x, up, down, weights, moe.dispatch(ids, E), impl=impl)
    torch.testing.assert_close(found, dense)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_are_conserved(impl: Any) -> None:
    """Experts that are the identity give every token its weights' sum of itself, and no token of another."""
    T, D, E, k = 40, 8, 6, 3
    given, order = make(Case(T, D, D, E, k, activation="relu", routing="holes"))
    eye = torch.eye(D, dtype=torch.float64).expand(E, D, D)
    x, weights = given["x"].abs(), given["topk_weights"]
    held = torch.where(order.row_of_slot >= 0, weights.reshape(-1), 0).view(T, k).sum(1)
    found = moe.expert_mlp(x, eye, eye, weights, order, activation="relu", impl=impl)
    torch.testing.assert_close(found, x * held[:, None])


@pytest.mark.parametrize("impl", IMPLS)
def test_renumbering_experts_changes_nothing_else(impl: Any) -> None:
    case = Case(40, 8, 6, 5, 2, biases=True)
    given, _ = make(case)
    ids = torch.rand((40, 5), generator=torch.Generator().manual_seed(9)).topk(2, dim=1).indices
    new = torch.tensor([3, 0, 4, 1, 2])
    moved = dict(given)
    for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
        moved[name] = torch.empty_like(given[name])
        moved[name][new] = given[name]
    a = run(case, given, moe.dispatch(ids, 5), impl, False)
    b = run(case, moved, moe.dispatch(new[ids], 5), impl, False)
    torch.testing.assert_close(a[0], b[0])
    for name, p, q in zip([n for n in NAMES if given[n] is not None], a[1], b[1], strict=True):
        torch.testing.assert_close(p, q[new] if name in moved and moved[name] is not given[name] else q)  # fmt: skip


# -- compiled, and refused -----------------------------------------------------------------------------------


def test_compiled_without_a_break_for_any_number_of_tokens() -> None:
    for name in ("few rows per expert", "gpt-oss"):
        case = CASES[name]

        def step(case: Case = case, **given: Any) -> Any:
            ids = given.pop("ids")
            order = moe.dispatch(ids, case.experts)
            options = {"activation": case.activation, "transposed": case.transposed}
            return moe.expert_mlp(dispatch=order, impl="cpu", activation_budget=999, **options, **given)  # fmt: skip

        compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (7, 12):
            given, _ = make(case._replace(tokens=tokens, shared=True))
            ids = torch.rand(tokens, case.experts).topk(case.k, dim=1).indices
            leaves = {n: v.detach().requires_grad_() for n, v in given.items()}
            found = []
            for f in (step, compiled):
                out = f(**leaves, ids=ids)
                found.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b)


def test_grouped_linear_compiled() -> None:
    def step(x: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor) -> Tensor:
        return moe.grouped_linear(x, weight, offsets, bias, impl="cpu")

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (9, 30):
        leaves = [torch.randn(s, requires_grad=True) for s in ((rows, 6), (3, 5, 6), (3, 5))]
        offsets = torch.tensor([0, 4, 4, rows])
        found = []
        for f in (step, compiled):
            out = f(*leaves, offsets)
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


def test_operators_are_registered_as_torch_wants_them() -> None:
    given, order = make(CASES["gpt-oss"]._replace(tokens=4, shared=True), torch.float32)
    for weights in (given["topk_weights"], None):
        values = [
            None if n == "shared" and weights is None else given[n].detach().requires_grad_()
            for n in NAMES
        ]
        values[3] = None if weights is None else values[3]
        args = (*values, *order, "expert_mlp", *GPT_OSS, True, True, -1)
        torch.library.opcheck(torch.ops.hotloop.moe_experts.default, args)
    leaves = [given[n].detach().requires_grad_() for n in ("x", "gate_up", "gate_up_bias")]
    rows = moe.permute(leaves[0], order).detach().requires_grad_()
    args = (rows, *leaves[1:], *order, "grouped_linear", True)
    torch.library.opcheck(torch.ops.hotloop.moe_grouped_linear.default, args)


def test_a_dispatch_that_does_not_hold_is_refused() -> None:
    given, order = make(CASES["few rows per expert"])
    bad: list[tuple[str, Tensor]] = []
    for field, place, value in (
        ("slot_of_row", 3, 10), ("slot_of_row", 3, -1), ("slot_of_row", 2, int(order.slot_of_row[3])),
        ("row_of_slot", 3, 999), ("row_of_slot", 3, -1), ("expert_offsets", 1, 999), ("expert_offsets", 0, -1),
        ("expert_counts", 0, 999), ("expert_counts", 0, -1),
    ):  # fmt: skip
        changed = getattr(order, field).clone()
        changed[place] = value
        bad.append((field, changed))
    options = {"transposed": False, "impl": "cpu"}
    inputs = {n: v for n, v in given.items() if v is not None}
    rows = moe.permute(given["x"], order)
    for field, changed in bad:
        broken = order._replace(**{field: changed})
        with pytest.raises(ValueError, match=r"\[expert_mlp\] dispatch\."):
            moe.expert_mlp(**inputs, dispatch=broken, **options)
        with pytest.raises(ValueError, match=r"\[grouped_linear\] dispatch\."):
            moe.grouped_linear(rows, given["gate_up"], broken, impl="cpu")
    for offsets in ([0, 4, 3, 10], [-1, 2, 3, 10], [0, 2, 3, 11]):
        with pytest.raises(ValueError, match=r"\[grouped_linear\] dispatch: expected offsets"):
            moe.grouped_linear(rows, given["gate_up"], torch.tensor(offsets), impl="cpu")


def test_a_second_gradient_is_refused() -> None:
    given, order = make(CASES["one token"])
    x = given["x"].requires_grad_()
    out = moe.expert_mlp(
        x, given["gate_up"], given["down"], given["topk_weights"], order, impl="cpu"
    )
    with pytest.raises(NotImplementedError, match=r"\[expert_mlp\] impl: expected 'reference'"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
