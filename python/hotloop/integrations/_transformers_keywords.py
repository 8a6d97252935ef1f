"""Keywords that ``model.generate`` takes and hotloop does not: the error names the way out."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from transformers import GenerationConfig

F = TypeVar("F", bound=Callable[..., Any])

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


def answered(function: F) -> F:
    """Refuse keywords that ``function`` does not have in the form of all other errors."""
    known = tuple(inspect.signature(function).parameters)
    op = function.__name__

    @functools.wraps(function)
    def wrapped(*args: Any, **keywords: Any) -> Any:
        for name, value in keywords.items():
            if name not in known:
                raise TypeError(
                    f"[{op}] {name}: expected one of {', '.join(known)}, got another keyword. "
                    f"{_way_out(name, value, known)}"
                )
        return function(*args, **keywords)

    return cast(F, wrapped)


def _way_out(name: str, value: Any, known: tuple[str, ...]) -> str:
    if name in _INSTEAD and (name == "streamer" or "seed" in known):
        return _INSTEAD[name]
    if name in vars(GenerationConfig()):
        if "generation_config" in known:
            return f"Set it in generation_config: GenerationConfig({name}={value!r})."
        return "Pass it to model.generate, inside the block."
    if name in _THEIRS:
        return "Use model.generate, inside hotloop_speculative_sampling() if it drafts."
    near = difflib.get_close_matches(name, known, 1)
    return f"Did you mean {near[0]}?" if near else "Leave it out."
