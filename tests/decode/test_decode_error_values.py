# SPDX-License-Identifier: Apache-2.0
"""Every error text that belongs to one op, one law or one number."""

from __future__ import annotations

import hotloop.decode as d
import numpy as np
import pytest
import torch
from decode_calls import CALLS, NEAR, PARENTS, PATHS, B, K, P, X, Z, refused
from refusals import Table, each

LAWS = {
    "chain_speculative_sampling": ("target_probs", "draft_probs"),
    "tree_speculative_verify": ("target_probs", "draft_probs"),
    "lantern_relaxed_accept": ("target_probs", "draft_probs"),
    "sample": ("law",),
    "top_logprobs": ("law",),
    "law_probs": ("law",),
}
FEW, ONE, FEW_LOGITS = P[:, :K], P[:, :1, None], Z[:, :K]
IDS, BIAS = np.zeros((B, 2), np.int64), np.zeros((B, 2), np.float32)
LAW_VALUES: Table = {
    "filter_order: expected one of top_k_first, joint, got 'min_p_first'": "min_p_first",
    "top_k: expected a number >= -1, got -2": -2,
    r"top_k: expected an integer, got 2\.5": 2.5,
    r"top_k\[1\]: expected a number >= -1, got -5": {"top_k": np.array([1, -5])},
    r"top_k: expected a number or shape \(2,\), got shape \(3,\)": np.ones(B + 1, np.int64),
    "top_p: expected a number > 0 and <= 1, got 0": 0.0,
    "top_p: expected a number > 0 and <= 1, got 1.5": 1.5,
    "top_p: expected a finite number, got nan": float("nan"),
    r"top_p\[1\]: expected a number > 0 and <= 1, got 0": {"top_p": np.array([0.5, 0.0])},
    r"top_p: expected finite numbers, got nan at \[0\]": np.array([np.nan, 1.0]),
    "min_p: expected a number >= 0 and <= 1, got -0.1": -0.1,
    "min_p: expected a number >= 0 and <= 1, got 1.1": 1.1,
    r"min_p: expected a number or shape \(2,\), got shape \(2, 1\)": np.array([[0.1], [0.2]]),
}
LAW_TYPES: Table = {
    "top_k: expected a NumPy, torch or CuPy array, got str": "3",
    "top_k: expected a NumPy, torch or CuPy array, got bool": True,
    "top_k: expected dtype int64, int32, got float64": np.ones(B),
}
LOGIT_VALUES: Table = {
    "temperature: expected a number >= 0, got -1": -1.0,
    "temperature: expected a finite number, got inf": float("inf"),
    r"temperature\[1\]: expected a number >= 0, got -2": {"temperature": np.array([1.0, -2.0])},
    "mixture: expected a number >= 0 and <= 1, got 1.5": 1.5,
    r"reference: expected shape \(.*\), got \(1, .* Match ": Z[:1],
    "bias: expected bias_ids and bias together, got only one": BIAS,
    "bias: expected bias_ids and bias together, got only one of": {"bias_ids": IDS},
    r"bias: expected shape \(2, 2\), got \(2, 3\)": {
        "bias_ids": IDS,
        "bias": np.zeros((B, 3), np.float32),
    },
    r"bias_ids: expected shape \(2, 2\), got \(1, 2\)": {"bias_ids": IDS[:1], "bias": BIAS[:1]},
    r"bias_ids: expected 2 dimension\(s\)": {"bias_ids": IDS[0], "bias": BIAS[:1]},
}
LOGIT_TYPES: Table = {
    "temperature: expected a NumPy, torch or CuPy array, got list": [1.0, 2.0],
    "reference: expected a NumPy, torch or CuPy array, got list": [0.0],
    "reference: expected dtype float32, got float64": Z.astype(np.float64),
    "reference: expected a numpy array": torch.zeros(1),
    "bias_ids: expected dtype int64, got int32": {"bias_ids": IDS.astype(np.int32), "bias": BIAS},
    "bias: expected dtype float32, got float64": {"bias_ids": IDS, "bias": BIAS.astype(np.float64)},
}


@pytest.mark.parametrize("op", LAWS)
def test_laws(op: str) -> None:
    for name in LAWS[op]:
        values = CALLS[op][1][name]
        rows = Z[:, : values.shape[1]]
        for row in each(LAW_VALUES, LAW_TYPES):
            text, bad, error = row.values
            for law in (d.Probs(values, **bad), d.Logits(rows, **bad)):
                refused(op, error, rf"^\[{op}\] {name}\.{text}", {name: law})
        for row in each(LOGIT_VALUES, LOGIT_TYPES):
            text, bad, error = row.values
            bad = {k: x[:, : rows.shape[1]] if x is Z else x for k, x in bad.items()}
            refused(op, error, rf"^\[{op}\] {name}\.{text}", {name: d.Logits(rows, **bad)})
        empty = values[..., :0]
        text = r"expected a vocabulary of 1 to 2097152 tokens, got shape \(2, .*, 0\)"
        refused(op, ValueError, rf"^\[{op}\] {name}: {text}", {name: empty})
        wide = np.broadcast_to(np.float32(0), (*values.shape[:-1], 2**21 + 1))
        text = r"expected a vocabulary of 1 to 2097152 tokens, got shape \(2, .*, 2097153\)"
        refused(op, ValueError, rf"^\[{op}\] {name}: {text}", {name: wide})


