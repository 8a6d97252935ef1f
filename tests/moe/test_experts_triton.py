# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of experts, run on the CPU by Triton's interpreter.

Whether a kernel is interpreted is decided when it is decorated, once per process. So the file has two faces: in an
ordinary run one test starts pytest on this same file with TRITON_INTERPRET=1, and in that process are the tests of
values.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch
from processes import python

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter is numpy: overflow of an exponential warns there, not on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

if not INTERPRETING:

    def test_kernels_in_the_interpreter() -> None:
        words = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__)
        result = python(*words, timeout=600, TRITON_INTERPRET="1")
        assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]

else:
    from helpers import assert_no_worse_than_torch
    from hotloop import moe
    from hotloop.kernels.moe import grouped
    from hotloop.kernels.moe.grouped import Config, Configs
    from hotloop.moe import _experts_operator, _experts_triton
    from hotloop.moe import experts as front
    from test_experts import GATE, GPT_OSS, PLAIN, Case, make, run

    # Two tiles of rows and of columns and two steps at these sizes, with a rest.
    TILES = Configs(Config(16, 32, 16, 1, 1), Config(16, 32, 16, 1, 1))
    DTYPES = (torch.float32, torch.bfloat16, torch.float16)
    INTERLEAVED = moe.Activation("geglu", interleaved=True)
    LIMITED = moe.Activation("swiglu", limit=0.7)
    CASES = {
        "one token": Case(1, 8, 4, 6, 2),
        "several tiles": Case(24, 35, 18, 2, 2, biases=True, shared=True),
        "whole tiles": Case(20, 32, 32, 2, 2),
        "whole interleaved tiles": Case(20, 32, 32, 2, 2, activation=INTERLEAVED),
        "one expert with everything": Case(20, 8, 4, 5, 1, routing="one", biases=True),
        "no token": Case(0, 16, 8, 4, 2, biases=True, shared=True),
        "no choice": Case(5, 8, 4, 3, 0, shared=True),
        "no columns": Case(5, 8, 0, 3, 2, biases=True),
        "choices that go nowhere": Case(15, 8, 4, 3, 2, routing="holes", biases=True),
        "nothing goes anywhere": Case(6, 8, 4, 3, 2, routing="none", biases=True),
        "capacity": Case(20, 8, 4, 3, 2, capacity=9, biases=True),
        "aligned": Case(12, 16, 8, 3, 2, align=16, routing="holes"),
        "transposed": Case(20, 20, 18, 2, 2, transposed=True, biases=True),
        "strided": Case(12, 20, 18, 2, 2, strided=True, biases=True, shared=True),
        "interleaved": Case(20, 20, 18, 2, 2, activation=INTERLEAVED, biases=True),
        "limited": Case(12, 8, 12, 2, 2, activation=LIMITED, biases=True),
        "gpt-oss": Case(12, 20, 18, 3, 2, activation=GPT_OSS, transposed=True, biases=True),
        "no gate": Case(20, 20, 34, 2, 2, activation="relu2", biases=True),
    }

    @pytest.fixture(autouse=True)
    def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """CPU tensors go to the kernels, in small tiles; which functions ran."""
        ran: list[str] = []

        class Seen:
            def __getattr__(self, name: str) -> Any:
                ran.append(name)
                return getattr(_experts_triton, name)

        monkeypatch.setattr(_experts_operator, "loops_of", lambda x: Seen())
        monkeypatch.setattr(grouped, "configs", lambda *_: TILES)
        return ran

    def compare(calls: list[str], case: Case, dtype: torch.dtype, rows: bool) -> None:
        given, order = make(case, dtype)
        wide = {n: None if v is None else v.double() for n, v in given.items()}
        ours = run(case, given, order, "cpu", rows)
        assert calls == ["forward", "backward"]
        plain = run(case, given, order, "reference", rows)
        truth = run(case, wide, order, "reference", rows)
        for a, b, c in zip(
            [ours[0], *ours[1]], [plain[0], *plain[1]], [truth[0], *truth[1]], strict=True
        ):
            assert a.dtype == dtype
            assert_no_worse_than_torch(a, b, c, k=2, eps=4 * torch.finfo(dtype).eps)

    @pytest.mark.parametrize("name", CASES)
    def test_results_and_gradients(name: str, calls: list[str]) -> None:
        compare(calls, CASES[name], torch.float32, False)

    @pytest.mark.parametrize("name", ["one token", "several tiles", "aligned", "no token"])
    def test_results_and_gradients_of_rows(name: str, calls: list[str]) -> None:
        compare(calls, CASES[name], torch.float32, True)

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    @pytest.mark.parametrize("name", ["several tiles", "gpt-oss"])
    def test_narrower_types(name: str, dtype: torch.dtype, calls: list[str]) -> None:
        compare(calls, CASES[name], dtype, False)

    @pytest.mark.parametrize("kind", [*GATE, *PLAIN])
    def test_every_activation(kind: str, calls: list[str]) -> None:
        compare(calls, Case(6, 8, 12, 3, 2, activation=kind, biases=True), torch.float32, False)

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_grouped_linear(transposed: bool, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(2)
        for columns, offsets in ((20, [2, 2, 9, 10, 60, 60]), (32, [0, 0, 0, 0, 0, 0])):
            shape = (5, 37, columns) if transposed else (5, columns, 37)
            x, weight, bias, above = (
                torch.randn(s, generator=g).to(dtype)
                for s in ((70, 37), shape, (5, columns), (70, columns))
            )
            results = []
            for impl, wide in (("cpu", dtype), ("reference", dtype), ("reference", torch.float64)):
                leaves = [t.to(wide).requires_grad_() for t in (x, weight, bias)]
                out = moe.grouped_linear(
                    *leaves[:2], torch.tensor(offsets), leaves[2], transposed=transposed, impl=impl
                )
                results.append([out, *torch.autograd.grad(out, leaves, above.to(wide))])
            for a, b, c in zip(*results, strict=True):
                assert a.dtype == dtype
                assert_no_worse_than_torch(a, b, c, k=2, eps=4 * torch.finfo(dtype).eps)
            assert not results[0][0][: offsets[0]].any()
            assert not results[0][0][offsets[-1] :].any()

    def test_what_rows_of_nothing_hold_is_not_seen() -> None:
        given, order = make(CASES["aligned"], torch.float32)
        held = order.slot_of_row >= 0
        rows = torch.full((len(held), 16), torch.nan)
        rows[held] = moe.permute(given["x"], order)[held]
        rows.requires_grad_()
        weight = given["gate_up"].requires_grad_()
        results = []
        for impl in ("cpu", "reference"):
            out = moe.grouped_linear(rows, weight, order, impl=impl)
            above = torch.ones_like(out).masked_fill(~held[:, None], torch.nan)
            if impl == "reference":
                above = above.nan_to_num(0)
            grads = torch.autograd.grad(out, (rows, weight), above)
            results.append([out, *grads] if impl == "cpu" else [out, grads[0]])
        assert not results[0][0][~held].any()
        assert not results[0][1][~held].any()
        assert results[0][2].isfinite().all()
        torch.testing.assert_close(results[0][:2], results[1])

    def test_a_weight_of_a_choice_that_goes_nowhere_may_be_anything() -> None:
        case = CASES["choices that go nowhere"]
        given, order = make(case, torch.float32)
        clean = run(case, given, order, "cpu", False)
        nowhere = order.row_of_slot.view(given["topk_weights"].shape) < 0
        given["topk_weights"] = given["topk_weights"].masked_fill(nowhere, torch.nan)
        found = run(case, given, order, "cpu", False)
        for a, b in zip([clean[0], *clean[1]], [found[0], *found[1]], strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("name", ["one expert with everything", "gpt-oss"])
    @pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
    def test_a_budget_changes_memory_and_not_one_bit(name: str, dtype: torch.dtype) -> None:
        case = CASES[name]
        given, order = make(case, dtype)
        row = 2 * case.inner * given["x"].element_size()
        whole = run(case, given, order, "cpu", False)
        for budget in (0, 7 * row, 10**9):
            part = run(case, given, order, "cpu", False, activation_budget=budget)
            for a, b in zip([whole[0], *whole[1]], [part[0], *part[1]], strict=True):
                assert torch.equal(a, b)

    @pytest.mark.parametrize("subset", [(0,), (2,), (3,), (4,), (5,), (1, 5), (2, 3)], ids=str)
    def test_only_the_gradients_that_are_wanted(subset: tuple[int, ...]) -> None:
        case = CASES["gpt-oss"]._replace(tokens=9)
        given, order = make(case, torch.float32)
        names = ("x", "gate_up", "down", "topk_weights", "gate_up_bias", "down_bias")
        results = []
        for wanted in (range(6), subset):
            leaves = [given[n].detach().requires_grad_(i in wanted) for i, n in enumerate(names)]
            out = moe.expert_mlp(
                **dict(zip(names, leaves)), dispatch=order, activation=GPT_OSS, transposed=True,
                impl="cpu",
            )  # fmt: skip
            results.append(torch.autograd.grad(out.sum(), [leaves[i] for i in subset]))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)

    def test_tiles_cover_every_row_once() -> None:
        g = torch.Generator().manual_seed(3)
        for experts, rows, block in ((1, 1, 16), (3, 50, 16), (40, 200, 16), (300, 7, 128)):
            for cut in (0, rows // 5):
                edges = torch.randint(cut, rows + 1 - cut, (experts + 1,), generator=g).sort()[0]
                counts = (edges.diff() * torch.rand(experts, generator=g)).long()
                order = grouped.Order(edges, counts, rows)
                table = grouped.schedule(order, block).table.t().tolist()
                seen: list[int] = []
                for expert, first, filled, stop in table:
                    mine = range(first, min(stop, first + block))
                    seen += mine
                    for row in mine:
                        inside = 0 <= expert < experts
                        low = int(edges[expert]) if inside else 0
                        assert (row < filled) == (inside and row < low + int(counts[expert]))
                        assert not inside or low <= row < int(edges[expert + 1])
                        owners = ((edges[:-1] <= row) & (row < edges[1:])).nonzero().flatten()
                        assert inside == bool(len(owners))
                        assert not inside or int(owners[-1]) == expert
                assert seen == list(range(rows))

    def test_offsets_out_of_range_stay_inside_the_rows() -> None:
        """Nobody looks at numbers on a GPU; writing beyond the result would be worse than a wrong result."""
        for offsets in ([-5, 3, 99, 400], [50, 3, 2, 1], [2**40, 0, 2**41, -(2**40)]):
            edges = torch.tensor(offsets)
            for counts in (None, torch.tensor([1000, -3, 2**40])):
                table = grouped.schedule(grouped.Order(edges, counts, 70), 16).table
                live = table[1] < table[3]
                assert (table[1][live] >= 0).all()
                assert (table[3] <= 70).all()
                assert (table[2] <= 70).all()

    def test_a_dispatch_that_does_not_hold_is_refused_where_numbers_are_looked_at(
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """As with HOTLOOP_CHECK=1 on a GPU."""
        monkeypatch.setitem(front.CANDIDATES, "triton", lambda _: None)
        given, order = make(CASES["one token"], torch.float32)
        inputs = {n: v for n, v in given.items() if v is not None}
        broken = order._replace(expert_offsets=order.expert_offsets + 1)
        with pytest.raises(ValueError, match=r"\[expert_mlp\] dispatch\."):
            moe.expert_mlp(**inputs, dispatch=broken, impl="triton")
        inputs.pop("topk_weights")
        with pytest.raises(ValueError, match=r"\[expert_rows\] dispatch\."):
            moe.expert_rows(**inputs, dispatch=broken, impl="triton")
        rows = moe.permute(given["x"], order)
        for wrong in (broken, broken.expert_offsets):
            with pytest.raises(ValueError, match=r"\[grouped_linear\] dispatch"):
                moe.grouped_linear(rows, given["gate_up"], wrong, impl="triton")
