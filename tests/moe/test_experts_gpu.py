# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of experts on a GPU: the values of the CPU's cases, in graphs, without a wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, captured, no_waiting, on_gpu
from helpers import assert_no_worse_than_torch
from hotloop import moe
from hotloop.front.impl import last_impl
from test_experts import CASES, GPT_OSS, Case, make, run
from torch import Tensor

pytestmark = on_gpu
IMPL = "triton" if DEVICE == "cuda" else "cpu"
by_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1]
)
# By the rows of a mean expert every tile is taken: 1, 12, 30, 75, and hundreds with whole and with partial tiles.
SIZES = {
    "decoding": Case(8, 256, 128, 64, 8),
    "12 rows": Case(100, 192, 96, 64, 8, shared=True),
    "30 rows": Case(120, 256, 128, 8, 2, biases=True),
    "75 rows": Case(300, 256, 128, 8, 2, routing="holes"),
    "whole tiles": Case(1024, 256, 256, 4, 2),
    "partial tiles": Case(700, 264, 136, 3, 2, biases=True, shared=True),
    "gpt-oss": Case(700, 320, 360, 3, 2, activation=GPT_OSS, transposed=True, biases=True),
}
ALL = {**CASES, **SIZES}


def on_device(given: dict[str, Any], order: moe.Dispatch) -> tuple[dict[str, Any], moe.Dispatch]:
    moved = {n: None if v is None else v.to(DEVICE) for n, v in given.items()}
    return moved, moe.Dispatch(*(t.to(DEVICE) for t in order))


@by_dtype
@pytest.mark.parametrize("rows", [False, True], ids=["mlp", "rows"])
@pytest.mark.parametrize("name", ALL)
def test_results_and_gradients(name: str, rows: bool, dtype: torch.dtype) -> None:
    case = ALL[name]
    given, order = on_device(*make(case, dtype))
    wide = {n: None if v is None else v.double() for n, v in given.items()}
    ours = run(case, given, order, IMPL, rows)
    assert last_impl("expert_rows" if rows else "expert_mlp") == IMPL
    plain = run(case, given, order, "reference", rows)
    truth = run(case, wide, order, "reference", rows)
    for a, b, c in zip(
        [ours[0], *ours[1]], [plain[0], *plain[1]], [truth[0], *truth[1]], strict=True
    ):
        assert a.dtype == dtype
        eps = 4 * torch.finfo(dtype).eps
        assert_no_worse_than_torch(a.cpu(), b.cpu(), c.cpu(), k=2, eps=eps)


@by_dtype
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear(transposed: bool, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(2)
    for columns, inner in ((130, 72), (256, 128)):
        shape = (5, inner, columns) if transposed else (5, columns, inner)
        offsets = torch.tensor([2, 2, 9, 10, 380, 380], device=DEVICE)
        tensors = [
            torch.randn(s, generator=g).to(DEVICE, dtype)
            for s in ((400, inner), shape, (5, columns), (400, columns))
        ]
        results = []
        for impl, wide in ((IMPL, dtype), ("reference", dtype), ("reference", torch.float64)):
            x, weight, bias, above = (t.to(wide) for t in tensors)
            leaves = [t.requires_grad_() for t in (x, weight, bias)]
            out = moe.grouped_linear(x, weight, offsets, bias, transposed=transposed, impl=impl)  # type: ignore[arg-type]
            results.append([out, *torch.autograd.grad(out, leaves, above)])
        for a, b, c in zip(*results, strict=True):
            assert_no_worse_than_torch(
                a.cpu(), b.cpu(), c.cpu(), k=2, eps=4 * torch.finfo(dtype).eps
            )
        assert not results[0][0][:2].any()
        assert not results[0][0][380:].any()


@by_dtype
def test_the_same_bits_every_time_and_for_any_budget(dtype: torch.dtype) -> None:
    for name in ("partial tiles", "gpt-oss"):
        given, order = on_device(*make(ALL[name], dtype))
        wanted = run(ALL[name], given, order, IMPL, False)
        for budget in (None, 0, 10**5):
            found = run(ALL[name], given, order, IMPL, False, activation_budget=budget)
            for a, b in zip([wanted[0], *wanted[1]], [found[0], *found[1]], strict=True):
                assert torch.equal(a, b)


@by_dtype
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    case = ALL["partial tiles"]
    given, order = on_device(*make(case, dtype))
    leaves = {n: v.requires_grad_() for n, v in given.items() if v is not None}
    above = torch.ones_like(given["x"])

    def step() -> list[Tensor]:
        out = moe.expert_mlp(**leaves, dispatch=order, impl=IMPL)  # type: ignore[arg-type]
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), above)]

    wanted = step()
    torch.cuda.synchronize()
    with no_waiting():
        found = step()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@by_dtype
def test_a_captured_step_follows_another_routing(dtype: torch.dtype) -> None:
    case = ALL["partial tiles"]
    given, order = on_device(*make(case, dtype))
    leaves = {n: v.requires_grad_() for n, v in given.items() if v is not None}
    above = torch.ones_like(given["x"])

    def step() -> list[Tensor]:
        out = moe.expert_mlp(**leaves, dispatch=order, activation_budget=10**5, impl=IMPL)  # type: ignore[arg-type]
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), above)]

    graph, filled = captured(step)
    for routing in ("one", "even"):
        ids = torch.full((case.tokens, case.k), 1 if routing == "one" else -1)
        if routing == "even":
            ids = (torch.arange(case.tokens)[:, None] + torch.arange(case.k)) % case.experts
        for old, new in zip(order, moe.dispatch(ids, case.experts), strict=True):
            old.copy_(new)
        graph.replay()
        found = [t.clone() for t in filled]
        torch.testing.assert_close(found, step(), rtol=0, atol=0)


def test_float64_is_left_to_the_reference() -> None:
    given, order = on_device(*make(CASES["one token"]))
    run(CASES["one token"], given, order, "auto", False)
    assert last_impl("expert_mlp") == "reference"
    with pytest.raises(NotImplementedError, match=r"triton +refused: .*float64"):
        run(CASES["one token"], given, order, "triton", False)
