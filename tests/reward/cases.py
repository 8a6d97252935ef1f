"""The losses of this room and their variants, for the tests of the pointwise loop."""

from pointwise_cases import Case, gap, probability, ratios

_SCORES = {"chosen_rewards": ratios, "rejected_rewards": ratios}

POINTWISE = [
    Case("bt_reward", "bt_reward_loss", _SCORES, kwargs={"center_coeff": 0.01}),
    Case("bt_reward-rows", "bt_reward_loss", _SCORES, {"margin": gap, "weight": probability}),
]
