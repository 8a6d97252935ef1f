# SPDX-License-Identifier: Apache-2.0
"""Heads under autocast. Their graphs are compiled in tests/test_catalog_compiles.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hotloop.logprob import (
    linear_cross_entropy,
    linear_kl,
    linear_logprob,
)
from logprob_cases import make_head
from torch import Tensor


def test_autocast_brings_two_dtypes_together() -> None:
    head = make_head(20, 8, 37, bias=False)
    h, w = head.hidden.bfloat16().requires_grad_(), head.weight.requires_grad_()
    with pytest.raises(TypeError, match=r"or use torch\.autocast"):
        linear_logprob(h, w, head.labels)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_logprob(h, w, head.labels).logps
    narrow = linear_logprob(h, w.bfloat16(), head.labels).logps
    assert out.dtype == torch.float32
    assert torch.equal(out, narrow)
    dh, dw = torch.autograd.grad(out.sum(), [h, w])
    assert (dh.dtype, dw.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_leaves_inputs_of_one_dtype_alone(inside: bool) -> None:
    """Every product runs in the dtype given, forward and backward, wherever backward is called."""
    head, teacher = make_head(20, 8, 37), make_head(20, 5, 37, seed=1)

    def run(cast: bool, make: Callable[..., Tensor]) -> list[Tensor]:
        h = head.leaves()
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss = make(h)
            if inside:
                return [loss, *torch.autograd.grad(loss, h.tensors(), allow_unused=True)]
        return [loss, *torch.autograd.grad(loss, h.tensors(), allow_unused=True)]

    for make in (
        lambda h: h.run().logps.sum(),
        lambda h: h.run(linear_cross_entropy),
        lambda h: linear_kl(
            h.hidden, h.weight, teacher.hidden, teacher.weight, labels=h.labels, student_bias=h.bias
        ),
    ):
        torch.testing.assert_close(run(True, make), run(False, make), rtol=0, atol=0)


def test_autocast_under_compile() -> None:
    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return linear_logprob(h, w, y).logps.sum()

    head = make_head(20, 8, 37, bias=False).leaves()
    torch.compiler.reset()
    made = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        value = made(head.hidden, head.weight, head.labels)
    found = [value, *torch.autograd.grad(value, head.tensors())]
    value = loss(head.hidden, head.weight, head.labels)
    expected = [value, *torch.autograd.grad(value, head.tensors())]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
