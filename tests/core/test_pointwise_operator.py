"""The registered operator behind the losses: opcheck, and torch.compile without a graph break."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from helpers import gradients
from pointwise_cases import BY_ID, Case
from torch import Tensor


def sample(
    case_id: str, head: str, params: list[float], n: int, dtype: torch.dtype, reduction: str
) -> tuple[Any, ...]:
    grad, const = BY_ID[case_id].inputs(n, dtype)
    inputs = [x.requires_grad_() for x in grad.values()]
    constants = [x if x.is_floating_point() else x.to(dtype) for x in const.values()]
    return inputs, constants, head, params, reduction, [], 1, None, None, -1


SAMPLES = [
    ("dpo", "preference.dpo", [0.1], 16, torch.float32, "mean"),
    ("sppo", "preference.sppo", [10.0], 7, torch.float64, "none"),
    ("srpo", "preference.srpo", [0.1, 0.5, 0.5], 9, torch.bfloat16, "sum"),
    ("orpo", "preference.orpo", [0.1], 1, torch.float32, "none"),
    ("npo", "unlearn.npo", [0.1, 0.0], 4, torch.float16, "mean"),
]


@pytest.mark.parametrize("row", SAMPLES, ids=lambda r: r[0])
def test_opcheck(row: tuple[Any, ...]) -> None:
    args = sample(*row)
    if row[0] == "npo":
        args[1].append(torch.ones(1, dtype=torch.float16))
    torch.library.opcheck(torch.ops.hotloop.pointwise.default, args)


# One per way through the front door: plain, sorted, gathered pairs, a mean of other length, rows
# that need arithmetic first, optional inputs left out, scalars for rows.
COMPILED = [
    "dpo",
    "conservative_dpo-rows",
    "dno-gap",
    "slic_hinge",
    "aot-paired",
    "bco_pair",
    "kto-rows",
    "cpo",
    "orpo",
    "cpl",
    "cpl_dense",
    "vpo-calibration",
    "rpo_sft-average",
    "hypo",
    "modpo",
    "opa_dpo",
    "npo-retain",
]


def step(fn: Any, case: Case, n: int, reduction: str) -> tuple[Tensor, list[Tensor]]:
    grad, const = case.inputs(n, seed=n)
    leaves = {name: x.requires_grad_() for name, x in grad.items()}
    loss = fn(leaves, const, reduction)
    return loss, gradients(loss, list(leaves.values()))


def assert_compiles(case: Case, backend: str, sizes: tuple[int, ...]) -> None:
    def eager(grad: dict[str, Tensor], const: dict[str, Tensor], reduction: str) -> Tensor:
        return case.fn(**grad, **const, **case.kwargs, reduction=reduction)

    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, backend=backend)
    for n in sizes:
        reduction = "mean" if case.only_mean or n else "sum"
        ours, expected = step(compiled, case, n, reduction), step(eager, case, n, reduction)
        assert ours[0].dtype == expected[0].dtype
        torch.testing.assert_close(ours[0], expected[0], rtol=2e-6, atol=2e-6, equal_nan=True)
        for a, b in zip(ours[1], expected[1]):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("id", COMPILED)
def test_compiled_equals_eager(id: str) -> None:
    # 8, then another batch size, then no rows at all.
    assert_compiles(BY_ID[id], "aot_eager", (8, 13, 0))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("id", ["dpo", "kto-rows", "rpo_sft-average"])
def test_inductor_equals_eager(id: str) -> None:
    assert_compiles(BY_ID[id], "inductor", (8, 13))


def test_registered_and_direct_route_agree_bit_by_bit() -> None:
    grad, const = BY_ID["dpo"].inputs(300)
    inputs = [x.requires_grad_() for x in grad.values()]
    direct = BY_ID["dpo"].fn(**grad, **const, reduction="none", impl="cpu")
    registered, _, _ = torch.ops.hotloop.pointwise(
        inputs, list(const.values()), "preference.dpo", [0.1], "none", [], 1, None, None, -1
    )
    assert torch.equal(direct, registered)
    torch.testing.assert_close(
        gradients(direct, inputs), gradients(registered, inputs), rtol=0, atol=0
    )


def test_autocast_leaves_the_loss_in_float32() -> None:
    grad, const = BY_ID["dpo"].inputs(8, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = BY_ID["dpo"].fn(**grad, **const)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, BY_ID["dpo"].fn(**grad, **const))
