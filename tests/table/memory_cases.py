"""Samples for the error memory and its sketch, and the op in plain torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass
class Samples:
    query: np.ndarray
    base: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    stored_base: np.ndarray

    def arguments(self, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
        """In the order of ``error_memory_compensate``, hidden vectors of this dtype."""
        return (
            self.query.astype(dtype),
            self.base,
            self.keys.astype(dtype),
            self.labels,
            self.stored_base,
        )


def samples(batch: int, slots: int, dim: int, seed: int = 0) -> Samples:
    rng = np.random.default_rng([seed, batch, slots, dim])
    return Samples(
        rng.normal(size=(batch, dim)),
        rng.random(batch).astype(np.float32),
        rng.normal(size=(slots, dim)),
        rng.integers(0, 2, slots).astype(np.float32),
        rng.random(slots).astype(np.float32),
    )


def plain(
    query: Tensor,
    base: Tensor,
    keys: Tensor,
    labels: Tensor,
    stored_base: Tensor,
    *,
    k: int = 180,
    temperature: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.9,
) -> Tensor:
    """With the whole matrix of similarities, as one writes it in torch."""
    if keys.shape[0] == 0:
        return base.clamp(0, 1)
    similarity = normalize(query, dim=-1) @ normalize(keys, dim=-1).T
    s, at = similarity.topk(min(k, keys.shape[0]), dim=-1)
    a = (s / temperature).softmax(-1)
    label, stored = (a * labels[at]).sum(-1), (a * stored_base[at]).sum(-1)
    error = gamma * (label - base) + (1 - gamma) * (label - stored)
    return (base + lam * error).clamp(0, 1)


def tensors(arguments: tuple[np.ndarray, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(x).to(dtype) for x in arguments)
