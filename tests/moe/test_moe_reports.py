# SPDX-License-Identifier: Apache-2.0
"""Misuse that other libraries of experts let pass without a word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotloop import moe
from torch import Tensor, nn
from torch.nn import functional


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


class Gemma(nn.RMSNorm):
    """A norm of another formula with the numbers of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (4,), 1 + self.weight, self.eps)


def hooked() -> nn.Module:
    norm = nn.LayerNorm(4)
    norm.register_forward_hook(lambda _module, _inputs, out: 2 * out)
    return norm


def patched() -> nn.Module:
    norm = nn.LayerNorm(4)
    norm.forward = lambda x: 3 * x  # type: ignore[method-assign, assignment]
    return norm


NORMS = {"gemma": lambda: Gemma(4), "hooked": hooked, "patched": patched}


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_that_is_more_than_its_numbers_is_called(name: str) -> None:
    torch.manual_seed(0)
    norm, mixture, x = NORMS[name](), moe.MoE(4, 4, 4, 2), torch.randn(2, 5, 4)
    plain = {"mu": 0.0, "gamma": -1.0}
    wanted = x + mixture(norm(x)).output
    stream = moe.MomentumMoE(mixture, norm, **plain)(moe.ResidualStream.start(x), norm)  # type: ignore[arg-type]
    torch.testing.assert_close(stream.x, wanted)
    assert stream.normed is not None
    torch.testing.assert_close(stream.normed, norm(wanted))
    post = moe.MomentumMoE(mixture, norm, post_norm=True, **plain)(moe.ResidualStream.start(x))  # type: ignore[arg-type]
    torch.testing.assert_close(post.x, norm(x + mixture(x).output))
    assert post.normed is None
    ahead = moe.RobustMomentumMoE(mixture, norm, L=1.0, k=4.0, lam=0.5)  # type: ignore[arg-type]
    first = ahead(moe.ResidualStream.start(x))
    looked = first.x + ahead.coefficients.alpha * first.state
    read = ahead._ahead(first)
    torch.testing.assert_close(read, norm(looked))
    added = moe.ResidualStream.start(x, norm).add(x, norm)
    torch.testing.assert_close(added.normed, norm(2 * x))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_the_eps_of_a_norm_that_names_none_is_that_of_torch(dtype: torch.dtype) -> None:
    x = torch.linspace(-1e-3, 1e-3, 12).view(3, 4).to(dtype)
    norm = nn.RMSNorm(4, dtype=dtype)
    found = moe.ResidualStream.start(x, norm).normed
    torch.testing.assert_close(found, norm(x))


class LowRank(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.down, self.up = (
            base,
            nn.Linear(4, 2, bias=False),
            nn.Linear(2, 4, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_the_router_is_called() -> None:
    torch.manual_seed(0)
    layer, x = moe.MoE(4, 4, 4, 2), torch.randn(6, 4)
    assert not any(isinstance(m, nn.Linear) for m in layer.modules())
    logits = functional.linear(x, layer.router.weight)
    torch.testing.assert_close(layer(x).routing.logsumexp, logits.logsumexp(-1))
    adapted = LowRank(layer.router)
    layer.router = adapted  # type: ignore[assignment]
    logits = logits + adapted.up(adapted.down(x))
    torch.testing.assert_close(layer(x).routing.logsumexp, logits.logsumexp(-1))
