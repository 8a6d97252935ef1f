# SPDX-License-Identifier: Apache-2.0
"""Valid arguments of every op of the room, and how a call with one of them changed is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import hotloop.decode as d
import numpy as np
import pytest
import torch

B, K, V = 2, 3, 5
Z = np.zeros((B, K + 1, V), np.float32)
P = np.full((B, K + 1, V), 1 / V, np.float32)
X = np.ones((B, K), np.int64)
NEAR = np.array([[v for v in range(V) if v != w] for w in range(V)], np.int32)
PARENTS = np.tile(np.arange(-1, K - 1), (B, 1))
PATHS = np.ones((B, 2, K + 1), np.int64)

CHAIN = {"draft_probs": P[:, :K], "draft_token_ids": X, "target_probs": P}
# Valid arguments of every op; arrays first, in the order of the signature.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "chain_speculative_sampling": (d.chain_speculative_sampling, CHAIN),
    "block_speculative_sampling": (d.block_speculative_sampling, CHAIN),
    "speculative_streaming_verify": (
        d.speculative_streaming_verify,
        {"stream_probs": P.reshape(B, 2, 2, V), "draft_token_ids": X, "target_probs": P},
    ),
    "tree_speculative_verify": (
        d.tree_speculative_verify,
        {"draft_token_ids": X, "parents": PARENTS, "target_probs": P, "draft_probs": P},
    ),
    "lantern_relaxed_accept": (d.lantern_relaxed_accept, {**CHAIN, "neighbors": NEAR}),
    "greedy_speculative_accept": (
        d.greedy_speculative_accept,
        {"draft_token_ids": X, "target_logits": Z},
    ),
    "typical_accept": (
        d.typical_accept,
        {"draft_token_ids": PATHS, "target_logits": P.reshape(B, 1, K + 1, V).repeat(2, 1)},
    ),
    "sample": (d.sample, {"law": P}),
    "law_probs": (d.law_probs, {"law": P}),
    "top_logprobs": (d.top_logprobs, {"law": P, "k": 2}),
    "entropy_adaptive_temperature": (
        d.entropy_adaptive_temperature,
        {"logits": Z, "median": 0.0, "std": 1.0, "maximum": 1.0, "minimum": -1.0},
    ),
    "geometric_mixture_logits": (d.geometric_mixture_logits, {"logits": Z, "ref_logits": Z}),
    "value_augmented_logits": (
        d.value_augmented_logits,
        {"logits": Z[:, 0], "token_ids": X, "values": np.zeros((B, K), np.float32)},
    ),
    "mirror_sd_branch_reuse": (
        d.mirror_sd_branch_reuse,
        {
            "output_token_ids": np.ones((B, K + 1), np.int64),
            "num_accepted": np.zeros(B, np.int64),
            "branch_root_ids": np.ones((B, K + 1, 2), np.int64),
            "branch_token_ids": np.ones((B, K + 1, 2, 3), np.int64),
        },
    ),
}
# By op, the arguments that are laws.
LAW_ARGUMENTS = {
    "chain_speculative_sampling": ("target_probs", "draft_probs"),
    "block_speculative_sampling": ("target_probs", "draft_probs"),
    "speculative_streaming_verify": ("target_probs", "stream_probs"),
    "tree_speculative_verify": ("target_probs", "draft_probs"),
    "lantern_relaxed_accept": ("target_probs", "draft_probs"),
    "typical_accept": ("target_logits",),
    "sample": ("law",),
    "law_probs": ("law",),
    "top_logprobs": ("law",),
}
# What an argument is called in errors where that is not its own name.
RENAMED = {("geometric_mixture_logits", "ref_logits"): "logits.reference"}


both = pytest.mark.parametrize("impl", ["cpu", "reference"])
kinds = pytest.mark.parametrize("kind", ["numpy", "torch"])


def make(kind: str, x: Any) -> Any:
    """An array of a library of its own."""
    x = np.ascontiguousarray(x)
    return torch.from_numpy(x.copy()) if kind == "torch" else x.copy()


def arrays(op: str) -> list[str]:
    return [name for name, x in CALLS[op][1].items() if isinstance(x, np.ndarray)]


def refused(
    op: str, error: type[Exception], match: str, changes: dict[str, Any] | None = None
) -> None:
    call, base = CALLS[op]
    with pytest.raises(error, match=match) as caught:
        call(**{**base, **(changes or {})})
    text = str(caught.value)
    assert text.startswith("["), text
    assert text.rstrip().endswith((".", "info")), text


def named(op: str, name: str) -> str:
    # value_augmented_logits checks its arguments where the law is made.
    said = "value_augmented_l(aw|ogits)" if op == "value_augmented_logits" else op
    return rf"^\[{said}\] {re.escape(RENAMED.get((op, name), name))}: expected "
