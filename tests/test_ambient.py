# SPDX-License-Identifier: Apache-2.0
"""What torch.set_default_device and torch.set_default_dtype say is for the user's tensors, not for ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from catalog_cases import Call, calls_of
from test_catalog_compiles import step

EVERY = calls_of(lambda op: True)


@contextmanager
def ambient() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(("op", "call"), EVERY, ids=[f"{op.room}.{c.id}" for op, c in EVERY])
def test_ambient_device_and_dtype_change_nothing(op: Any, call: Call) -> None:
    expected = step(call.function, op, call.arguments(4))
    arguments = call.arguments(4)
    with ambient():
        found = step(call.function, op, arguments)
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu"
        assert a.dtype == b.dtype
        assert torch.equal(a, b) or bool((a.isnan() == b.isnan()).all())


def test_the_default_device_set_for_good_is_left_alone_too() -> None:
    from hotloop.logprob import linear_cross_entropy

    h, w = torch.eye(2, requires_grad=True), torch.eye(2)
    labels = torch.tensor([0, 1])
    torch.set_default_device("meta")
    try:
        loss = linear_cross_entropy(h, w, labels)
        loss.backward()
    finally:
        torch.set_default_device(None)
    # log(1 + e^-1), and minus half of sigmoid(-1) where the label is
    torch.testing.assert_close(loss.item(), 0.3132617, atol=1e-6, rtol=0)
    assert h.grad is not None
    torch.testing.assert_close(h.grad[0], torch.tensor([-0.1344707, 0.1344707]))
