# SPDX-License-Identifier: Apache-2.0
"""The losses of this room and their variants, for the tests of the pointwise loop."""

from typing import Any

from pointwise_cases import Case, gap, probability, ratios
from pointwise_oracles import softplus

_SCORES = {"chosen_rewards": ratios, "rejected_rewards": ratios}


def bt_reward(
    chosen_rewards: Any, rejected_rewards: Any, center_coeff: Any, margin: Any = 0, weight: Any = 1
) -> Any:
    pair = weight * softplus(-(chosen_rewards - rejected_rewards - margin))
    return pair + center_coeff * (chosen_rewards + rejected_rewards) ** 2


POINTWISE = [
    Case("bt_reward", _SCORES, kwargs={"center_coeff": 0.01}, formula=bt_reward),
    Case(
        "bt_reward-rows", _SCORES, {"margin": gap, "weight": probability}, {"center_coeff": 0.5},
        formula=bt_reward,
    ),
]  # fmt: skip
