# SPDX-License-Identifier: Apache-2.0
"""Verification of drafted trees."""

from __future__ import annotations

from typing import Any

from ..front import arrays
from ..front.impl import Impl
from ..reference.decode.results import VerifiedTree
from ..vocabulary import like
from . import _loops
from .speculative import chain_speculative_sampling


@like(chain_speculative_sampling)
def tree_speculative_verify(
    draft_token_ids: Any,
    parents: Any,
    target_probs: Any,
    draft_probs: Any = None,
    *,
    replacement: bool = False,
    num_nodes: Any = None,
    max_depth: int | None = None,
    seed: Any = None,
    offset: Any = 0,
    impl: Impl = "auto",
) -> VerifiedTree:
    """Verify a drafted tree; what is emitted follows the target's law exactly.

    From the root down, the children of the node reached are tried in the order of their index against the law p there.
    Children the draft chose without chance (``draft_probs`` None): child x is accepted if u <= p(x) of the law without
    the siblings tried before. Children drawn from q: accepted if u q(x) <= p(x); a rejection turns p into
    max(p - q, 0), renormalised, and, drawn without replacement, takes x out of q. If none is accepted one token of what
    is left of p is emitted, after a leaf one of its own law. Only rows of nodes on the path are read, and nothing of
    the size of the tree times the vocabulary is stored: after any number of rejections the law is max(p - a q, 0) / z.

    Args:
        draft_token_ids: (B, M), int32 or int64: the token of each node. M may be 0.
        parents: (B, M), int32 or int64: index of the node's parent, less than its own, or -1 for the root.
        target_probs: (B, M+1, V): row 0 is the law at the root, row j+1 the one after node j. Probabilities, ``Logits``
            or ``Probs``.
        draft_probs: (B, M+1, V), row by parent as in ``target_probs``: the law the node's children were drawn from;
            None for children chosen without chance (the k most likely, say; equal siblings count once).
        replacement: whether the children of a node were drawn independently, so that they may repeat. Default False.
        num_nodes: (B,) nodes of each tree; None for M.
        max_depth: longest path to look at, 0 to M; sizes the output. None for M.

    Returns:
        ``VerifiedTree``: ``output_token_ids`` (B, D+1), ``accepted_nodes`` (B, D), ``num_accepted`` (B,), ``logprobs``
        (B, D+1), ``rows_read`` (B,), D = max_depth.

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device. With HOTLOOP_CHECK=1 also a child
            that does not come after its parent, rows that are no law, and ids out of range; without, such nodes are
            never reached.

    Examples:
        >>> p = np.eye(4)[[[1, 2, 0, 3]]]
        >>> done = tree_speculative_verify(np.array([[0, 1, 2]]), np.array([[-1, -1, 1]]), p)
        >>> done.output_token_ids.tolist(), done.accepted_nodes.tolist()
        ([[1, 0, -1, -1]], [[1, -1, -1]])

    Reference:
        Miao et al. 2024 (SpecInfer), arXiv:2305.09781, multi-step speculative sampling; Li et al. 2024 (EAGLE-2),
        arXiv:2406.16858, for children chosen without chance.
    """
    drafted = (draft_token_ids, target_probs, draft_probs, num_nodes, seed, offset)
    arguments = (drafted, parents, replacement, max_depth, impl)
    if arrays.compiling():
        from . import operators

        return operators.tree(*arguments)
    return _loops.tree(*arguments)
