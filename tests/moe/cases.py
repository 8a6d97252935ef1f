# SPDX-License-Identifier: Apache-2.0
"""Valid calls of the ops of this room."""

from catalog_cases import Arguments, Call, normal


def primitives(n: int) -> Arguments:
    """What a policy of three components says of n states: all differentiable."""
    return {
        "mixing_weights": normal(n, 3).softmax(-1).requires_grad_(),
        "action_values": normal(n, 3, leaf=True),
        "component_logps": (normal(n, 3) - 2).requires_grad_(),
    }


CALLS = [
    Call("pmoe_routing_loss", primitives),
]
