# SPDX-License-Identifier: Apache-2.0
"""The reward loss beside the one that TRL computes, in TRL's own code."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotloop.reward import bt_reward_loss

pytestmark = pytest.mark.peer


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("centring", [None, 0.01])
def test_trl_reward_trainer(with_margin: bool, centring: float | None) -> None:
    from trl.trainer.reward_trainer import RewardTrainer

    g = torch.Generator().manual_seed(3)
    chosen, rejected = (torch.randn(9, generator=g, requires_grad=True) for _ in range(2))
    margin = torch.rand(9, generator=g)

    class Model(torch.nn.Module):
        def forward(self, **_: Any) -> Any:
            return SimpleNamespace(logits=torch.cat((chosen, rejected))[:, None])

    model = Model()
    trainer = SimpleNamespace(
        model=model,
        args=SimpleNamespace(center_rewards_coefficient=centring),
        accelerator=SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(18, 4)} | ({"margin": margin} if with_margin else {})
    theirs = RewardTrainer.compute_loss(trainer, model, inputs)
    ours = bt_reward_loss(
        chosen, rejected, margin if with_margin else 0.0, center_coeff=centring or 0.0
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(ours, (chosen, rejected)),
        torch.autograd.grad(theirs, (chosen, rejected)),
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
