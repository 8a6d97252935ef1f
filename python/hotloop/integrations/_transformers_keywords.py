# SPDX-License-Identifier: Apache-2.0
"""Keywords that ``model.generate`` takes and hotloop does not: the error names the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import GenerationConfig

_INSTEAD = {
    "generator": "Pass it as seed=.",
    "inputs": "Pass it as input_ids=.",
    "streamer": "Call model.generate inside hotloop_speculative_sampling() to stream.",
}
# Arguments of transformers' generate that have no counterpart here.
_THEIRS = (
    "assistant_tokenizer",
    "custom_generate",
    "decoder_input_ids",
    "encoder_outputs",
    "inputs_embeds",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "position_ids",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "token_type_ids",
    "tokenizer",
    "use_model_defaults",
)


def hints(of_config: str) -> Callable[[str, Any], str | None]:
    """For ``front.keywords.known``; ``of_config`` says where a setting of GenerationConfig goes, with its value."""

    def hint(name: str, value: Any) -> str | None:
        if name in vars(GenerationConfig()):
            return of_config.format(name, value)
        if name in _THEIRS:
            return "Use model.generate, inside hotloop_speculative_sampling() if it drafts."
        return _INSTEAD.get(name)

    return hint
