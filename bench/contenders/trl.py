# SPDX-License-Identifier: Apache-2.0
"""TRL's kernels, called as its trainers do: all tokens on the CPU, valid ones on a GPU."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
from torch import Tensor

from .._case import Contender, Entry, Inputs
from .._heads import IGNORE
from ._optional import contender

_VOCABULARY_CHUNK = 32768
# What the backward imports when it first runs: better missed now than in the middle of a case.
_BACKWARD = "trl.trainer.utils"


def logprob(device: str, entropy: bool) -> Entry:
    """Log-probability per token, plus entropy where asked for."""
    outputs = ("entropy",) if entropy else ()

    def build(module: ModuleType) -> Contender:
        function = module.ChunkedLogProbFunction
        importlib.import_module(_BACKWARD)
        return Contender("trl", "rival", lambda inputs: _logprob(function, inputs, device, outputs))

    return contender("trl", "trl.kernels", build)


def cross_entropy(device: str) -> Entry:
    def build(module: ModuleType) -> Contender:
        function = module.ChunkedLogProbFunction
        importlib.import_module(_BACKWARD)

        def forward(inputs: Inputs) -> Tensor:
            valid = (inputs["labels"] != IGNORE).sum()
            loss: Tensor = -_logprob(function, inputs, device, ()).sum() / valid
            return loss

        return Contender("trl", "rival", forward)

    return contender("trl", "trl.kernels", build)


def _logprob(function: type, inputs: Inputs, device: str, outputs: tuple[str, ...]) -> Tensor:
    hidden, weight, labels = inputs["hidden"], inputs["weight"], inputs["labels"]
    valid = labels != IGNORE
    compact = device == "cuda"
    found = function.apply(  # type: ignore[attr-defined]
        hidden[valid] if compact else hidden,
        weight,
        None,
        labels[valid] if compact else labels.clamp(min=0),
        1.0,
        _VOCABULARY_CHUNK,
        None,
        1.0,
        outputs,
    )
    rows = found[0] + found[1] if outputs else found[0]
    if compact:
        return torch.zeros_like(valid, dtype=rows.dtype).masked_scatter(valid, rows)
    return rows.masked_fill(~valid, 0.0)  # type: ignore[no-any-return]


def divergence(device: str, beta: float) -> Entry:
    """Mean over tokens; beta 0 is KL(teacher || student), 1 the reverse, between them the JSD."""

    def build(module: ModuleType) -> Contender:
        importlib.import_module(_BACKWARD)

        def forward(inputs: Inputs) -> Tensor:
            valid = inputs["labels"] != IGNORE
            student, teacher = inputs["hidden"], inputs["teacher_hidden"]
            if device == "cuda":
                student, teacher = student[valid], teacher[valid]
            rows, _ = module.ChunkedDivergenceFunction.apply(
                student, inputs["weight"], None, teacher, inputs["teacher_weight"], None, beta, 1.0
            )
            if device != "cuda":
                rows = rows.masked_fill(~valid, 0.0)
            loss: Tensor = rows.sum() / valid.sum()
            return loss

        return Contender("trl", "rival", forward)

    return contender("trl", "trl.kernels.chunked_divergence", build)
