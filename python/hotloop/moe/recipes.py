# SPDX-License-Identifier: Apache-2.0
"""Losses and layers of papers that are a few lines around the other ops of the room, in torch operators."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..front import arrays, at_run_time, check

Components = Literal["mean", "sum"]
Backpropagate = Literal["max", "all"]


class PMoELoss(NamedTuple):
    """The loss of a probabilistic mixture of experts, and its parts."""

    loss: Tensor
    """(): routing_weight * routing + primitive, or routing_weight * routing alone without ``component_logps``."""
    routing: Tensor
    """(): how far the mixture is from the best component. Its gradient reaches ``mixing_weights`` only."""
    primitive: Tensor | None
    """(): the actor's loss of the components that are trained. None without ``component_logps``."""
    winners: Tensor
    """(B,) int64: the component with the largest action value; the lower one of two equal."""
    winner_logps: Tensor | None
    """(B,): log-probabilities of the winners' actions, detached: the loss of the temperature takes them."""


def pmoe_routing_loss(
    mixing_weights: Tensor,
    action_values: Tensor,
    component_logps: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.2,
    routing_weight: float = 1.0,
    components: Components = "mean",
    backpropagate: Backpropagate = "max",
) -> PMoELoss:
    """Teach the router of a policy which of its K components acts best, without a gradient through a sampled index.

    k* = argmax_k Q_k, v = onehot(k*), a constant. routing = mean over the batch of mean_k (w_k - v_k)^2, or of the sum
    over k. primitive = mean over the batch of (temperature * logp_k* - Q_k*), the actor loss of soft actor-critic for
    the winner alone, or of its mean over all k with backpropagate="all". loss = routing_weight * routing + primitive.
    If component k is best with probability p_k, routing alone is smallest at w = p.

    Args:
        mixing_weights: w, the router's probabilities, (B, K), K >= 1, a float dtype. Differentiable.
        action_values: Q_k, the value of the action that component k took (the smaller one of two critics), (B, K).
            Differentiable through the actions; the choice of the winner has no gradient.
        component_logps: log-probability of each component's action under that component, (B, K), nats. Differentiable.
            None leaves the primitive loss out: ``action_values`` then has no gradient.
        temperature: alpha of soft actor-critic, >= 0: a number or a tensor of one, which gets no gradient. Default
            0.2.
        routing_weight: >= 0. Default 1.
        components: "mean" or "sum" over K in the routing loss. Default "mean", as in the authors' code.
        backpropagate: "max" trains the winner, "all" every component. Default "max".

    Returns:
        PMoELoss; losses are float32, float64 if any input is. A mean over no rows is NaN.

    Raises:
        TypeError: an argument is not a float tensor, or a number is not a number.
        ValueError: shapes or devices differ, a number is out of range, or, on the CPU, an action value is NaN; with
            HOTLOOP_CHECK=1 any input that is not finite.

    Examples:
        >>> import torch
        >>> w, q = torch.tensor([[0.25, 0.75]]), torch.tensor([[1.0, 3.0]])
        >>> found = pmoe_routing_loss(w, q, torch.zeros(1, 2))
        >>> found.winners.tolist(), float(found.routing), float(found.primitive)
        ([1], 0.0625, -3.0)

    Reference:
        Ren et al. 2021, arXiv:2104.09122; formula from a co-author's code (Popular-RL-Algorithms, pmoe_sac.py).
    """
    op = "pmoe_routing_loss"
    w = check.float_tensor(op, "mixing_weights", mixing_weights, ndim=2)
    q = check.float_tensor(op, "action_values", action_values, ndim=2)
    if w.shape[1] == 0:
        raise ValueError(
            f"[{op}] mixing_weights: expected at least one component, got shape {tuple(w.shape)}. Pass (B, K)."
        )
    tensors: dict[str, Tensor] = {"action_values": q}
    if component_logps is not None:
        logps = check.float_tensor(op, "component_logps", component_logps, ndim=2)
        tensors["component_logps"] = logps
    for name, x in tensors.items():
        check.shape(op, name, x, tuple(w.shape), "like mixing_weights", "Pass one per component.")
        check.same_place(op, name, x, "mixing_weights", w)
    scale = _temperature(op, temperature, w)
    routing_weight = check.number(op, "routing_weight", routing_weight, at_least=0)
    check.choice(op, "components", components, ("mean", "sum"))
    check.choice(op, "backpropagate", backpropagate, ("max", "all"))
    check.finite(op, mixing_weights=w, **tensors)
    seen = q.detach()
    if arrays.compiling():
        seen = at_run_time.checked("action values", op, "action_values", seen)
    elif q.is_cpu:
        _look_at_action_values(op, "action_values", seen)

    given = (w.dtype, *(x.dtype for x in tensors.values()))
    wide = torch.float64 if torch.float64 in given else torch.float32
    w, q = w.to(wide), q.to(wide)
    winners = seen.argmax(-1)
    index = winners.unsqueeze(-1)
    best = torch.zeros_like(w).scatter(-1, index, 1.0)
    squares = (w - best) ** 2
    routing = (squares.mean(-1) if components == "mean" else squares.sum(-1)).mean()
    if component_logps is None:
        return PMoELoss(routing_weight * routing, routing, None, winners, None)
    actor = scale * logps.to(wide) - q
    chosen = actor.gather(-1, index).squeeze(-1) if backpropagate == "max" else actor.mean(-1)
    primitive = chosen.mean()
    winner_logps = logps.detach().to(wide).gather(-1, index).squeeze(-1)
    return PMoELoss(routing_weight * routing + primitive, routing, primitive, winners, winner_logps)


def _temperature(op: str, value: Any, like: Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return check.number(op, "temperature", value, at_least=0)
    check.float_tensor(op, "temperature", value)
    if value.numel() != 1:
        raise ValueError(
            f"[{op}] temperature: expected a tensor of one number, got shape {tuple(value.shape)}. "
            "Pass log_alpha.exp()."
        )
    check.same_place(op, "temperature", value, "mixing_weights", like)
    return value.detach().reshape(())


@at_run_time.look("action values")
def _look_at_action_values(op: str, name: str, value: Tensor) -> None:
    check.refuse(op, name, value, value.isnan(), "numbers")
