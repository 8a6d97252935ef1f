# SPDX-License-Identifier: Apache-2.0
"""Serving with a draft: the ragged cache, the law, and the test of the law."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import TINY

from examples.learn_from_preferences import serve, train
from examples.learn_from_preferences.data import Prompt

SETTINGS = dataclasses.replace(TINY, draft_tokens=3, temperature=1.0)


def models(spread: float = 1.0):
    """Two decoders that know nothing, the target with logits of this size."""
    model, draft = train.new_model(SETTINGS), serve.new_draft(SETTINGS)
    with torch.no_grad():
        model.head.mul_(50 * spread)
        draft.head.mul_(50 * spread)
    return model.eval(), draft.eval()


def prompts(count: int) -> list[Prompt]:
    texts = [
        bytes((7 * i + j) % 90 + 32 for j in range(SETTINGS.prompt_bytes)) for i in range(count)
    ]
    return [Prompt(text, "file", 0) for text in texts]


@torch.no_grad()
def test_ragged_steps_equal_a_whole_forward():
    model, _ = models()
    tokens = torch.randint(32, 120, (3, SETTINGS.context))
    cache = model.new_cache(3, SETTINGS.context)
    model(tokens[:, :20], cache)
    whole = model(tokens)
    known = torch.tensor([20, 11, 17])
    for count in (1, 4, 2):
        found = model.extend(tokens, known, count, cache)
        wanted = whole[torch.arange(3)[:, None], known[:, None] + torch.arange(count)]
        assert torch.allclose(found, wanted, atol=1e-4)
        known = known + torch.tensor([count, 1, count])
    cache.keep(torch.tensor([0, 2]))
    found = model.extend(tokens[[0, 2]], known[[0, 2]], 2, cache)
    wanted = whole[torch.tensor([[0], [2]]), known[[0, 2]][:, None] + torch.arange(2)]
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("mode", ["token", "block"])
def test_law_holds_and_the_control_is_found_out(mode):
    model, draft = models()
    steps = [serve.serve(mode, model, draft, prompts(24), SETTINGS, seed) for seed in range(3)]
    plain = serve.serve("plain", model, draft, prompts(24), SETTINGS, 0)
    found = serve.summary([*steps, plain], SETTINGS)
    assert found[mode]["bytes"] == 3 * 24 * SETTINGS.answer_bytes
    assert found[mode]["bytes_per_call"] > 1
    assert found["plain"]["bytes_per_call"] == 1
    assert sum(found[mode]["accepted"]) == found[mode]["model_calls_per_row"]
    # One false alarm in 10^5, for a fixed seed.
    assert found[mode]["law_p_value"] > 1e-5
    assert found[mode]["control_p_value"] < 1e-5


def test_same_seed_same_counts():
    model, draft = models()
    runs = [serve.serve("token", model, draft, prompts(5), SETTINGS, 3) for _ in range(2)]
    for run in runs:
        del run["seconds"]
    assert runs[0] == runs[1]


def test_a_draft_like_the_model_is_always_accepted():
    model, _ = models()
    found = serve.serve("token", model, model, prompts(4), SETTINGS, 1)
    assert found["bytes"] / found["calls"] > 0.8 * (SETTINGS.draft_tokens + 1)


def test_p_value_of_equal_and_of_unequal_counts():
    assert serve.p_value([100] * 20) == 1.0
    assert serve.p_value([0] * 20) == 1.0
    assert serve.p_value([100] * 19 + [200]) < 1e-9
