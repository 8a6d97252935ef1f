# SPDX-License-Identifier: Apache-2.0
"""The helpers must be able to fail."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_gradient_close, assert_no_worse_than_torch, gradient_distance

TRUTH = torch.linspace(-3, 3, 11, dtype=torch.float64)


def test_equal_errors_pass_and_a_larger_one_is_rejected() -> None:
    other = TRUTH.float() + 1e-4
    assert_no_worse_than_torch(TRUTH.float() - 1.9e-4, other, TRUTH)
    with pytest.raises(AssertionError, match="bound"):
        assert_no_worse_than_torch(TRUTH.float() - 2.3e-4, other, TRUTH)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_must_be_where_torch_has_one(bad: float) -> None:
    ours = TRUTH.float()
    ours[4] = bad
    truth = TRUTH.clone()
    truth[4] = bad
    assert_no_worse_than_torch(ours, ours, truth)
    with pytest.raises(AssertionError, match="expected at"):
        assert_no_worse_than_torch(ours, TRUTH.float(), TRUTH)


def test_a_zeroed_small_row_is_rejected() -> None:
    truth = torch.tensor([1.0, 1e-7, 2.0])
    ours = torch.tensor([1.0, 0.0, 2.0])
    assert gradient_distance(ours, truth).relative_l2 < 1e-6
    with pytest.raises(AssertionError):
        assert_gradient_close(ours, truth, 1e-3)


def test_memory_taken_by_hotloop_is_poisoned() -> None:
    scope = {"__name__": "hotloop.somewhere", "torch": torch}
    exec("x = torch.empty(3)\ni = torch.empty_like(torch.zeros(2, dtype=torch.int32))", scope)
    assert bool(scope["x"].isnan().all())
    assert scope["i"].tolist() == [2**31 - 1] * 2
