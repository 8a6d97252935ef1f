"""Every error text that belongs to one op, one law or one number."""

from __future__ import annotations

from typing import Any

import hotloop.decode as d
import numpy as np
import pytest
import torch
from decode_calls import CALLS, NEAR, PARENTS, PATHS, B, K, P, X, Z, refused

LAWS = {
    "chain_speculative_sampling": ("target_probs", "draft_probs"),
    "tree_speculative_verify": ("target_probs", "draft_probs"),
    "lantern_relaxed_accept": ("target_probs", "draft_probs"),
    "sample": ("law",),
    "top_logprobs": ("law",),
    "law_probs": ("law",),
}
BAD_LAWS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"filter_order": "min_p_first"},
        ValueError,
        "filter_order: expected one of top_k_first, joint, got 'min_p_first'",
    ),
    ({"top_k": -2}, ValueError, "top_k: expected a number >= -1, got -2"),
    ({"top_k": 2.5}, ValueError, r"top_k: expected an integer, got 2\.5"),
    ({"top_k": "3"}, TypeError, "top_k: expected a NumPy, torch or CuPy array, got str"),
    ({"top_k": True}, TypeError, "top_k: expected a NumPy, torch or CuPy array, got bool"),
    ({"top_k": np.ones(B)}, TypeError, "top_k: expected dtype int64, int32, got float64"),
    ({"top_k": np.array([1, -5])}, ValueError, r"top_k\[1\]: expected a number >= -1, got -5"),
    (
        {"top_k": np.ones(B + 1, np.int64)},
        ValueError,
        r"top_k: expected a number or shape \(2,\), got shape \(3,\)",
    ),
    ({"top_p": 0.0}, ValueError, "top_p: expected a number > 0 and <= 1, got 0"),
    ({"top_p": 1.5}, ValueError, "top_p: expected a number > 0 and <= 1, got 1.5"),
    ({"top_p": float("nan")}, ValueError, "top_p: expected a finite number, got nan"),
    (
        {"top_p": np.array([0.5, 0.0])},
        ValueError,
        r"top_p\[1\]: expected a number > 0 and <= 1, got 0",
    ),
    (
        {"top_p": np.array([np.nan, 1.0])},
        ValueError,
        r"top_p: expected finite numbers, got nan at \[0\]",
    ),
    ({"min_p": -0.1}, ValueError, "min_p: expected a number >= 0 and <= 1, got -0.1"),
    ({"min_p": 1.1}, ValueError, "min_p: expected a number >= 0 and <= 1, got 1.1"),
    (
        {"min_p": np.array([[0.1], [0.2]])},
        ValueError,
        r"min_p: expected a number or shape \(2,\), got shape \(2, 1\)",
    ),
]
BAD_LOGITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": -1.0}, ValueError, "temperature: expected a number >= 0, got -1"),
    ({"temperature": float("inf")}, ValueError, "temperature: expected a finite number, got inf"),
    (
        {"temperature": np.array([1.0, -2.0])},
        ValueError,
        r"temperature\[1\]: expected a number >= 0, got -2",
    ),
    (
        {"temperature": [1.0, 2.0]},
        TypeError,
        "temperature: expected a NumPy, torch or CuPy array, got list",
    ),
    ({"mixture": 1.5}, ValueError, "mixture: expected a number >= 0 and <= 1, got 1.5"),
    (
        {"reference": Z[:1]},
        ValueError,
        r"reference: expected float32 .* like .*, got float32 \(1, ",
    ),
    (
        {"reference": Z.astype(np.float64)},
        ValueError,
        r"reference: expected float32 .*, got float64",
    ),
    ({"reference": [0.0]}, TypeError, "reference: expected a NumPy, torch or CuPy array, got list"),
    ({"reference": torch.zeros(1)}, TypeError, "reference: expected a numpy array"),
    (
        {"bias": np.zeros((B, 2), np.float32)},
        ValueError,
        "bias: expected bias_ids and bias together, got only one",
    ),
    (
        {"bias_ids": np.zeros((B, 2), np.int64)},
        ValueError,
        "bias: expected bias_ids and bias together, got only one",
    ),
    (
        {"bias_ids": np.zeros((B, 2), np.int32), "bias": np.zeros((B, 2), np.float32)},
        TypeError,
        "bias_ids: expected dtype int64, got int32",
    ),
    (
        {"bias_ids": np.zeros((B, 2), np.int64), "bias": np.zeros((B, 2))},
        TypeError,
        "bias: expected dtype float32, got float64",
    ),
    (
        {"bias_ids": np.zeros((B, 2), np.int64), "bias": np.zeros((B, 3), np.float32)},
        ValueError,
        r"bias: expected shape \(2, 2\), got \(2, 3\)",
    ),
    (
        {"bias_ids": np.zeros((1, 2), np.int64), "bias": np.zeros((1, 2), np.float32)},
        ValueError,
        r"bias_ids: expected shape \(2, 2\), got \(1, 2\)",
    ),
    (
        {"bias_ids": np.zeros(2, np.int64), "bias": np.zeros((1, 2), np.float32)},
        ValueError,
        r"bias_ids: expected 2 dimension\(s\)",
    ),
]


