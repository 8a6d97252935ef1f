# SPDX-License-Identifier: Apache-2.0
"""Models unlike their configuration, compiled models, draws without a seed, keywords of another generate."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the peers extra")

from hotloop.integrations.transformers import (  # noqa: E402
    generate,
    hotloop_speculative_sampling,
)
from transformers import GenerationConfig  # noqa: E402
from transformers_cases import (  # noqa: E402
    FALSE_ALARM,
    PEER,
    PROMPT,
    ROWS,
    V,
    cut,
    p_value,
    ragged,
    sampling,
)

pytestmark = PEER

PADDED = 24
"""Tokens of a head that was padded, as libraries do to a multiple of 8 or 64, with the configuration left at V."""


def padded(model: Any, embeddings: int = PADDED) -> Any:
    model = copy.deepcopy(model)
    model.resize_token_embeddings(PADDED)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        weight = model.lm_head.weight.clone()
        weight[V:] = weight[: PADDED - V] + 0.05 * torch.randn(PADDED - V, weight.shape[1])
        head = torch.nn.Linear(weight.shape[1], PADDED, bias=False)
        head.weight.copy_(weight)
        wte = torch.nn.Embedding(embeddings, weight.shape[1])
        wte.weight.copy_(weight[:embeddings])
    model.lm_head, model.transformer.wte = head, wte
    model.config.vocab_size = V
    return model.eval()


@torch.no_grad()
def padded_law(model: Any, config: GenerationConfig) -> np.ndarray:
    """Probability of two new tokens, of PADDED each."""
    first = cut(model(input_ids=PROMPT).logits[:, -1], config)
    text = torch.cat([PROMPT.expand(PADDED, -1), torch.arange(PADDED)[:, None]], 1)
    law = first[0, :, None] * cut(model(input_ids=text).logits[:, -1], config)
    return law.reshape(-1).numpy()


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_a_head_wider_than_the_configuration_says(models, drafts, verification):
    target, config = padded(models[0]), sampling("plain")
    assert target.config.vocab_size == V
    law = padded_law(target, config)
    assert law.reshape(PADDED, PADDED)[V:].sum() > 0.05, "tokens beyond the configuration"
    draft = [None, models[1], padded(models[1])][drafts]
    done = generate(
        target, PROMPT.expand(ROWS, -1), config, assistant_model=draft, num_assistant_tokens=2,
        max_new_tokens=2, verification=verification, seed=11,
    )  # fmt: skip
    assert p_value(done.sequences[:, PROMPT.shape[1] :], law, PADDED) > FALSE_ALARM
    if drafts:
        assert done.acceptance_rate > 0.2


def test_a_wide_head_decodes_greedily_as_transformers_does(models):
    target = padded(models[0])
    for prompt in range(1, V):
        ids = torch.tensor([[prompt, 3]])
        wanted = target.generate(ids, max_new_tokens=12, do_sample=False)
        for draft in (None, models[1]):
            done = generate(target, ids, max_new_tokens=12, assistant_model=draft)
            assert torch.equal(done.sequences, wanted)


def test_a_token_without_an_embedding_is_refused(models):
    target = padded(models[0], embeddings=V)
    with pytest.raises(
        ValueError,
        match=r"model: expected tokens below its 16 input embeddings, got \d+ from a head of 24",
    ):
        generate(
            target, PROMPT.expand(64, -1), sampling("plain"), assistant_model=models[1], seed=1
        )


def test_a_head_narrower_than_the_configuration_says(models):
    target = copy.deepcopy(models[0])
    target.config.vocab_size = V + 4
    text = r"\[generate\] model: expected logits of config.vocab_size = 20 tokens or more, got 16\. Correct"
    with pytest.raises(NotImplementedError, match=text):
        generate(target, PROMPT, sampling("plain"), assistant_model=models[1], seed=1)


@pytest.mark.parametrize("how", ["target", "draft", "both"])
@pytest.mark.parametrize("drawn", [False, True])
def test_compiled_models_give_the_same_tokens(models, drawn, how):
    target, draft = models
    ids, mask = ragged()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "seed": torch.arange(5)}
    config = sampling("cut") if drawn else None
    wanted = generate(target, ids, config, assistant_model=draft, **settings)
    torch.compiler.reset()
    if how in ("target", "both"):
        target = torch.compile(target, backend="eager", dynamic=True)
    if how in ("draft", "both"):
        draft = torch.compile(draft, backend="eager", dynamic=True)
    found = generate(target, ids, config, assistant_model=draft, **settings)
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.num_accepted, wanted.num_accepted)


def test_a_compiled_model_that_cannot_be_served_is_named():
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=V, hidden_size=8, n_layer=1, n_head=2, pad_token_id=0)
    )
    text = "got BloomForCausalLM with no position_ids in forward"
    with pytest.raises(NotImplementedError, match=text):
        generate(torch.compile(bloom, backend="eager"), PROMPT)


@pytest.mark.parametrize("rows", [1, 4])
def test_calls_without_a_seed_differ_and_torch_rules_them(models, rows):
    target, draft = models
    ids = PROMPT.expand(rows, -1)

    def call(**how: Any) -> list[Any]:
        config = sampling("plain", max_new_tokens=20)
        return generate(target, ids, config, assistant_model=draft, **how).sequences.tolist()

    torch.manual_seed(1)
    first, second = call(), call()
    assert first != second
    assert rows == 1 or first[0] != first[1]
    torch.manual_seed(1)
    assert [call(), call()] == [first, second]
    g, same = (torch.Generator().manual_seed(4) for _ in range(2))
    assert call(seed=g) == call(seed=same) != call(seed=g)
    assert call(seed=3) == call(seed=3)


def test_the_block_of_transformers_draws_a_seed_too(models):
    target, draft = models

    def call(**how: Any) -> list[Any]:
        with hotloop_speculative_sampling(**how):
            torch.manual_seed(2)  # for what transformers draws itself
            return target.generate(
                PROMPT, assistant_model=draft, do_sample=True, top_k=0, max_new_tokens=30
            ).tolist()

    torch.manual_seed(1)
    first = call()
    torch.manual_seed(7)
    assert call() != first
    torch.manual_seed(1)
    assert call() == first
    assert call(seed=torch.Generator().manual_seed(1)) == call(
        seed=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ({"generator": torch.Generator()}, r"generator: expected one of model, .*, impl, got .* Pass it as seed="),
        ({"do_sample": True}, r"do_sample: .* Set it in generation_config: GenerationConfig\(do_sample=True\)\."),
        ({"temperature": 0.7}, r"temperature: .* Set it in generation_config: GenerationConfig\(temperature=0\.7\)\."),
        ({"streamer": None}, r"streamer: .* Call model\.generate inside hotloop_speculative_sampling\(\) to stream\."),
        ({"logits_processor": []}, r"logits_processor: .* Use model\.generate, inside"),
        ({"inputs": PROMPT}, r"inputs: .* Pass it as input_ids="),
        ({"asistant_model": None}, r"asistant_model: .* Did you mean assistant_model\?"),
        ({"colour": 1}, r"colour: .* Leave it out\."),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_keywords_of_another_generate(models, keyword, text):
    with pytest.raises(TypeError, match=r"^\[generate\] " + text):
        generate(models[0], PROMPT, **keyword)


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        ({"generator": None}, r"generator: expected one of seed, verification, impl, got an .* Pass it as seed="),
        ({"do_sample": True}, r"do_sample: .* Pass it to model\.generate, inside the block\."),
        ({"sed": 1}, r"sed: .* Did you mean seed\?"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)  # fmt: skip
def test_keywords_of_the_block(keyword, text):
    with pytest.raises(TypeError, match=r"^\[hotloop_speculative_sampling\] " + text):
        hotloop_speculative_sampling(**keyword)
