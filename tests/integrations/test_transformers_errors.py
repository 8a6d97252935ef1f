# SPDX-License-Identifier: Apache-2.0
"""What generation with transformers refuses, and that the text names it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the peers extra")

from hotloop.integrations.transformers import generate  # noqa: E402
from transformers import GenerationConfig  # noqa: E402
from transformers_cases import PEER, PROMPT, V  # noqa: E402

pytestmark = PEER


def bloom() -> Any:
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=V, hidden_size=8, n_layer=1, n_head=2, pad_token_id=0)
    )


def encoder_decoder() -> Any:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, pad_token_id=0
        )
    )


def linear_attention() -> Any:
    return transformers.Qwen3NextForCausalLM(
        transformers.Qwen3NextConfig(
            vocab_size=V,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=2,
            num_experts_per_tok=1,
        )
    )


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (bloom, "got BloomForCausalLM with no position_ids in forward"),
        (encoder_decoder, "got T5ForConditionalGeneration with an encoder"),
        (linear_attention, "got Qwen3NextForCausalLM with linear_attention layers"),
    ],
    ids=["bloom", "t5", "qwen3-next"],
)
def test_models_that_cannot_be_served(models, make, reason):
    model = make()
    with pytest.raises(NotImplementedError, match=rf"\[generate\] model: expected .*{reason}"):
        generate(model, PROMPT)
    with pytest.raises(NotImplementedError, match=rf"assistant_model: expected .*{reason}"):
        generate(models[0], PROMPT, assistant_model=model)


def test_a_model_that_ignores_its_cache(models, monkeypatch):
    target = copy.deepcopy(models[0])
    right = target.forward

    def forward(
        input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any, **_: Any
    ) -> Any:
        return right(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)

    monkeypatch.setattr(target, "forward", forward)
    with pytest.raises(NotImplementedError, match="expected forward to add 3 tokens to past_key"):
        generate(target, PROMPT)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ({"num_beams": 4}, r"num_beams: expected None or 1, got 4\. Unset it"),
        ({"repetition_penalty": 1.1}, "repetition_penalty: expected None or 1.0, got 1.1"),
        ({"min_new_tokens": 3}, "min_new_tokens: expected None or 0, got 3"),
        ({"bad_words_ids": [[3]]}, r"bad_words_ids: expected None, got \[\[3\]\]"),
        ({"stop_strings": ["."]}, "stop_strings: expected None"),
        ({"max_time": 1.0}, "max_time: expected None"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens: expected None"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_that_are_not_served_are_refused(models, setting, text):
    with pytest.raises(NotImplementedError, match=rf"\[generate\] generation_config\.{text}"):
        generate(models[0], PROMPT, GenerationConfig(**setting))


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: expected a transformers.PreTrained"),
        ({"assistant_model": "gpt2"}, TypeError, "assistant_model: expected .*, got str"),
        ({"input_ids": [[1]]}, TypeError, "input_ids: expected Tensor, got list"),
        ({"input_ids": PROMPT.int()}, TypeError, "input_ids: expected dtype int64"),
        ({"input_ids": PROMPT[0]}, ValueError, r"input_ids: expected shape \(B, P\)"),
        ({"input_ids": PROMPT[:, :0]}, ValueError, r"input_ids: expected shape \(B, P\)"),
        ({"input_ids": PROMPT + 9}, ValueError, "input_ids: expected token ids from 0 to 15, got 18"),
        ({"generation_config": {"top_k": 3}}, TypeError, "generation_config: expected GenerationConfig"),
        ({"attention_mask": torch.ones(1, 2)}, ValueError, r"attention_mask: expected shape \(1, 3\)"),
        ({"attention_mask": [[1, 1, 1]]}, ValueError, "attention_mask: expected shape .* got list"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, ValueError, r"left only, got \[1, 1, 0\] at \[0\]"),
        ({"attention_mask": torch.zeros(1, 3)}, ValueError, "attention_mask: expected at least one"),
        ({"num_assistant_tokens": 0}, ValueError, "num_assistant_tokens: expected an integer >= 1"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens: expected an integer >= 1"),
        ({"max_new_tokens": torch.tensor([0])}, ValueError, "max_new_tokens: expected at least 1"),
        ({"max_new_tokens": torch.tensor([1, 2])}, ValueError, r"max_new_tokens: expected shape \(1,\), got"),
        ({"max_new_tokens": torch.tensor([1.0])}, TypeError, "max_new_tokens: expected dtype int64"),
        ({"generation_config": GenerationConfig(max_length=2)}, ValueError, "max_length: expected more than the 3 tok"),
        ({"verification": "tree"}, ValueError, "verification: expected one of token, block"),
        ({"stopping_criteria": lambda a, b: False}, ValueError, "pad_token_id: expected one"),
        ({"seed": -1}, ValueError, "seed: expected an integer"),
        ({"seed": 0.5}, TypeError, "seed: expected an integer"),
        ({"seed": torch.tensor([1, 2])}, ValueError, r"seed: expected shape \(1,\), got"),
        ({"seed": torch.tensor([1.0])}, TypeError, "seed: expected dtype int64"),
        ({"impl": "triton"}, NotImplementedError, "triton"),
    ],
)  # fmt: skip
def test_errors_name_the_argument(models, how, error, text):
    target, draft = models
    arguments = {"model": target, "input_ids": PROMPT, "assistant_model": draft} | how
    with pytest.raises(error, match=text):
        generate(**arguments)


def test_logits_without_a_law(models):
    target = copy.deepcopy(models[0])
    with torch.no_grad():
        target.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"model: expected a finite logit .* in row 0 after 0 new"):
        generate(target, PROMPT, assistant_model=models[1])
