# SPDX-License-Identifier: Apache-2.0
"""Sampling settings of a transformers.GenerationConfig; what hotloop does not support is refused, not ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from .. import core
from ..decode import Logits
from ..front import check
from ..front.arrays import INTEGERS
from ..front.check import integer
from ..reference.decode.draws import BELOW

ASSISTANT_TOKENS = 4
"""Drafted tokens per step unless told otherwise; the examples of transformers draft 4 to 6."""

_READ = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_length",
    "max_new_tokens",
    "eos_token_id",
    "pad_token_id",
    "num_return_sequences",
    "num_assistant_tokens",
}
# Beams, caches, what is returned beside the tokens, other kinds of drafts: no effect on the tokens of this loop.
_WITHOUT_EFFECT = {
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "bos_token_id",
    "cache_config",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "prefill_chunk_size",
    "renormalize_logits",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
    "transformers_version",
    "use_cache",
}
# Everything else must be None or this.
_NEUTRAL: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "token_healing": False,
    "typical_p": 1.0,
    "use_mtp": False,
}


@dataclass(frozen=True)
class Settings:
    """``law`` turns logits into what is sampled from; ``limit`` (R,) int64 new tokens at most, on the CPU."""

    sampled: bool
    law: Callable[[Tensor], Logits]
    copies: int
    limit: Tensor
    eos: Tensor
    pad: int | None
    assistant_tokens: int


def read(
    op: str,
    model: Any,
    given: GenerationConfig | None,
    input_ids: Tensor,
    max_new_tokens: Any,
    assistant_model: Any,
    num_assistant_tokens: int | None,
) -> Settings:
    """The settings of a call: of ``given``, else of the model, else the defaults of transformers."""
    check.instance(op, "generation_config", given, GenerationConfig, type(None))
    config, _ = model._prepare_generation_config(given)
    _refuse_the_rest(op, config)
    name = "generation_config.num_return_sequences"
    copies = integer(op, name, config.num_return_sequences, at_least=1)
    eos = config.eos_token_id
    eos = [] if eos is None else torch.as_tensor(eos, device="cpu").reshape(-1).tolist()
    pad = config.pad_token_id
    if pad is None and eos:
        pad = eos[0]
    own_length = any(
        c is not None and c.max_length is not None for c in (given, model.generation_config)
    )
    prompt = int(input_ids.shape[1])
    rows = len(input_ids)
    if max_new_tokens is None:
        max_new_tokens = config.max_new_tokens
        if max_new_tokens is None:
            # A length that was set counts the prompt, the default one of transformers does not.
            max_new_tokens = config.max_length - (prompt if own_length else 0)
            if own_length and max_new_tokens < 1:
                raise ValueError(
                    f"[{op}] generation_config.max_length: expected more than the {prompt} tokens of the prompt, got "
                    f"{config.max_length}. Set max_new_tokens instead."
                )
    sampled = bool(config.do_sample)
    numbers: dict[str, Any] = {"temperature": 0.0}
    if sampled:
        # transformers takes temperature None and top_p None for 1, top_k None and min_p None for none.
        numbers = {
            "temperature": 1.0 if config.temperature is None else float(config.temperature),
            "top_k": config.top_k or 0,
            "top_p": 1.0 if config.top_p is None else float(config.top_p),
            "min_p": float(config.min_p or 0.0),
        }
    return Settings(
        sampled=sampled,
        law=lambda logits: Logits(logits, **numbers),
        copies=copies,
        limit=_limits(op, max_new_tokens, rows).repeat_interleave(copies),
        eos=torch.tensor(eos, dtype=torch.int64, device="cpu"),
        pad=None if pad is None else int(pad),
        assistant_tokens=_assistant_tokens(op, num_assistant_tokens, given, assistant_model),
    )


def _refuse_the_rest(op: str, config: GenerationConfig) -> None:
    known = vars(GenerationConfig())
    for name, value in sorted(vars(config).items()):
        if name.startswith("_") or name in _READ or name in _WITHOUT_EFFECT or name not in known:
            continue
        neutral = _NEUTRAL.get(name)
        if value is not None and value != neutral:
            wanted = "None" if neutral is None else f"None or {neutral!r}"
            raise NotImplementedError(
                f"[{op}] generation_config.{name}: expected {wanted}, got {value!r}. "
                "Unset it, or use model.generate."
            )


def _assistant_tokens(
    op: str, given: int | None, config: GenerationConfig | None, assistant_model: Any
) -> int:
    if assistant_model is None:
        return 0
    for value in (
        given,
        getattr(config, "num_assistant_tokens", None),
        assistant_model.generation_config.num_assistant_tokens,
    ):
        if value is not None:
            return integer(op, "num_assistant_tokens", value, at_least=1)
    return ASSISTANT_TOKENS


def _limits(op: str, value: Any, rows: int) -> Tensor:
    if not isinstance(value, (Tensor, np.ndarray)):
        number = integer(op, "max_new_tokens", value, at_least=1)
        return torch.full((rows,), number, device="cpu")
    limits = _per_row(op, "max_new_tokens", value, rows, INTEGERS)
    if rows and int(limits.min()) < 1:
        raise ValueError(f"[{op}] max_new_tokens: expected at least 1, got {int(limits.min())}.")
    return limits.long()


def _per_row(op: str, name: str, value: Any, rows: int, dtypes: tuple[str, ...]) -> Tensor:
    found = torch.as_tensor(value, device="cpu")
    check.array(op, name, found, dtypes)
    check.shape(op, name, found, (rows,), hint="Or pass an integer.")
    return found


def _drawn(generator: torch.Generator | None, n: int) -> Tensor:
    """(n,) seeds on the CPU, from torch's own generator or the one given."""
    device = "cpu" if generator is None else generator.device
    return torch.randint(BELOW, (n,), generator=generator, device=device).cpu()


