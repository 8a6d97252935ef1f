# SPDX-License-Identifier: Apache-2.0
"""A target and a draft of transformers, trained for seconds on a Markov chain, so that the draft is often right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fixtures import plain_environment, threads  # noqa: F401

VOCABULARY = 16
LENGTH = 32


single_thread = threads(1, "session")


def chain_text(rows: int) -> torch.Tensor:
    """Sequences (rows, LENGTH): the next token depends on the last one, or, one time in four, on the one before."""
    law = torch.distributions.Dirichlet(torch.full((2, VOCABULARY, VOCABULARY), 0.15)).sample()
    text = torch.randint(0, VOCABULARY, (rows, LENGTH))
    for t in range(2, LENGTH):
        mixed = 0.75 * law[0, text[:, t - 1]] + 0.25 * law[1, text[:, t - 2]]
        text[:, t] = torch.multinomial(mixed, 1)[:, 0]
    return text


def trained(text: torch.Tensor, width: int, layers: int, steps: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=width,
            n_layer=layers,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        batch = text[step * 32 % len(text) :][:32]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def models() -> tuple[Any, Any]:
    """The target and the draft."""
    pytest.importorskip("transformers", reason="needs the peers extra")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        text = chain_text(512)
        return trained(text, 32, 2, 150), trained(text, 16, 1, 60)
