# SPDX-License-Identifier: Apache-2.0
"""Recipes of ``hotloop.moe``, one state or token at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .experts import Activation, activate
from .results import Routing
from .router import route


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


def anchor_reconcile_moe(
    x: Tensor,
    router_weight: Tensor,
    gate_up: Tensor,
    down: Tensor,
    anchor_gate_up: Tensor,
    anchor_down: Tensor,
    *,
    top_k: int = 2,
    renormalize: bool = False,
    routed_scale: float = 1.0,
    activation: str | Activation = "swiglu",
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Routing]:
    """output, load_balance and routing of ``hotloop.moe.anchor_reconcile_moe``."""
    act = Activation(activation) if isinstance(activation, str) else activation
    rows = x.reshape(-1, x.shape[-1])
    mask = None if token_mask is None else token_mask.reshape(-1)
    wide = torch.promote_types(x.dtype, torch.float32)
    routing = route(
        rows.to(wide) @ router_weight.to(wide).T, top_k, renormalize=renormalize, routed_scale=routed_scale,
        token_mask=mask,
    )  # fmt: skip
    out = []
    for row, ids, weights in zip(rows, routing.topk_ids.tolist(), routing.topk_weights):
        y = activate((anchor_gate_up @ row)[None], act)[0] @ anchor_down.T
        for e, weight in zip(ids, weights):
            if e >= 0:
                y = y + weight * (activate((gate_up[e] @ row)[None], act)[0] @ down[e].T)
        out.append(y)
    output = torch.stack(out).to(x.dtype).view(x.shape) if out else torch.zeros_like(x)
    counts = routing.expert_counts.to(routing.prob_sums.dtype)
    shares = counts / counts.sum().clamp(min=1)
    mean = routing.prob_sums / routing.num_tokens.clamp(min=1)
    return output, len(shares) * (shares * mean).sum(), routing
