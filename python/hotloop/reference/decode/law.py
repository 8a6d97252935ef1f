# SPDX-License-Identifier: Apache-2.0
"""The law of a row of numbers: probabilities as they are, or logits with temperature, truncation and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

FilterOrder = Literal["top_k_first", "joint"]
FILTER_ORDERS = ("top_k_first", "joint")
MAX_VOCABULARY = 2**21
"""Weights are multiples of 2^-42; so many of them add up exactly in 64 bits."""

PerRequest = Any
"""A number for all requests, or an array of shape (B,) with one for each."""


@dataclass(frozen=True)
class Probs:
    """Probabilities, optionally truncated. Passing a bare array means the same as ``Probs(array)``.

    Each of ``top_k``, ``top_p`` and ``min_p`` keeps the tokens whose value reaches a threshold; what all three keep is
    renormalised. Ties at a threshold are all kept. Without truncation a probability is taken as it was given, so a
    row that is only looked up is never read whole. A number below 0 or above 1, or NaN, among those that are read
    raises ValueError. On a GPU it does so only with HOTLOOP_CHECK=1, since the host does not wait for the loop;
    without, it counts as the nearer bound, and NaN as 0.

    Args:
        values: probabilities (..., V), float32, float64, float16 or bfloat16; rows sum to 1. Wrap logits in ``Logits``.
        top_k: keep the k largest; 0 for all. Number or (B,).
        top_p: keep the smallest set of largest tokens with at least this share of the mass, in (0, 1]. Number or (B,).
        min_p: keep tokens with at least this share of the largest probability, in [0, 1]. Number or (B,).
        filter_order: "top_k_first" takes top_p's share of what top_k kept, "joint" of the whole law.
    """

    values: Any
    top_k: PerRequest = 0
    top_p: PerRequest = 1.0
    min_p: PerRequest = 0.0
    filter_order: FilterOrder = "top_k_first"


@dataclass(frozen=True)
class Logits:
    """Logits and the law they stand for: softmax((values + bias) / temperature), then truncation as in ``Probs``.

    Args:
        values: logits (..., V), float32, float64, float16 or bfloat16; -inf removes a token. Rows may lie any distance
            apart.
        temperature: > 0, or 0 for the largest logit (lowest id among equals) with certainty. Number or (B,). Every
            temperature above 0 has a law; below 2.94e-39 float32 and half types take 2.94e-39 for it, float64 takes
            5.6e-309.
        top_k, top_p, min_p, filter_order: as in ``Probs``; a 0 or -1 for ``top_k`` keeps all.
        reference: logits of a second model, same shape: the law is that of (1 - mixture) * values + mixture *
            reference.
        mixture: weight of ``reference``, in [0, 1]. Default 0.5.
        bias_ids: token ids (B, n), int64, whose logits get ``bias`` added (value guidance, forbidden tokens); negative
            ids are skipped. The same for every row of a request.
        bias: (B, n), float32.
    """

    values: Any
    temperature: PerRequest = 1.0
    top_k: PerRequest = 0
    top_p: PerRequest = 1.0
    min_p: PerRequest = 0.0
    filter_order: FilterOrder = "top_k_first"
    reference: Any = None
    mixture: float = 0.5
    bias_ids: Any = None
    bias: Any = None


Law = Probs | Logits


def as_law(value: Any) -> Law:
    return value if isinstance(value, (Probs, Logits)) else Probs(value)


class NoProbability(ValueError):
    """Raised by the reference where it meets a number that is no probability."""


MOST_PROBABILITY = 1.001
"""Rounding may leave a probability a little above 1; see is_probability in csrc/decode/heads.hpp."""
