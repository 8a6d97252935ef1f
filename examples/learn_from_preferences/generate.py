# SPDX-License-Identifier: Apache-2.0
"""Answers sampled from the decoder, many rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import Prompt
from .model import Decoder
from .settings import Settings


@torch.inference_mode()
def answers(model: Decoder, prompts: list[Prompt], settings: Settings, seed: int) -> list[bytes]:
    """One answer of ``settings.answer_bytes`` bytes per prompt.

    All prompts have the same length. Noise comes from a generator that belongs to this call, so
    that the same call gives the same answers whatever happened before.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, start = len(prompts), settings.prompt_bytes
    tokens = torch.zeros(rows, settings.context, dtype=torch.long)
    tokens[:, :start] = bytes_as_rows([p.text for p in prompts], start)
    cache = model.new_cache(rows, settings.context)
    with precision(settings.bfloat16):
        for position in range(start, settings.context):
            hidden = model(tokens[:, :position], cache)[:, -1].float()
            with torch.autocast("cpu", enabled=False):
                logits = F.linear(hidden, model.head) / settings.temperature
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            tokens[:, position] = drawn[:, 0]
    return [bytes(row) for row in tokens[:, start:].to(torch.uint8).numpy()]


def precision(bfloat16: bool) -> torch.autocast:
    """Matrix products in bfloat16 where the processor has them, in float32 elsewhere."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bfloat16)


def bytes_as_rows(texts: list[bytes], length: int) -> Tensor:
    """Texts of at most ``length`` bytes as int64 (n, length), padded with zeros."""
    flat = b"".join(text.ljust(length, b"\0") for text in texts)
    return torch.frombuffer(bytearray(flat), dtype=torch.uint8).view(len(texts), length).long()
