# SPDX-License-Identifier: Apache-2.0
"""Losses and layers of papers that are a few lines around the other ops of the room, in torch operators."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..front import arrays, at_run_time, check
from ..front.autocast import autocast_off
from ..front.impl import Impl
from ..reference.moe.experts import activate
from ._experts_arguments import activation_of
from .balance import load_balance_loss
from .experts import expert_mlp
from .results import Activation, Routing
from .router import route

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


class AnchorMoE(NamedTuple):
    """What ``anchor_reconcile_moe`` returns."""

    output: Tensor
    """(..., D), the dtype of ``x``."""
    load_balance: Tensor
    """(): sum over experts of f_i P_i, 1 at balance; the paper adds 0.01 of it per layer."""
    routing: Routing
    """Of the T tokens."""


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
    impl: Impl = "auto",
) -> AnchorMoE:
    """A mixture of experts beside an anchor, the expert that every token visits: copies of one pretrained layer.

    s = softmax(x W_r^T) in float32 (float64 for float64); g the top_k largest s, divided by their sum + 1e-20 with
    ``renormalize``, else times ``routed_scale``; y = sum_j g_j E_j(x) + A(x). The published model starts with all E
    experts and the anchor as copies of the feed-forward layer, so y = (1 + sum of g) A(x) at first: less than 2 A(x)
    without ``renormalize``. Load balance: sum over experts of f_i P_i with f_i = E * share of the T k choices and P_i
    the mean of s_i. As a layer with parameters it is ``MoE(dim, hidden_dim, 5, 2, renormalize=False,
    shared_hidden_dim=hidden_dim, load_balance_weight=0.01)``.

    Args:
        x: (..., D) of T tokens, float32, float64, float16 or bfloat16. Differentiable, as all tensors but the mask.
        router_weight: W_r, (E, D), a float dtype.
        gate_up: of the experts, (E, 2 I, D), or (E, I, D) for an activation without a gate, in the dtype of x.
        down: (E, D, I).
        anchor_gate_up: of the anchor, (2 S, D), or (S, D) without a gate; S may differ from I.
        anchor_down: (D, S).
        top_k: k, 1 to min(E, 128); the paper uses 2 of 5. Default 2.
        renormalize: whether g sums to 1. Default False.
        routed_scale: factor of g, > 0; 1 with ``renormalize``. Default 1.
        activation: as in ``expert_mlp``. Default "swiglu".
        token_mask: (...), 0 or False for padding, which visits the anchor alone and is counted nowhere. Default None.
        impl: "auto" or "reference".

    Returns:
        AnchorMoE.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range.
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import torch
        >>> up, down = torch.ones(4, 2, 1), torch.ones(4, 1, 1)  # four experts, all alike
        >>> x = torch.tensor([[2.0]])
        >>> found = anchor_reconcile_moe(x, torch.zeros(4, 1), up, down, up[0], down[0])
        >>> round(float(found.output / (2 * torch.nn.functional.silu(x))), 3)  # 1 + two weights of 1/4
        1.5

    Reference:
        Hu et al. 2025, arXiv:2502.01074 (Omni-Mol); formula from the published code (modeling_moe.py).
    """
    op = "anchor_reconcile_moe"
    check.float_tensor(op, "x", x)
    check.float_tensor(op, "router_weight", router_weight, ndim=2)
    if x.ndim < 1 or x.shape[-1] != router_weight.shape[1]:
        raise ValueError(
            f"[{op}] x: expected shape (..., {router_weight.shape[1]}) like router_weight, got {tuple(x.shape)}. "
            "Its last dimension is D."
        )
    d = x.shape[-1]
    named = {"gate_up": gate_up, "down": down, "router_weight": router_weight}
    for name, value in named.items():
        check.float_tensor(op, name, value)
        check.same_place(op, name, value, "x", x)
    act = activation_of(op, activation)
    check.float_tensor(op, "anchor_down", anchor_down, ndim=2)
    inner = anchor_down.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, value, shape in (
        ("anchor_down", anchor_down, (d, inner)),
        ("anchor_gate_up", anchor_gate_up, (inner * (2 if act.gated else 1), d)),
    ):
        check.array(op, name, check.tensor(op, name, value), (arrays.dtype(x),))
        check.same_place(op, name, value, "x", x)
        check.shape(op, name, value, shape, "with D of x and S of anchor_down")
    top_k = check.integer(op, "top_k", top_k, at_least=1)
    routed_scale = check.number(op, "routed_scale", routed_scale, above=0)
    if check.flag(op, "renormalize", renormalize) and routed_scale != 1:
        raise ValueError(
            f"[{op}] routed_scale: expected 1 with renormalize=True, got {routed_scale!r}. The published layer has one "
            "or the other."
        )
    mask = None
    if token_mask is not None:
        check.tensor(op, "token_mask", token_mask)
        check.shape(
            op, "token_mask", token_mask, tuple(x.shape[:-1]), "like x", "Pass one per token."
        )
        mask = token_mask.reshape(-1) != 0
    flat = x.reshape(-1, d)
    # A NaN of padding, times the 0 of its logits' gradient, would make that of the router NaN.
    counted = flat if mask is None else torch.where(mask.unsqueeze(-1), flat, 0.0)
    with autocast_off(x):
        routing = route(
            counted.to(wide) @ router_weight.to(wide).T, top_k, renormalize=renormalize, routed_scale=routed_scale,
            token_mask=mask, impl=impl,
        )  # fmt: skip
        assert routing.dispatch is not None
        raised = activate(functional.linear(flat, anchor_gate_up), act)
        out = expert_mlp(
            flat, gate_up, down, routing.topk_weights, routing.dispatch, activation=act,
            shared=functional.linear(raised, anchor_down), impl=impl,
        )  # fmt: skip
    return AnchorMoE(out.view(x.shape), load_balance_loss(routing), routing)


@at_run_time.look("action values")
def _look_at_action_values(op: str, name: str, value: Tensor) -> None:
    check.refuse(op, name, value, value.isnan(), "numbers")
