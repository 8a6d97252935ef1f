# SPDX-License-Identifier: Apache-2.0
"""Liger-Kernel."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .._case import Contender, Entry, Inputs, Missing
from .._heads import IGNORE
from ._optional import contender

_BFLOAT16_SUMS = "adds weight gradients of chunks up in the dtype of the weight"


def logprob(entropy: bool) -> Entry:
    """Per-token loss and entropy; without Liger's CUTLASS extra its torch fallback runs."""

    def build(module: ModuleType) -> Contender:
        function = module.LigerFusedLinearScaledCrossEntropyFunction

        def forward(inputs: Inputs) -> Tensor:
            hidden, weight, labels = inputs.pick("hidden", "weight", "labels")
            found = function.apply(hidden, weight, labels, 1.0, IGNORE, 1, entropy)
            rows: Tensor = found[1] - found[0] if entropy else -found
            return rows

        return Contender("liger scaled_ce", "rival", forward, k=8.0, why=_BFLOAT16_SUMS)

    return contender("liger scaled_ce", "liger_kernel.ops.fused_linear_scaled_cross_entropy", build)


def cross_entropy(device: str) -> Entry:
    """Fused linear cross-entropy in Triton."""
    if device != "cuda":
        return Missing("liger flce", "its Triton kernels need a GPU")

    def build(module: ModuleType) -> Contender:
        loss = module.LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE)
        return Contender(
            "liger flce", "rival", lambda x: loss(*x.pick("weight", "hidden", "labels")),
            k=16.0, why=_BFLOAT16_SUMS,
        )  # fmt: skip

    return contender("liger flce", "liger_kernel.transformers", build)


def divergence(device: str, beta: float) -> list[Entry]:
    """The chunked JSD, compiled and not, and on a GPU the Triton one."""

    def build(compiled: bool) -> Entry:
        name = "liger jsd" if compiled else "liger jsd eager"

        def inner(module: ModuleType) -> Contender:
            loss = module.LigerFusedLinearJSDLoss(
                weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled
            )
            return Contender(
                name, "rival",
                lambda x: loss(
                    *x.pick("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")
                ),
                k=16.0, why=_BFLOAT16_SUMS, compiles=compiled,
            )  # fmt: skip

        return contender(name, "liger_kernel.chunked_loss", inner)

    def triton(module: ModuleType) -> Contender:
        loss = module.LigerFusedLinearJSD(jsd_beta=beta)
        return Contender(
            "liger jsd triton", "rival",
            lambda x: loss(
                *x.pick("hidden", "weight", "teacher_hidden", "teacher_weight", "labels")
            ),
            k=16.0, why=_BFLOAT16_SUMS,
        )  # fmt: skip

    found = [build(True), build(False)]
    if device == "cuda":
        found.append(
            contender("liger jsd triton", "liger_kernel.transformers.fused_linear_jsd", triton)
        )
    return found


def dpo(beta: float) -> list[Entry]:
    """DPO with a reference head, compiled (its default) and not."""

    def build(compiled: bool) -> Entry:
        name = "liger dpo" if compiled else "liger dpo eager"

        def inner(module: ModuleType) -> Contender:
            loss = module.LigerFusedLinearDPOLoss(beta=beta, compiled=compiled)

            def forward(x: Inputs) -> Tensor:
                found: tuple[Tensor, tuple[Tensor, ...]] = loss(
                    *x.pick("weight", "hidden", "labels"), None, x["ref_hidden"], x["ref_weight"]
                )
                return found[0] if isinstance(found, tuple) else torch.as_tensor(found)

            return Contender(name, "rival", forward, k=16.0, why=_BFLOAT16_SUMS, compiles=compiled)

        return contender(name, "liger_kernel.chunked_loss", inner)

    return [build(True), build(False)]