@pytest.mark.parametrize("op", LAWS)
def test_laws(op: str) -> None:
    for name in LAWS[op]:
        values = CALLS[op][1][name]
        rows = Z[:, : values.shape[1]]
        for bad, error, text in BAD_LAWS:
            for law in (d.Probs(values, **bad), d.Logits(rows, **bad)):
                refused(op, error, rf"^\[{op}\] {name}\.{text}", {name: law})
        for bad, error, text in BAD_LOGITS:
            bad = {k: x[:, : rows.shape[1]] if x is Z else x for k, x in bad.items()}
            refused(op, error, rf"^\[{op}\] {name}\.{text}", {name: d.Logits(rows, **bad)})
        empty = values[..., :0]
        text = r"expected a vocabulary of 1 to 2097152 tokens, got shape \(2, .*, 0\)"
        refused(op, ValueError, rf"^\[{op}\] {name}: {text}", {name: empty})
        wide = np.broadcast_to(np.float32(0), (*values.shape[:-1], 2**21 + 1))
        text = r"expected a vocabulary of 1 to 2097152 tokens, got shape \(2, .*, 2097153\)"
        refused(op, ValueError, rf"^\[{op}\] {name}: {text}", {name: wide})


# (op, what is changed, error, its text after the op)
SPECIFIC: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (
        "chain_speculative_sampling",
        {"target_probs": P[:, :K]},
        ValueError,
        r"target_probs: expected shape \(2, 4, 5\) for that many draft tokens, got \(2, 3, 5\)",
    ),
    (
        "block_speculative_sampling",
        {"draft_probs": P[:, :1]},
        ValueError,
        r"draft_probs: expected shape \(2, 3, 5\), got \(2, 1, 5\)",
    ),
    (
        "block_speculative_sampling",
        {"draft_probs": P[:, :K, :4]},
        ValueError,
        r"draft_probs: expected shape \(2, 3, 5\), got \(2, 3, 4\)",
    ),
    (
        "speculative_streaming_verify",
        {"stream_probs": P[:, :1, None]},
        ValueError,
        r"stream_probs: expected at least 3 tokens in steps \* S, got shape \(2, 1, 1, 5\)",
    ),
    (
        "tree_speculative_verify",
        {"target_probs": P[:, :K]},
        ValueError,
        r"target_probs: expected shape \(2, 4, 5\) for that many nodes, got \(2, 3, 5\)",
    ),
    (
        "tree_speculative_verify",
        {"draft_probs": P[:, :K]},
        ValueError,
        r"draft_probs: expected shape \(2, 4, 5\), got \(2, 3, 5\)",
    ),
    (
        "tree_speculative_verify",
        {"parents": PARENTS[:, :2]},
        ValueError,
        r"parents: expected shape \(2, 3\) like draft_token_ids, got \(2, 2\)",
    ),
    (
        "tree_speculative_verify",
        {"max_depth": K + 1},
        ValueError,
        "max_depth: expected an integer >= 0 and <= 3, got 4",
    ),
    (
        "tree_speculative_verify",
        {"max_depth": -1},
        ValueError,
        "max_depth: expected an integer >= 0 and <= 3, got -1",
    ),
    (
        "tree_speculative_verify",
        {"max_depth": 1.0},
        TypeError,
        "max_depth: expected an integer, got float",
    ),
    (
        "lantern_relaxed_accept",
        {"neighbors": NEAR[:4]},
        ValueError,
        r"neighbors: expected shape \(5, 4\) for that vocabulary, got \(4, 4\)",
    ),
    (
        "lantern_relaxed_accept",
        {"neighbors": NEAR.astype(np.int64)},
        TypeError,
        "neighbors: expected dtype int32, got int64",
    ),
    ("lantern_relaxed_accept", {"k": -1}, ValueError, "k: expected an integer >= 0, got -1"),
    ("lantern_relaxed_accept", {"k": 1.5}, TypeError, "k: expected an integer, got float"),
    (
        "lantern_relaxed_accept",
        {"delta": -0.1},
        ValueError,
        "delta: expected a number >= 0, got -0.1",
    ),
    (
        "lantern_relaxed_accept",
        {"delta": None},
        TypeError,
        "delta: expected a number >= 0, got NoneType",
    ),
    (
        "greedy_speculative_accept",
        {"target_logits": Z[:, :K]},
        ValueError,
        r"target_logits: expected shape \(2, 4, 5\) for that many draft tokens, got \(2, 3, 5\)",
    ),
    (
        "greedy_speculative_accept",
        {"draft_token_ids": PATHS},
        ValueError,
        r"target_logits: expected 4 dimension\(s\)",
    ),
    (
        "greedy_speculative_accept",
        {"draft_token_ids": PATHS, "target_logits": Z[:, None]},
        ValueError,
        r"target_logits: expected shape \(2, 2, 4, 5\) for those paths, got \(2, 1, 4, 5\)",
    ),
    (
        "typical_accept",
        {"draft_token_ids": PATHS[:, :0], "target_logits": Z[:, :0, None]},
        ValueError,
        r"draft_token_ids: expected at least one path of at least one token, got shape \(2, 0, 4\)",
    ),
    (
        "typical_accept",
        {"epsilon": 1.5},
        ValueError,
        "epsilon: expected a number >= 0 and <= 1, got 1.5",
    ),
    ("typical_accept", {"alpha": -1}, ValueError, "alpha: expected a number >= 0, got -1"),
    (
        "typical_accept",
        {"entropy_eps": -1},
        ValueError,
        "entropy_eps: expected a number >= 0 and <= 1, got -1",
    ),
    ("typical_accept", {"alpha": "x"}, TypeError, "alpha: expected a number >= 0, got str"),
    ("top_logprobs", {"k": -1}, ValueError, "k: expected an integer >= 0 and <= 2097152, got -1"),
    ("top_logprobs", {"k": None}, TypeError, "k: expected an integer, got NoneType"),
    ("entropy_adaptive_temperature", {"std": 0.0}, ValueError, "std: expected a number > 0, got 0"),
    (
        "entropy_adaptive_temperature",
        {"maximum": 0.0},
        ValueError,
        "maximum: expected a number > 0, got 0",
    ),
    (
        "entropy_adaptive_temperature",
        {"minimum": 0.5},
        ValueError,
        "minimum: expected a number < 0, got 0.5",
    ),
    (
        "entropy_adaptive_temperature",
        {"median": "x"},
        TypeError,
        "median: expected a number, got str",
    ),
    (
        "entropy_adaptive_temperature",
        {"temperature": 0.0},
        ValueError,
        "temperature: expected a number > 0, got 0",
    ),
    (
        "entropy_adaptive_temperature",
        {"tau": 1.0},
        ValueError,
        "tau: expected a number >= 0 and < 1, got 1",
    ),
    (
        "geometric_mixture_logits",
        {"mixture": -0.1},
        ValueError,
        "logits.mixture: expected a number >= 0 and <= 1, got -0.1",
    ),
    (
        "geometric_mixture_logits",
        {"ref_logits": Z[:, :2]},
        ValueError,
        r"logits.reference: expected float32 \(2, 4, 5\) like logits, got float32 \(2, 2, 5\)",
    ),
    (
        "mirror_sd_branch_reuse",
        {"num_accepted": np.zeros(B, np.int32)},
        TypeError,
        "num_accepted: expected dtype int64, got int32",
    ),
    (
        "mirror_sd_branch_reuse",
        {"num_accepted": np.zeros(B + 1, np.int64)},
        ValueError,
        r"num_accepted: expected shape \(2,\) like output_token_ids, got \(3,\)",
    ),
    (
        "mirror_sd_branch_reuse",
        {"branch_root_ids": np.zeros((B, K + 1, 2), np.int32)},
        TypeError,
        "branch_root_ids: expected dtype int64, got int32",
    ),
    (
        "mirror_sd_branch_reuse",
        {"branch_token_ids": np.zeros((B, K + 1, 1, 3), np.int64)},
        ValueError,
        r"branch_token_ids: expected shape \(2, 4, 2, 3\), got \(2, 4, 1, 3\)",
    ),
]


@pytest.mark.parametrize(("op", "changes", "error", "text"), SPECIFIC)
def test_specific(op: str, changes: dict[str, Any], error: type[Exception], text: str) -> None:
    refused(op, error, rf"^\[{op}\] {text}", changes)


def test_value_augmentation() -> None:
    start = r"^\[value_augmented_law\] "
    op = "value_augmented_logits"
    refused(op, TypeError, start + "beta: expected a number, got str", {"beta": "3"})
    refused(op, ValueError, start + "beta: expected a number, got nan", {"beta": float("nan")})
    text = r"values: expected shape \(2, 3\), got \(2, 2\)"
    refused(op, ValueError, start + text, {"values": np.zeros((B, 2), np.float32)})
    text = "token_ids: expected dtype int64, got int32"
    refused(op, TypeError, start + text, {"token_ids": X.astype(np.int32)})
    text = r"logits: expected 2 dimension\(s\), got shape \(2, 4, 5\)"
    refused(op, ValueError, start + text, {"logits": Z})
