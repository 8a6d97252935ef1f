# SPDX-License-Identifier: Apache-2.0
"""The loss of a reward model beside TRL's ``RewardTrainer``, in eager torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.pointwise import Row


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor, center: float) -> Tensor:
    loss = -F.logsigmoid(chosen - rejected - margin).mean()
    return loss + center * ((chosen + rejected) ** 2).mean()


def scores(n: int, g: torch.Generator) -> dict[str, Tensor]:
    """Scores of a few units, the chosen answer's a little higher; margins as of a scale of four grades."""
    chosen, rejected = torch.randn(2, n, generator=g, device=g.device) * 3
    margin = torch.randint(4, (n,), generator=g, device=g.device) / 3
    return {"chosen": chosen + 1, "rejected": rejected, "margin": margin}


ROWS = (
    Row(
        "bt_reward_loss",
        bradley_terry,
        ("chosen", "rejected"),
        ("margin",),
        {"center_coeff": 0.01},
        inputs=scores,
        quick=True,
    ),
)
