# SPDX-License-Identifier: Apache-2.0
"""Verification of drafted chains: token by token, by block, and of streams."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..front import arrays, check
from ..front.impl import Impl
from ..reference.decode.results import Verified
from ..vocabulary import like
from . import _loops
from ._call import Drafted
from .law import check_law


def chain_speculative_sampling(
    draft_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    *,
    num_draft_tokens: Any = None,
    seed: Any = None,
    offset: Any = 0,
    impl: Impl = "auto",
) -> Verified:
    """Verify a drafted chain token by token; what is emitted follows the target's law exactly.

    Draft token x_i is accepted if u_i q_i(x_i) <= p_i(x_i), u_i uniform in (0, 1]; at the first rejection one token of
    max(p_i - q_i, 0), renormalised, is emitted instead, and after the last acceptance one of the row that follows. Rows
    of the target are read in order and none after the first rejection.

    Args:
        draft_probs: the laws q the draft tokens were drawn from: probabilities (B, K, V), or ``Logits`` / ``Probs``
            around such an array (the same temperature and truncation the draft sampled with). None: the draft was
            certain of its tokens (greedy drafts, n-gram look-up).
        draft_token_ids: (B, K), int32 or int64; K may be 0.
        target_probs: the laws p, (B, K+1, V): probabilities, ``Logits`` or ``Probs``. Row K follows the whole draft.
        num_draft_tokens: (B,) draft tokens of each request, 0 to K; None for K.
        seed: as in ``sample``: None for new draws in every call, an integer for all requests, (B,) int64, one for
            each, or a generator. Default None.
        offset: tokens the request has emitted so far, an integer or (B,) int64: draws belong to positions. Default 0.
            A loop that passes the same seed has to count it on: at equal offsets it meets equal uniforms.
        impl: "auto", "cuda", "cpu" or "reference".

    Returns:
        ``Verified``: ``output_token_ids`` (B, K+1) of the dtype of ``draft_token_ids`` padded with -1, ``num_accepted``
        (B,), ``logprobs`` (B, K+1), ``rows_read`` (B,). A row without a law (no finite logit) emits nothing.

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device, a number among the probabilities
            read that is none (raw logits, say). With HOTLOOP_CHECK=1 also NaN or +inf logits, rows that are no law,
            and ids out of range.
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import numpy as np
        >>> p = np.full((1, 3, 4), 0.25)
        >>> done = chain_speculative_sampling(p[:, :2], np.array([[1, 3]]), p, seed=7)
        >>> done.output_token_ids[:, :2].tolist(), done.num_accepted.tolist()
        ([[1, 3]], [2])

    Reference:
        Leviathan et al. 2023, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318. u is in (0, 1], so
        that a token of target probability 0 is never accepted and p = q always is.
    """
    drafted = (draft_token_ids, target_probs, draft_probs, num_draft_tokens, seed, offset)
    return verify("chain_speculative_sampling", drafted, impl)


@like(chain_speculative_sampling)
def block_speculative_sampling(
    draft_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    *,
    num_draft_tokens: Any = None,
    seed: Any = None,
    offset: Any = 0,
    impl: Impl = "auto",
) -> Verified:
    """Verify a drafted chain as a block: the same law as token by token, and at least as many tokens on average.

    r_0 = 1, r_i = min(1, r_{i-1} p_{i-1}(x_i) / q_{i-1}(x_i)), i = 1..K. A prefix of i tokens passes if u_i <= h_i,
    h_K = r_K, h_i = s_i / (s_i + 1 - r_i) with s_i = sum_v max(r_i p_i(v) - q_i(v), 0) for i < K. The longest prefix
    that passes is kept; the token after it is drawn from max(r_i p_i - q_i, 0), renormalised, or p_K after all K.
    All rows up to the first of r_i = 0 are read, for a later prefix may pass though an earlier one fails.

    Args:
        offset: a count that no earlier call of the request has reached: advance it by K + 1 per call whatever was
            accepted, for the draft's ``sample`` too. Not the number of tokens emitted: what is decided here depends on
            draws beyond the last token emitted, and meeting them again would bend the law. Default 0.

    Examples:
        >>> p = np.full((1, 3, 4), 0.25)
        >>> block_speculative_sampling(p[:, :2], np.array([[1, 3]]), p).num_accepted.tolist()
        [2]

    Reference:
        Sun et al. 2024, "Block Verification Accelerates Speculative Decoding", arXiv:2403.10444, algorithm 2.
    """
    drafted = (draft_token_ids, target_probs, draft_probs, num_draft_tokens, seed, offset)
    return verify("block_speculative_sampling", drafted, impl)


@like(chain_speculative_sampling)
def speculative_streaming_verify(
    stream_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    *,
    num_draft_tokens: Any = None,
    seed: Any = None,
    offset: Any = 0,
    impl: Impl = "auto",
) -> Verified:
    """Verify a window drafted by several streams per draft step; the law is the target's, exactly.

    A draft step emits S tokens, each from the law of its own stream; steps follow each other: token i of the window
    came from stream i mod S of step i // S. Each is verified against the law it was drawn from, which need not know the
    tokens of its own step: that costs acceptance, never exactness.

    Args:
        stream_probs: (B, steps, S, V) probabilities, ``Logits`` or ``Probs``, with steps * S >= K; what lies beyond K
            is not read.

    Examples:
        >>> p = np.full((1, 4, 5), 0.2)
        >>> streams = np.full((1, 2, 2, 5), 0.2)
        >>> speculative_streaming_verify(streams, np.array([[0, 1, 2]]), p).num_accepted.tolist()
        [3]

    Reference:
        Bhendawade et al. 2025, "Mirror Speculative Decoding", arXiv:2510.13161; the acceptance rule is that of
        arXiv:2211.17192 position by position (derived: the lemma never uses how q was conditioned).
    """
    op = "speculative_streaming_verify"
    law = check_law(op, "stream_probs", stream_probs, 4)
    ids = check.array(op, "draft_token_ids", draft_token_ids, arrays.INTEGERS, 2)
    batch, steps, streams, vocabulary = law.values.shape
    k = int(ids.shape[1])
    if steps * streams < k:
        raise ValueError(
            f"[{op}] stream_probs: expected at least {k} tokens in steps * S, got shape {tuple(law.values.shape)}."
        )

    def merged(x: Any) -> Any:
        return x.reshape(batch, steps * streams, vocabulary)[:, :k]

    parts = {"values": merged(law.values)}
    if getattr(law, "reference", None) is not None:
        parts["reference"] = merged(law.reference)  # type: ignore[union-attr]
    draft = replace(law, **parts)
    drafted = (ids, target_probs, draft, num_draft_tokens, seed, offset)
    return verify(op, drafted, impl, {"stream_probs": law})


def verify(op: str, drafted: Drafted, impl: Impl, named: dict[str, Any] | None = None) -> Verified:
    """Run a chain: as an operator where torch.compile traces."""
    if arrays.compiling():
        from . import operators

        return operators.chain(op, drafted, impl)
    return _loops.chain(op, drafted, impl, named)
