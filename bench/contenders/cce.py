# SPDX-License-Identifier: Apache-2.0
"""Apple's cut-cross-entropy."""

from __future__ import annotations

from types import ModuleType

import torch

from .._case import Contender, Entry, Inputs
from .._heads import IGNORE
from ._optional import contender


def cross_entropy(device: str, reduction: str) -> Entry:
    """Its Triton form on a GPU, its torch.compile form (which keeps the logits) on the CPU."""
    impl = "cce" if device == "cuda" else "torch_compile"
    name = f"cce {impl}"
    sign = -1 if reduction == "none" else 1

    def build(module: ModuleType) -> Contender:
        def forward(inputs: Inputs) -> torch.Tensor:
            loss = module.linear_cross_entropy(
                inputs["hidden"], inputs["weight"], inputs["labels"],
                ignore_index=IGNORE, reduction=reduction, impl=impl,
            )  # fmt: skip
            signed: torch.Tensor = sign * loss
            return signed

        if impl == "cce":
            return Contender(name, "rival", forward, k=8.0, why="skips small gradients by default")
        return Contender(name, "rival", forward, compiles=True)

    return contender(name, "cut_cross_entropy", build)
