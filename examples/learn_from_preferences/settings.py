# SPDX-License-Identifier: Apache-2.0
"""Every number the program depends on, in one place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import torch

DEFAULT_MINUTES = 4.0


class DemoError(Exception):
    """Something the user can put right; its text is one sentence for the terminal."""


@dataclass(frozen=True)
class Settings:
    """Sizes and step counts; times follow from them, so that a seed gives one result."""

    seed: int = 0
    # Model: bytes in, bytes out. Byte 0 marks the end of a file.
    width: int = 192
    layers: int = 4
    heads: int = 4
    ngram_rows: int = 4096
    bfloat16: bool = False  # matrix products below the head; see native_bfloat16
    prompt_bytes: int = 96
    answer_bytes: int = 160
    # Learning to predict the next byte.
    pretrain_steps: int = 900
    pretrain_batch: int = 8
    pretrain_lr: float = 3e-3
    weight_decay: float = 0.1
    loss_points: int = 12
    heldout_windows: int = 64
    # Learning from pairs.
    rounds: int = 3
    round_prompts: int = 192
    answers: int = 4
    temperature: float = 0.8
    least_gap: float = 0.2
    pair_batch: int = 16
    pair_epochs: int = 2
    pair_lr: float = 1.5e-4
    beta: float = 0.1
    # Judging the result.
    eval_prompts: int = 256
    eval_answers: int = 4
    sample_batch: int = 256
    # Serving with a draft model.
    draft_width: int = 64
    draft_layers: int = 1
    draft_heads: int = 2
    draft_steps: int = 300
    draft_batch: int = 16
    draft_lr: float = 5e-3
    draft_tokens: int = 4
    serve_prompts: int = 64
    serve_batch: int = 16
    # Measuring the head.
    measure: bool = True
    measure_repeats: int = 5
    large_repeats: int = 3
    large_rows: int = 1024
    large_width: int = 512
    large_vocabulary: int = 32000
    # Work between two checkpoints, in seconds.
    checkpoint_seconds: float = 10.0
    # Text that does not fit is left out.
    most_text_bytes: int = 64 * 2**20

    @property
    def context(self) -> int:
        return self.prompt_bytes + self.answer_bytes

    def fingerprint(self, text_digest: str) -> str:
        """Name of a run: any other setting or text gives another one."""
        facts = dataclasses.asdict(self)
        del facts["checkpoint_seconds"]
        packed = json.dumps([facts, text_digest], sort_keys=True).encode()
        return hashlib.blake2b(packed, digest_size=16).hexdigest()


def settings_for(minutes: float, seed: int) -> Settings:
    """Scale the number of steps and prompts to about ``minutes`` on two idle cores."""
    if not minutes > 0:
        raise DemoError(f"--minutes: expected a number > 0, got {minutes:g}.")
    share = minutes / DEFAULT_MINUTES
    base = Settings(seed=seed, bfloat16=native_bfloat16())
    return dataclasses.replace(
        base,
        pretrain_steps=max(20, round(base.pretrain_steps * share)),
        round_prompts=max(16, round(base.round_prompts * share)),
        eval_prompts=max(32, round(base.eval_prompts * min(share, 1.0))),
        draft_steps=max(20, round(base.draft_steps * share)),
    )


def native_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware; emulation would be slower."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def seed_of(*keys: object) -> int:
    """A 63-bit seed from the run's seed and the name of the step.

    No generator lives longer than one step: a run that was killed needs no random state to go on.
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
