# SPDX-License-Identifier: Apache-2.0
"""LANTERN: relaxed acceptance for image tokens, whose neighbours in the codebook look alike."""

from __future__ import annotations

from typing import Any

from ..front import arrays, check, environment, native
from ..front.check import integer
from ..front.impl import Impl, choose
from ..reference.decode import lantern as _reference
from ..reference.decode.results import VerifiedRelaxed
from ..vocabulary import like
from . import _call
from .law import check_ids, naming, pack, pack_draft, refuse_probabilities
from .speculative import chain_speculative_sampling


@like(chain_speculative_sampling)
def lantern_relaxed_accept(
    draft_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    neighbors: Any,
    *,
    k: int = 1000,
    delta: float = 0.1,
    num_draft_tokens: Any = None,
    seed: Any = None,
    offset: Any = 0,
    impl: Impl = "auto",
) -> VerifiedRelaxed:
    """Verify a drafted chain where a token may borrow its nearest neighbours' mass. Not lossless; the bound is below.

    C_j = sum of p over the j nearest neighbours of x; j* = number of j <= k with C_j <= B, B = delta, or
    (delta - 1) p(x) for delta > 1 (LANTERN++). x is accepted if u q(x) <= p(x) + C_j*. Moving that mass onto x changes
    p by C_j* <= B in total variation: what is returned as ``relaxation``.

    How far the law of what is emitted moves, per position and in total variation, delta alone does not say, since on a
    rejection the authors' rule favours (drawn drafts) or forbids (certain ones) the k + 1 nearest neighbours N of x.
    Drawn drafts: at most A + S, A = sum_x [min(q, p + C_j*) - min(q, p)](x) over p(x) > 0 the additional acceptance, S
    the mean draft mass of the neighbours spared at a rejection. Certain drafts: at most p(N).

    Differs from the authors' code where no mass is left after a rejection (it then samples uniformly, this from p),
    where only neighbours without mass were near enough (they are then not spared: delta = 0 is exact), and in that a
    token with p(x) = 0 is never accepted.

    Args:
        draft_probs: (B, K, V) as in ``chain_speculative_sampling``; None for deterministic drafts.
        target_probs: (B, K+1, V) as in ``chain_speculative_sampling``. At temperature 0 x is accepted if it is the
            argmax after borrowing, under the law at temperature 1.
        neighbors: (V, columns) int32, nearest first, without the token itself: ``vq_neighbor_table``.
        k: neighbours at most, >= 0. Default 1000.
        delta: bound on the total variation per position, or a factor above 1, >= 0; the paper sweeps 0.05 to 0.4.
            Default 0.1. 0 gives ``chain_speculative_sampling``.
        impl: "auto", "cpu" or "reference".

    Returns:
        ``VerifiedRelaxed``: as ``Verified``, and ``relaxation`` (B, K): C_j* of each position visited.

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device, a number out of range. With
            HOTLOOP_CHECK=1 also rows that are no law, and ids out of range.

    Examples:
        >>> p, q = np.array([[[0.5, 0.5, 0.0]] * 2]), np.array([[[1.0, 0.0, 0.0]]])
        >>> near = np.array([[1, 2], [0, 2], [1, 0]], np.int32)
        >>> done = lantern_relaxed_accept(q, np.array([[0]]), p, near, delta=0.6)
        >>> done.num_accepted.tolist(), done.relaxation.tolist()
        ([1], [[0.5]])

    Reference:
        Jang et al. 2024 (LANTERN), arXiv:2410.03355, and its evaluate_posterior; LANTERN++, arXiv:2502.06352, for
        delta > 1.
    """
    op = "lantern_relaxed_accept"
    drafted = (draft_token_ids, target_probs, draft_probs, num_draft_tokens, seed, offset)
    ids, target, draft = _call.check_drafted(op, drafted)
    batch, width = map(int, ids.shape)
    vocabulary = int(target.values.shape[2])
    near = check.array(op, "neighbors", neighbors, ("int32",), 2)
    check.same_place(op, "neighbors", near, "target_probs", target.values)
    check.shape(op, "neighbors", near, (vocabulary, int(near.shape[1])), "for that vocabulary")
    k = min(integer(op, "k", k, at_least=0), vocabulary)
    check.number(op, "delta", delta, at_least=0.0)
    if environment.checks_on():
        check_ids(op, "neighbors", near, vocabulary)
    if choose(op, impl, "target_probs", target.values) == "reference":
        with naming(op, target_probs=target, draft_probs=draft):
            return _reference.lantern_relaxed_accept(
                draft,
                ids,
                target,
                near,
                k=k,
                delta=delta,
                num_draft_tokens=num_draft_tokens,
                seed=seed,
                offset=offset,
            )
    outputs = _call.verified_like(ids, batch, width + 1)
    moved = arrays.empty(ids, (batch, width), "float32")
    if native.core.decode.lantern(
        batch,
        width,
        arrays.unit_stride(ids),
        pack(target),
        pack_draft(draft),
        arrays.unit_stride(near),
        k,
        float(delta),
        _call.packed_lengths(num_draft_tokens, width),
        *_call.packed_stream(seed, offset, batch, ids),
        tuple(outputs),
        moved,
    ):
        refuse_probabilities(op, target_probs=target, draft_probs=draft)
    return VerifiedRelaxed(*outputs, moved)
