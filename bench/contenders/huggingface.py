# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: the acceptance step of assisted generation, and its warpers.

``generate`` hands float32 logits to both; half types are converted first here too.
"""

from __future__ import annotations

import inspect
from types import ModuleType

import torch
from torch import Tensor

from .._case import Contender, Entry, Inputs
from ._optional import contender

NAME = "transformers"


def speculative_sampling() -> Entry:
    """One request; the draft tokens are the end of the sequence."""

    def build(module: ModuleType) -> Contender:
        function = module._speculative_sampling
        # Older versions have a flag there; in 5.23 a 0 in its place accepts every draft token.
        ended = "is_done_candidate" in inspect.signature(function).parameters
        rest = {"is_done_candidate": False} if ended else {}

        def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
            draft, tokens = inputs["draft"].float(), inputs["tokens"]
            found: tuple[Tensor, Tensor] = function(
                tokens, draft, tokens.shape[1], inputs["target"].float(), **rest
            )
            return found

        return Contender(NAME, "rival", forward)

    return contender(NAME, "transformers.generation.utils", build)


def sample(top_k: int, top_p: float) -> Entry:
    """The warpers that ``generate`` would build, softmax and multinomial."""

    def build(module: ModuleType) -> Contender:
        warpers = [module.TopKLogitsWarper(top_k)] if top_k else []
        warpers += [module.TopPLogitsWarper(top_p)] if top_p < 1 else []

        def forward(inputs: Inputs) -> tuple[Tensor]:
            scores = inputs["logits"].float()
            for warper in warpers:
                scores = warper(None, scores)
            return (torch.multinomial(scores.softmax(-1), 1).squeeze(-1),)

        return Contender(NAME, "rival", forward)

    return contender(NAME, "transformers.generation.logits_process", build)
