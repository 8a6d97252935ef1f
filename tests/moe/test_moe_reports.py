# SPDX-License-Identifier: Apache-2.0
"""Misuse that other libraries of experts let pass without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotloop import moe


def routed(tokens: int = 6, experts: int = 4, k: int = 2) -> moe.Routing:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(2))
    return moe.route(logits, k)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"expert_counts": torch.tensor([8, 6, -2, 0])}, "got -2 at \\[2\\] \\(1 of 4\\)"),
        ({"expert_counts": torch.tensor([8.0, 4.0, torch.nan, 0.0])}, "got nan at"),
        ({"expert_counts": torch.tensor([8.0, 4.0, torch.inf, 0.0])}, "got inf at"),
        # Counts of two ranks, and the tokens of one.
        ({"expert_counts": torch.tensor([8, 8, 4, 4]), "num_tokens": 6}, "24 choices .* got 6"),
        (
            {"expert_counts": torch.tensor([8, 8, 4, 4]), "num_tokens": torch.tensor(6)},
            "24 choices .* got 6",
        ),
        ({"expert_counts": torch.tensor([8, 4, 0, 0]), "num_tokens": 0}, "12 choices .* got 0"),
    ],
)
def test_counts_that_cannot_be_are_refused(call: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        moe.load_balance_loss(routed(), **call)


def test_counts_of_fewer_choices_and_means_over_ranks_are_taken() -> None:
    found = routed()
    wanted = moe.load_balance_loss(found)
    third = found.expert_counts.float() / 3
    mean = moe.load_balance_loss(found, expert_counts=third + third + third, num_tokens=6)
    torch.testing.assert_close(mean, wanted)
    # Half of the tokens were dropped: their choices are missing from the counts.
    dropped = moe.load_balance_loss(found, expert_counts=found.expert_counts, num_tokens=12)
    torch.testing.assert_close(dropped, wanted / 2)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("capacity", [12, 2**63 - 1, 2**63, 10**30])
def test_a_capacity_without_bound_is_none(capacity: int, impl: Any) -> None:
    ids = routed().topk_ids
    found = moe.dispatch(ids, 4, capacity=capacity, impl=impl)
    for a, b in zip(found, moe.dispatch(ids, 4)):
        assert torch.equal(a, b)


def test_a_capacity_factor_without_bound_drops_nothing() -> None:
    layer = moe.MoE(4, 4, 4, 2, capacity_factor=1e30)
    assert int(layer(torch.randn(6, 4)).routing.dispatch.expert_counts.sum()) == 12
