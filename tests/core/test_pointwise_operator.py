# SPDX-License-Identifier: Apache-2.0
"""The registered operator behind the losses. Their graphs are compiled in tests/test_catalog_compiles.py."""

from __future__ import annotations

import pytest
import torch
from helpers import gradients
from pointwise_cases import BY_ID


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
def test_opcheck(dtype: torch.dtype, reduction: str) -> None:
    grad, const = BY_ID["dpo"].inputs(7, dtype)
    inputs = [x.requires_grad_() for x in grad.values()]
    args = (inputs, list(const.values()), "preference.dpo", [0.1], reduction, [], 1, None, None, -1)
    torch.library.opcheck(torch.ops.hotloop.pointwise.default, args)


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


def test_a_complex_constant_is_refused_by_a_compiled_loss() -> None:
    grad, const = BY_ID["dpo"].inputs(8)
    name, value = next(iter(const.items()))
    compiled = torch.compile(BY_ID["dpo"].fn, backend="eager")
    with pytest.raises(TypeError, match=rf"\[dpo_loss\] {name}: expected real numbers, got comp"):
        compiled(**{**grad, **const, name: value + 1j})


def test_autocast_leaves_the_loss_in_float32() -> None:
    grad, const = BY_ID["dpo"].inputs(8, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = BY_ID["dpo"].fn(**grad, **const)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, BY_ID["dpo"].fn(**grad, **const))