def one_seed(op: str, seed: Any) -> int:
    if seed is None or isinstance(seed, torch.Generator):
        return int(_drawn(seed, 1))
    return integer(op, "seed", seed, at_least=0, at_most=2**64 - 1)


def row_seeds(op: str, seed: Any, rows: int, copies: int) -> Tensor:
    """A seed for every row: drawn ones, the given ones, or, where one serves several rows, draws of Philox under it."""
    if seed is None or isinstance(seed, torch.Generator):
        return _drawn(seed, rows * copies)
    if isinstance(seed, (Tensor, np.ndarray)):
        seeds = _per_row(op, "seed", seed, rows, ("int64",))
        if copies == 1:
            return seeds
        each = [_derived(x % 2**64, copies) for x in seeds.tolist()]
        return torch.cat(each) if each else seeds
    return _derived(integer(op, "seed", seed, at_least=0, at_most=2**64 - 1), rows * copies)


def _derived(seed: int, n: int) -> Tensor:
    words = np.ascontiguousarray(core.philox(seed, n, offset=_SEEDS)[:, :2])
    return torch.from_numpy(words.view(np.int64).reshape(n).copy())


_SEEDS = 2**64 - 1
"""The counter under which seeds are drawn: no token ever has that position."""


def attention(op: str, input_ids: Tensor, mask: Any, settings: Settings) -> Tensor:
    """(R,) int64, on the CPU: how many slots at the left of each prompt are padding."""
    if mask is None:
        # As transformers infers it: only where the padding token cannot end a text.
        pad = settings.pad
        if pad is None or pad in settings.eos.tolist():
            return torch.zeros(len(input_ids), dtype=torch.int64, device="cpu")
        mask = input_ids != pad
    elif not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(input_ids.shape):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"[{op}] attention_mask: expected shape {tuple(input_ids.shape)} like input_ids, got {got}."
        )
    real = (mask != 0).cpu()
    count = real.sum(1)
    slots = torch.arange(real.shape[1], device="cpu")
    wrong = (real != (slots >= (real.shape[1] - count)[:, None])).any(1) | (count == 0)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"[{op}] attention_mask: expected at least one token, and padding on its left only, got "
            f"{real[at].long().tolist()} at [{at}]. Set tokenizer.padding_side = 'left'."
        )
    pad_slots: Tensor = real.shape[1] - count
    return pad_slots
