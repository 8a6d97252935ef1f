"""The losses of this room as their papers write them, for tests/core/test_pointwise_oracles.py."""

from __future__ import annotations

from typing import Any

from pointwise_oracles import Numbers, Oracle, mean, mpf, softplus


def bt_reward(v: Numbers) -> Any:
    return mean(
        w * softplus(-(a - b - m)) + mpf("0.01") * (a + b) ** 2
        for a, b, m, w in zip(v["chosen_rewards"], v["rejected_rewards"], v["margin"], v["weight"])
    )


ORACLES = [
    Oracle(
        "bt_reward_loss",
        {"chosen_rewards": [1.5, -0.25, 3.0], "rejected_rewards": [0.5, 0.75, -2.0]},
        {"margin": [0.0, 1.0, 0.5], "weight": [1.0, 2.0, 0.25]},
        {"center_coeff": 0.01},
        bt_reward,
    ),
]
