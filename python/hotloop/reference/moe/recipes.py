# SPDX-License-Identifier: Apache-2.0
"""Recipes of ``hotloop.moe``, one state or token at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def pmoe_routing_loss(
    mixing_weights: Tensor,
    action_values: Tensor,
    component_logps: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    routing_weight: float = 1.0,
    components: str = "mean",
    backpropagate: str = "max",
) -> tuple[Any, ...]:
    """loss, routing, primitive, winners and winner_logps of ``hotloop.moe.pmoe_routing_loss``."""
    routing, primitive, winners, winner_logps = [], [], [], []
    for b, (w, q) in enumerate(zip(mixing_weights, action_values)):
        values = q.tolist()
        best = values.index(max(values))
        squares = [(w[k] - (1.0 if k == best else 0.0)) ** 2 for k in range(len(w))]
        routing.append(sum(squares) / (len(w) if components == "mean" else 1))
        winners.append(best)
        if component_logps is not None:
            alpha = temperature.detach().reshape(()) if isinstance(temperature, Tensor) else temperature  # fmt: skip
            each = [alpha * component_logps[b, k] - q[k] for k in range(len(q))]
            primitive.append(each[best] if backpropagate == "max" else sum(each) / len(each))
            winner_logps.append(component_logps[b, best].detach())
    found = torch.stack(routing).mean()
    index = torch.tensor(winners, device=mixing_weights.device)
    if component_logps is None:
        return routing_weight * found, found, None, index, None
    actor = torch.stack(primitive).mean()
    return routing_weight * found + actor, found, actor, index, torch.stack(winner_logps)
