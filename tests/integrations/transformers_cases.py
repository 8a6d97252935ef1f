# SPDX-License-Identifier: Apache-2.0
"""Laws by enumeration, a chi-square test, and prompts padded on the left: what the tests of this folder share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the peers extra")

from hotloop.integrations.transformers import generate  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

PEER = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::Warning")]  # the peer's own

V = 16
PROMPT = torch.tensor([[3, 9, 1]])
NEW = 3
ROWS = 8192
FALSE_ALARM = 1e-6
SAMPLING = {
    "plain": {"top_k": 0},
    "cut": {"temperature": 0.8, "top_k": 12, "top_p": 0.97, "min_p": 0.002},
}


def sampling(name: str, **more: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, **SAMPLING[name], **more)


def cut(logits: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """The law of transformers' own logits processors, in float64."""
    scores = logits.double()
    nobody = torch.zeros(len(scores), 1, dtype=torch.long)
    if config.temperature is not None:
        scores = transformers.TemperatureLogitsWarper(config.temperature)(nobody, scores)
    if config.top_k:
        scores = transformers.TopKLogitsWarper(config.top_k)(nobody, scores)
    if config.top_p is not None:
        scores = transformers.TopPLogitsWarper(config.top_p)(nobody, scores)
    if config.min_p is not None:
        scores = transformers.MinPLogitsWarper(config.min_p)(nobody, scores)
    return scores.softmax(-1)


@torch.no_grad()
def exact_law(
    model: Any, config: GenerationConfig, prompt: torch.Tensor = PROMPT, new: int = NEW
) -> np.ndarray:
    """Probability of every continuation of the prompt by ``new`` tokens: forward passes and products."""
    v = model.config.vocab_size
    text, law = prompt, torch.ones(1, dtype=torch.float64)
    for _ in range(new):
        law = (law[:, None] * cut(model(input_ids=text).logits[:, -1], config)).reshape(-1)
        text = torch.cat(
            [text.repeat_interleave(v, 0), torch.arange(v).repeat(len(text))[:, None]], 1
        )
    return law.numpy()


def p_value(tokens: torch.Tensor, law: np.ndarray, v: int = V) -> float:
    """Of Pearson's chi-square; cells that expect fewer than five are one. Wilson and Hilferty's normal."""
    code = (tokens.numpy() * v ** np.arange(tokens.shape[1])[::-1]).sum(1)
    seen = np.bincount(code, minlength=len(law)).astype(float)
    expected = law * len(tokens)
    if seen[expected == 0].any():
        return 0.0
    big = expected >= 5
    seen = np.append(seen[big], seen[~big].sum())
    expected = np.append(expected[big], expected[~big].sum())
    seen, expected = seen[expected > 0], expected[expected > 0]
    freedom = len(seen) - 1
    chi = ((seen - expected) ** 2 / expected).sum()
    z = ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def continuations(models: tuple[Any, Any], config: GenerationConfig, **how: Any) -> torch.Tensor:
    target, draft = models
    prompts = PROMPT.expand(ROWS, -1)
    how = {"assistant_model": draft, "num_assistant_tokens": 2, "max_new_tokens": NEW} | how
    return generate(target, prompts, config, **how).sequences[:, PROMPT.shape[1] :][:, :NEW]


def ragged(rows: int = 5, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of 2 to ``width`` tokens, padded on the left with token 0."""
    ids = torch.randint(1, V, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(width) >= torch.arange(rows)[:, None] % (width - 1)).long()
    return ids * mask, mask
