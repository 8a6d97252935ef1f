# SPDX-License-Identifier: Apache-2.0
"""Against Hugging Face transformers: the tokens its warpers keep, and its speculative sampling as a distribution."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from decode_cases import assert_law, assert_rejected, softmax
from hotloop.decode import Logits, chain_speculative_sampling, law_probs

pytestmark = pytest.mark.peer
process = pytest.importorskip("transformers.generation.logits_process")
utils = pytest.importorskip("transformers.generation.utils")

NOTHING = torch.zeros(1, 1, dtype=torch.long)


def warped(z: torch.Tensor, warpers: list[Any]) -> torch.Tensor:
    for warper in warpers:
        z = warper(NOTHING, z)
    return z.softmax(-1)


def distinct(b: int, v: int, seed: int) -> torch.Tensor:
    """Logits without ties, none nearer to another than 1e-3."""
    g = torch.Generator().manual_seed(seed)
    grid = torch.stack([torch.randperm(4 * v, generator=g)[:v] for _ in range(b)])
    return grid.float() * (8 / (4 * v))


CUTS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"temperature": t}, [process.TemperatureLogitsWarper(t)]) for t in (0.3, 1.9)
]
CUTS += [({"top_k": k}, [process.TopKLogitsWarper(k)]) for k in (1, 7, 40, 5000)]
CUTS += [({"top_p": p}, [process.TopPLogitsWarper(p)]) for p in (1e-6, 0.31, 0.87, 0.999)]
CUTS += [({"min_p": m}, [process.MinPLogitsWarper(m)]) for m in (1e-4, 0.13, 0.7)]
CUTS += [
    (
        {"temperature": 1.3, "top_k": 20, "top_p": 0.83, "min_p": 0.11},
        [
            process.TemperatureLogitsWarper(1.3),
            process.TopKLogitsWarper(20),
            process.TopPLogitsWarper(0.83),
            process.MinPLogitsWarper(0.11),
        ],
    )
]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("cut", "warpers"), CUTS, ids=lambda x: str(x) if isinstance(x, dict) else ""
)
def test_warpers_keep_the_same_tokens(cut: dict[str, Any], warpers: list[Any], impl: str) -> None:
    for v in (1, 7, 513, 3000):
        z = distinct(4, v, v)
        theirs = warped(z.double(), warpers)
        ours = law_probs(Logits(z, **cut), impl=impl)
        # Weights below 2^-43 of the largest are none here: a law over 2^21 tokens would not notice.
        assert torch.equal(ours > 0, theirs > 2.0**-43 * theirs.max(-1, keepdim=True).values)
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-6, atol=1e-12)


def test_speculative_sampling_has_the_same_law() -> None:
    """4000 rounds of theirs and a million of ours against one law of (tokens, number accepted)."""
    torch.set_num_threads(1)  # theirs are a few numbers at a time
    v, k, rounds, n = 4, 2, 4000, 10**6
    rng = np.random.default_rng(0)
    z = rng.normal(size=(k + 1, v))
    w = 0.6 * z[:k] + 0.8 * rng.normal(size=(k, v))
    p, q = softmax(z), softmax(w)
    law = np.zeros((k + 1, v + 1, v + 1, v + 1))  # accepted, then the tokens, with v for none
    for x in product(range(v), repeat=k):
        chance = np.prod([q[i, x[i]] for i in range(k)])
        for tau in range(k + 1):
            left = p[k] if tau == k else np.maximum(p[tau] - q[tau], 0)
            passes = 1.0 if tau == k else 1 - min(1.0, p[tau, x[tau]] / q[tau, x[tau]])
            for token in range(v):
                out = [*x[:tau], token] + [v] * (k - tau)
                law[(tau, *out)] += chance * passes * left[token] / left.sum()
            if tau < k:
                chance *= 1 - passes

    def counted(tokens: np.ndarray, accepted: np.ndarray) -> np.ndarray:
        full = np.where(tokens < 0, v, tokens)
        flat = np.ravel_multi_index((accepted, *full.T), law.shape)
        return np.bincount(flat, minlength=law.size)

    drafts = np.stack([rng.choice(v, size=n, p=q[i]) for i in range(k)], 1)
    ours = chain_speculative_sampling(
        Logits(np.broadcast_to(w, (n, k, v))),
        drafts,
        Logits(np.broadcast_to(z, (n, k + 1, v))),
        seed=5,
    )
    assert_law(counted(ours.output_token_ids, ours.num_accepted), law)
    theirs = np.full((rounds, k + 1), -1)
    accepted = np.zeros(rounds, np.int64)
    target, draft = torch.from_numpy(z)[None], torch.from_numpy(w)[None]
    torch.manual_seed(1)
    for i in range(rounds):
        x = torch.from_numpy(drafts[i : i + 1])
        valid, matches = utils._speculative_sampling(x, draft, k, target)
        accepted[i] = int(matches)
        theirs[i, : valid.shape[1]] = valid[0]
    assert_law(counted(theirs, accepted), law, rounds)
    # Theirs once more, with the draft's law mistaken for that of another position: found out.
    wrong = theirs.copy()
    wrong[:, 0] = wrong[::-1, 0]
    assert_rejected(counted(wrong, accepted), law)
