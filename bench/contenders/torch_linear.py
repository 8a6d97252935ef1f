# SPDX-License-Identifier: Apache-2.0
"""``torch.nn.functional.linear_cross_entropy`` (torch 2.13 and later)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .._case import Contender, Inputs, Missing
from .._heads import IGNORE

_NEEDS = "torch has no F.linear_cross_entropy with options (2.13 has)"


def cross_entropies(reduction: str) -> list[Contender | Missing]:
    """The chunked form and the unchunked one; "none" is negated into log-probabilities."""
    names = ("torch linear_ce chunked", "torch linear_ce")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return [Missing(name, _NEEDS) for name in names]
    sign = -1 if reduction == "none" else 1

    def build(name: str, options: torch.nn.LinearCrossEntropyOptions | None) -> Contender:
        def forward(inputs: Inputs) -> torch.Tensor:
            loss = F.linear_cross_entropy(
                inputs["hidden"], inputs["weight"], inputs["labels"],
                reduction=reduction, ignore_index=IGNORE, options=options,
            )  # fmt: skip
            return sign * loss

        if reduction == "none":
            return Contender(name, "rival", forward, k=4.0, why="losses in the dtype of the input")
        return Contender(name, "rival", forward, k=8.0, why="adds losses up in that dtype too")

    return [build(names[0], torch.nn.LinearCrossEntropyOptions()), build(names[1], None)]
