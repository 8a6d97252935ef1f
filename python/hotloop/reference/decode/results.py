# SPDX-License-Identifier: Apache-2.0
"""Results of the ops of this room, and the states that searches keep between steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ...front import arrays, check
from ...front.check import integer, number


class Verified(NamedTuple):
    """A verified draft.

    ``output_token_ids`` (B, K+1): the accepted tokens, then one token of the target's own, then -1.
    ``num_accepted`` (B,) int64: how many draft tokens were accepted; ``num_accepted + 1`` tokens are emitted, or
    ``num_accepted`` where the next row had no law.
    ``logprobs`` (B, K+1) float32: log-probability of each emitted token under the target's law, nats; 0 after them.
    ``rows_read`` (B,) int64: how many rows of the target were looked at.
    """

    output_token_ids: Any
    num_accepted: Any
    logprobs: Any
    rows_read: Any


class VerifiedTree(NamedTuple):
    """A verified tree: ``Verified`` with the path.

    ``output_token_ids`` (B, D+1): tokens of the accepted path, then one token of the target's own, then -1.
    ``accepted_nodes`` (B, D) int64: nodes of the path from the root down, then -1: which rows of a cache to keep.
    ``num_accepted``, ``logprobs``, ``rows_read``: as in ``Verified``.
    """

    output_token_ids: Any
    accepted_nodes: Any
    num_accepted: Any
    logprobs: Any
    rows_read: Any


class VerifiedPaths(NamedTuple):
    """The best of several candidate paths.

    ``output_token_ids`` (B, n+1): the accepted tokens of the best path, then the target's next token, then -1.
    ``best_path`` (B,) int64; ``num_accepted`` (B,) int64; ``rows_read`` (B,) int64, over all paths.
    """

    output_token_ids: Any
    best_path: Any
    num_accepted: Any
    rows_read: Any


class VerifiedRelaxed(NamedTuple):
    """``Verified`` of a relaxed acceptance.

    ``relaxation`` (B, K) float32: by how much the law of each visited position was moved, in total variation; 0 where
    nothing was moved or read.
    """

    output_token_ids: Any
    num_accepted: Any
    logprobs: Any
    rows_read: Any
    relaxation: Any


class Sampled(NamedTuple):
    """``token_ids`` (...,) int64, -1 where a row has no law; ``logprobs`` (...,) float32 under the law sampled from."""

    token_ids: Any
    logprobs: Any


class BranchReuse(NamedTuple):
    """``reused`` (B,) bool; ``branch`` (B,) int64, -1 for none; ``next_token_ids`` (B, gamma'), -1 where not reused."""

    reused: Any
    branch: Any
    next_token_ids: Any


class TopLogprobs(NamedTuple):
    """The k most likely tokens of each row, largest first: ``token_ids`` (..., k) int64, ``logprobs`` (..., k) float32.

    -1 and -inf where the law has fewer tokens.
    """

    token_ids: Any
    logprobs: Any


class Beams(NamedTuple):
    """Sequences, best first: ``token_ids`` (B, k, t) padded with -1, ``scores`` (B, k), ``lengths`` (B, k).

    An empty slot has the score -inf and the length -1.
    """

    token_ids: Any
    scores: Any
    lengths: Any


class BeamState(NamedTuple):
    """A beam search between two steps: k live and k finished beams for each of B requests, after t tokens.

    ``scores`` (B, k) float64, live beams, largest first; -inf for an empty slot. ``token_ids`` (B, k, t) int64.
    ``beam_indices`` (B, k) int64: the beam that each came from, by which to reorder a cache; ``next_token_ids`` (B, k)
    int64: what to feed. An empty slot holds beam 0 and token 0, so that both can be used without a mask.
    ``finished_scores`` (B, k), ``finished_token_ids`` (B, k, t) padded with -1, ``finished_lengths`` (B, k), -1 where
    empty. ``done`` (B,) bool: no live beam can still enter the finished ones.
    """

    scores: Any
    token_ids: Any
    beam_indices: Any
    next_token_ids: Any
    finished_scores: Any
    finished_token_ids: Any
    finished_lengths: Any
    done: Any

    @classmethod
    def start(cls, batch: int, num_beams: int = 5, *, like: Any = None) -> BeamState:
        """Return the state before the first token: one live beam of score 0, in an array kind like ``like``."""
        op = "likelihood_beam_search"
        b = integer(op, "batch", batch, at_least=0)
        k = integer(op, "num_beams", num_beams, at_least=1)
        like = np.empty(0) if like is None else like
        check.kind(op, "like", like)
        scores = np.full((b, k), -np.inf)
        scores[:, 0] = 0.0
        none, zeros = np.full((b, k), -1, np.int64), np.zeros((b, k), np.int64)
        tokens = np.empty((b, k, 0), np.int64)
        worst = np.full((b, k), -np.inf)
        parts = (scores, tokens, zeros, zeros.copy(), worst, tokens.copy(), none, np.zeros(b, bool))
        return cls(*(arrays.from_numpy(x, like) for x in parts))

    def best(self) -> Beams:
        """Return the k best of the finished and the live beams: the answer where the search ends."""
        parts = [arrays.to_numpy(x) for x in self]
        scores = np.concatenate((parts[4], parts[0]), axis=1)
        tokens = np.concatenate((parts[5], parts[1]), axis=1)
        live = np.where(parts[0] > -np.inf, parts[1].shape[2], -1)
        lengths = np.concatenate((parts[6], live), axis=1)
        order = np.argsort(-scores, axis=1, kind="stable")[:, : parts[0].shape[1]]
        found = (
            np.take_along_axis(tokens, order[:, :, None], axis=1),
            np.take_along_axis(scores, order, axis=1),
            np.take_along_axis(lengths, order, axis=1),
        )
        return Beams(*(arrays.from_numpy(x, self.scores) for x in found))


class StarTree(NamedTuple):
    """B trees of M slots: ``parents`` (B, M) integers, ``values`` (B, M) floats, ``visits`` (B, M) integers.

    Node 0 is the root. A parent has a lower index than its children; -1 marks the root and slots not in use. Append
    a child by writing its parent, its value and 0 visits.
    """

    parents: Any
    values: Any
    visits: Any


class StarStep(NamedTuple):
    """``nodes`` (B,) int64: where the descent ended, -1 for none; ``depths`` (B,) int64; ``ended`` (B,) bool."""

    nodes: Any
    depths: Any
    ended: Any


class PuctTree(NamedTuple):
    """B trees of M slots, all (B, M): ``parents``, ``visits``, ``lengths`` integers; the others floats.

    ``q``, ``v``: Q and V of the formula; ``values``: the model's value of a node; ``logps``: summed log-probability of
    a node's tokens given its parent, nats; ``lengths``: how many tokens. Node 0 is the root. A parent has a lower index
    than its children; -1 marks the root and slots not in use. Append a child by writing its parent, value, logp and
    length, with 0 visits, v = 0 and q = v of its parent + its value - its parent's value.
    """

    parents: Any
    q: Any
    v: Any
    visits: Any
    values: Any
    logps: Any
    lengths: Any


class PuctStep(NamedTuple):
    """``nodes`` (B,) int64: where the descent ended, -1 for none; ``depths`` (B,) int64."""

    nodes: Any
    depths: Any


class BacktrackState(NamedTuple):
    """Counters of B answers: ``local_attempts``, ``total_attempts`` (B,) int64, ``temperatures`` (B,) float64 to sample
    with, ``correcting`` and ``done`` (B,) bool."""

    local_attempts: Any
    total_attempts: Any
    temperatures: Any
    correcting: Any
    done: Any

    @classmethod
    def start(cls, batch: int, *, temperature: float = 1.0, like: Any = None) -> BacktrackState:
        """Return the counters before the first chunk, in an array kind like ``like`` (NumPy by default)."""
        op = "retrospective_backtrack"
        b = integer(op, "batch", batch, at_least=0)
        t = number(op, "temperature", temperature, at_least=0)
        like = np.empty(0) if like is None else like
        check.kind(op, "like", like)
        parts = (
            np.zeros(b, np.int64),
            np.zeros(b, np.int64),
            np.full(b, t),
            np.zeros(b, bool),
            np.zeros(b, bool),
        )
        return cls(*(arrays.from_numpy(x, like) for x in parts))


ACTIONS = {"none": -1, "accept": 0, "continue": 1, "resample": 2, "cut": 3, "stop": 4}
"""What ``retrospective_backtrack`` can decide."""


class Backtrack(NamedTuple):
    """``actions`` (B,) int64, see ``ACTIONS``; ``kept_lengths`` (B,) int64: tokens of the answer, prefix included, to
    keep; ``flagged`` (B,) int64: the unconfident phrase, -1 for none; ``state``: the counters after it."""

    actions: Any
    kept_lengths: Any
    flagged: Any
    state: BacktrackState
