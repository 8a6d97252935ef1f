# SPDX-License-Identifier: Apache-2.0
"""Mixtures of embeddings in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize


def expert_space_routing(
    embeddings: Tensor, router_logits: Tensor, *, temperature: float = 1.0
) -> Tensor:
    e = embeddings.mean(2) if embeddings.ndim == 4 else embeddings
    w = (torch.sigmoid(router_logits) / temperature).softmax(-1)
    return normalize((w.unsqueeze(-1) * e).sum(1), dim=-1)


def multi_reward_embedding(
    returns_to_go: Tensor,
    w1: Tensor,
    w2: Tensor,
    anchors: Tensor,
    bucket_weight: Tensor,
    bucket_bias: Tensor,
    *,
    negative_slope: float = 0.01,
) -> Tensor:
    h = leaky_relu(returns_to_go @ w1, negative_slope)
    p = (h + h @ w2).softmax(-1)
    return p @ (anchors @ bucket_weight + bucket_bias)
