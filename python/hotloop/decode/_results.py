"""What the ops of this room give back."""

from __future__ import annotations

from typing import Any, NamedTuple


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
