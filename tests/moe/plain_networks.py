# SPDX-License-Identifier: Apache-2.0
"""Networks of mixtures of experts in plain torch, expert by expert, on the parameters of our modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": functional.silu,
    "geglu": functional.gelu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x) ** 2,
}


def feed_forward(part: Any, x: Tensor, expert: int, activation: Any) -> Tensor:
    """One expert, or the shared one, of parameters (E, ...)."""
    (up, up_bias), (down, down_bias) = part.up, part.down
    h = functional.linear(x, up[expert], None if up_bias is None else up_bias[expert])
    act = ACTIVATIONS[activation.kind]
    if part.gated:
        gate, value = h.chunk(2, dim=-1)
        h = act(gate) * value
    else:
        h = act(h)
    return functional.linear(h, down[expert], None if down_bias is None else down_bias[expert])


def chosen(layer: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights of softmax or sigmoid routers without groups."""
    if layer.order == "topk_then_softmax":
        best, ids = logits.topk(layer.top_k, dim=-1)
        return ids, best.softmax(-1) * layer.routed_scale
    scores = logits.softmax(-1) if layer.scoring == "softmax" else logits.sigmoid()
    by = scores if layer.routing_bias is None else scores + layer.routing_bias
    ids = by.topk(layer.top_k, dim=-1).indices
    weights = scores.gather(-1, ids)
    if layer.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * layer.routed_scale


def mixture(layer: Any, x: Tensor) -> Tensor:
    """What an ``MoE`` computes of tokens (T, D)."""
    ids, weights = chosen(layer, functional.linear(x, layer.router.weight))
    out = torch.zeros_like(x)
    for t in range(len(x)):
        for expert, weight in zip(ids[t].tolist(), weights[t]):
            out[t] = out[t] + weight * feed_forward(layer.experts, x[t], expert, layer.activation)
    if layer.shared is not None:
        out = out + feed_forward(layer.shared, x, 0, layer.activation)
    return out


def normed(norm: Any, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def residual(layers: list[Any], x: Tensor) -> Tensor:
    for layer in layers:
        x = x + mixture(layer, normed(layer.norm, x))
    return x


def momentum(layers: list[Any], x: Tensor, mu: float, gamma: float, post: bool = False) -> Tensor:
    m = torch.zeros_like(x)
    for layer in layers:
        z = mixture(layer, x if post else normed(layer.norm, x))
        m = mu * m + gamma * z
        x = x - m
        if post:
            x = normed(layer.norm, x)
    return x


def adam(layers: list[Any], x: Tensor, **numbers: float) -> Tensor:
    """The first layer takes a step of Adam, the others one of momentum."""
    m, p, v = (torch.zeros_like(x) for _ in range(3))
    for number, layer in enumerate(layers):
        z = mixture(layer, normed(layer.norm, x))
        m = numbers["mu"] * m + numbers["gamma2"] * z
        if number == 0:
            p = numbers["beta1"] * p + (1 - numbers["beta1"]) * z
            v = numbers["beta2"] * v + (1 - numbers["beta2"]) * z * z
            x = x - (numbers["gamma1"] * p / (v + 1e-8).sqrt() + numbers["kappa"] * x)
        else:
            x = x - m
    return x


def robust(layers: list[Any], x: Tensor, L: float, k: float, lam: float) -> Tensor:
    p = lam * (1 - 1 / k) + (1 - lam) * (1 - k**-0.5)
    gamma = k * (1 - p) ** 2 * (1 + p) / L
    mu = k * p**3 / (k - 1)
    alpha = p**3 / ((k - 1) * (1 - p) ** 2 * (1 + p))
    d = torch.zeros_like(x)
    for layer in layers:
        y = x + alpha * d
        d = mu * d - gamma * mixture(layer, normed(layer.norm, y))
        x = x + d
    return x