VALUES: dict[str, Table] = {
    "chain_speculative_sampling": {
        r"target_probs: expected shape \(2, 4, 5\) for that many draft tokens, got \(2, 3, 5\)": FEW,
    },
    "block_speculative_sampling": {
        r"draft_probs: expected shape \(2, 3, 5\), got \(2, 1, 5\)": P[:, :1],
        r"draft_probs: expected shape \(2, 3, 5\), got \(2, 3, 4\)": P[:, :K, :4],
    },
    "speculative_streaming_verify": {
        r"stream_probs: expected at least 3 tokens in steps \* S, got shape \(2, 1, 1, 5\)": ONE,
    },
    "tree_speculative_verify": {
        r"target_probs: expected shape \(2, 4, 5\) for that many nodes, got \(2, 3, 5\)": P[:, :K],
        r"draft_probs: expected shape \(2, 4, 5\), got \(2, 3, 5\)": P[:, :K],
        r"parents: expected shape \(2, 3\), got \(2, 2\)": PARENTS[:, :2],
        "max_depth: expected an integer >= 0 and <= 3, got 4": K + 1,
        "max_depth: expected an integer >= 0 and <= 3, got -1": -1,
    },
    "lantern_relaxed_accept": {
        r"neighbors: expected shape \(5, 4\) for that vocabulary, got \(4, 4\)": NEAR[:4],
        "k: expected an integer >= 0, got -1": -1,
        "delta: expected a number >= 0, got -0.1": -0.1,
    },
    "greedy_speculative_accept": {
        r"target_logits: expected shape \(2, 4, 5\) for that many draft tokens, got \(2, 3, 5\)": FEW_LOGITS,
        r"target_logits: expected 4 dimension\(s\)": {"draft_token_ids": PATHS},
        r"target_logits: expected shape \(2, 2, 4, 5\) for those paths, got \(2, 1, 4, 5\)": {
            "draft_token_ids": PATHS,
            "target_logits": Z[:, None],
        },
    },
    "typical_accept": {
        r"draft_token_ids: expected at least one path of at least one token, got shape \(2, 0, 4\)": {
            "draft_token_ids": PATHS[:, :0],
            "target_logits": Z[:, :0, None],
        },
        "epsilon: expected a number >= 0 and <= 1, got 1.5": 1.5,
        "alpha: expected a number >= 0, got -1": -1,
        "entropy_eps: expected a number >= 0 and <= 1, got -1": -1,
    },
    "top_logprobs": {
        "k: expected an integer >= 0 and <= 2097152, got -1": -1,
    },
    "entropy_adaptive_temperature": {
        "std: expected a number > 0, got 0": 0.0,
        "maximum: expected a number > 0, got 0": 0.0,
        "minimum: expected a number < 0, got 0.5": 0.5,
        "temperature: expected a number > 0, got 0": 0.0,
        "tau: expected a number >= 0 and < 1, got 1": 1.0,
    },
    "geometric_mixture_logits": {
        "logits.mixture: expected a number >= 0 and <= 1, got -0.1": {"mixture": -0.1},
        r"logits.reference: expected shape \(2, 4, 5\), got \(2, 2, 5\)": {"ref_logits": Z[:, :2]},
    },
    "mirror_sd_branch_reuse": {
        r"num_accepted: expected shape \(2,\), got \(3,\)": np.zeros(B + 1, np.int64),
        r"branch_token_ids: expected shape \(2, 4, 2, 3\), got \(2, 4, 1, 3\)": np.zeros(
            (B, K + 1, 1, 3), np.int64
        ),
    },
}
TYPES: dict[str, Table] = {
    "tree_speculative_verify": {
        "max_depth: expected an integer, got float": 1.0,
    },
    "lantern_relaxed_accept": {
        "neighbors: expected dtype int32, got int64": NEAR.astype(np.int64),
        "k: expected an integer, got float": 1.5,
        "delta: expected a number >= 0, got NoneType": None,
    },
    "typical_accept": {
        "alpha: expected a number >= 0, got str": "x",
    },
    "top_logprobs": {
        "k: expected an integer, got NoneType": None,
    },
    "entropy_adaptive_temperature": {
        "median: expected a number, got str": "x",
    },
    "mirror_sd_branch_reuse": {
        "num_accepted: expected dtype int64, got int32": np.zeros(B, np.int32),
        "branch_root_ids: expected dtype int64, got int32": np.zeros((B, K + 1, 2), np.int32),
    },
}


@pytest.mark.parametrize("op", VALUES)
def test_specific(op: str) -> None:
    for row in each(VALUES[op], TYPES.get(op, {})):
        text, changes, kind = row.values
        refused(op, kind, rf"^\[{op}\] {text}", changes)


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
