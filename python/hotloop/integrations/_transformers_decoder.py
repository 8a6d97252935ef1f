# SPDX-License-Identifier: Apache-2.0
"""A model of Hugging Face transformers with a cache of its own, whose rows may lose different numbers of tokens.

The cache is always what a batch padded on the left gives: row b holds its tokens in the last slots, ``pad[b]`` slots
before them are masked out. After a step in which rows kept different numbers of drafted tokens, every row is moved to
the right end again. No slot in between is ever masked, so slot distance is token distance, as sliding windows need.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

INPUTS = ("input_ids", "attention_mask", "position_ids", "past_key_values")
LAYERS = ("full_attention", "sliding_attention")


def check_model(op: str, name: str, model: Any) -> None:
    """Refuse what cannot be run on a batch whose rows advance at different speeds."""
    kind = type(_plain(model)).__name__
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "generation_config"):
        raise TypeError(
            f"[{op}] {name}: expected a transformers.PreTrainedModel that can generate, got {kind}. "
            "Load it with AutoModelForCausalLM."
        )
    reasons = []
    config: Any = model.config
    if config.is_encoder_decoder:
        reasons.append("an encoder")
    accepted = _accepted(model)
    reasons += [f"no {x} in forward" for x in INPUTS if x not in accepted]
    if not reasons:
        layer_types = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
        reasons += [f"{x} layers" for x in sorted(layer_types - set(LAYERS))]
        layers = {type(layer) for layer in DynamicCache(config=config).layers}
        if not reasons and not layers <= {DynamicLayer, DynamicSlidingWindowLayer}:
            reasons.append(f"a cache of {', '.join(sorted(x.__name__ for x in layers))}")
    if reasons:
        raise NotImplementedError(
            f"[{op}] {name}: expected a decoder that takes {', '.join(INPUTS)} and keeps keys and values of "
            f"{' or '.join(LAYERS)}, got {kind} with {', '.join(reasons)}. Use its own generate."
        )


def _plain(model: Any) -> Any:
    """The module that torch.compile was given: the one around it takes anything."""
    return getattr(model, "_orig_mod", model)


def _accepted(model: Any) -> Any:
    return inspect.signature(_plain(model).forward).parameters


def embedded(model: Any) -> int:
    """How many tokens the model can be fed."""
    return int(model.get_input_embeddings().weight.shape[0])


class Decoder:
    """One model, its cache, and where each row's tokens begin in it.

    Args:
        home: where logits are returned; ``model`` may be elsewhere, on several devices.
        pad: (R,) int64, masked slots at the left of every row of the prompt.
    """

    def __init__(self, op: str, name: str, model: Any, home: torch.device, pad: Tensor) -> None:
        self.op, self.name, self.model = op, name, model
        self.draft = name == "assistant_model"
        self.home, self.place = home, model.get_input_embeddings().weight.device
        self.embedded = embedded(model)
        self.vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)
        self.takes_logits_to_keep = "logits_to_keep" in _accepted(model)
        # Not of the model's configuration: a sliding window would forget tokens that a rejection brings back.
        self.cache = DynamicCache()
        self.pad = pad
        self.width = 0

    def forward(self, tokens: Tensor, keep: int) -> Tensor:
        """Feed (R, m) tokens; the logits after the last ``keep`` of them, (R, keep, V)."""
        m = int(tokens.shape[1])
        first = self.width == 0
        slots = torch.arange(self.width + m, device="cpu")
        positions = (slots[None, self.width :] - self.pad[:, None]).clamp_(min=0)
        if self.draft or self.vocabulary <= self.embedded:
            # A draft may know fewer tokens than the target; whatever it makes of the others, its law is verified.
            known = tokens.clamp(min=0, max=self.embedded - 1)
        else:
            known = self._known(tokens)
        more = {"logits_to_keep": keep} if self.takes_logits_to_keep else {}
        logits: Tensor = self.model(
            input_ids=known.to(self.place),
            attention_mask=(slots >= self.pad[:, None]).long().to(self.place),
            position_ids=positions.to(self.place),
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **more,
        ).logits
        self.vocabulary = int(logits.shape[-1])
        self.width += m
        if first and self.cache.get_seq_length() != self.width:
            raise NotImplementedError(
                f"[{self.op}] {self.name}: expected forward to add {self.width} tokens to past_key_values, "
                f"got {self.cache.get_seq_length()} from {type(_plain(self.model)).__name__}. Use its own generate."
            )
        return logits[:, -keep:].to(self.home)

    def _known(self, tokens: Tensor) -> Tensor:
        """The target's own tokens, of which its lm_head has more than its embedding."""
        if tokens.numel() and int(tokens.max()) >= self.embedded:
            raise ValueError(
                f"[{self.op}] {self.name}: expected tokens below its {self.embedded} input embeddings, got "
                f"{int(tokens.max())} from a head of {self.vocabulary}. Resize the embeddings."
            )
        return tokens.clamp(min=0)

    def keep(self, rows: Tensor, drop: Tensor) -> None:
        """Go on with these rows, (R',) int64, each without its last ``drop`` tokens, (R',) int64; both on the CPU."""
        pad = self.pad[rows]
        held = self.width - pad - drop
        width = int(held.max())
        all_rows = len(rows) == len(self.pad)
        if all_rows and int(drop.min()) == int(drop.max()):
            start, stop = self.width - int(drop[0]) - width, self.width - int(drop[0])
            for layer in self._layers():
                layer.keys = layer.keys[:, :, start:stop]
                layer.values = layer.values[:, :, start:stop]
        else:
            # Slots left of a row's first token are masked: what they hold does not matter.
            source = torch.arange(width, device="cpu")[None] + (self.width - width - drop)[:, None]
            source.clamp_(min=0)
            for layer in self._layers():
                layer.keys = _moved(layer.keys, None if all_rows else rows, source)
                layer.values = _moved(layer.values, None if all_rows else rows, source)
        self.pad = width - held
        self.width = width

    def _layers(self) -> list[Any]:
        return [layer for layer in self.cache.layers if getattr(layer, "is_initialized", False)]


def _moved(x: Tensor, rows: Tensor | None, source: Tensor) -> Tensor:
    """out[i, h, s] = x[rows[i], h, source[i, s]] for x (R, heads, slots, dim)."""
    if rows is not None:
        x = x.index_select(0, rows.to(x.device))
    index = source.to(x.device)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))
