"""Verification of drafted trees and of candidate paths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..front import arrays, check, environment, native
from ..front.check import integer, number
from ..front.impl import Impl, choose
from ..reference.decode import paths as _reference_paths
from ..reference.decode import tree as _reference_tree
from . import _call
from ._law import Law, Logits, check_ids, check_law, naming, pack, refuse_probabilities
from ._results import Verified, VerifiedPaths, VerifiedTree
from .speculative import verified_like


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
        seed, offset, impl: as in ``chain_speculative_sampling``.

    Returns:
        ``VerifiedTree``: ``output_token_ids`` (B, D+1), ``accepted_nodes`` (B, D), ``num_accepted`` (B,), ``logprobs``
        (B, D+1), ``rows_read`` (B,), D = max_depth.

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device. With HOTLOOP_CHECK=1 also a child
            that does not come after its parent, rows that are no law, and ids out of range; without, such nodes are
            never reached.
        NotImplementedError: a forced ``impl`` that cannot run.

    Example:
        >>> import numpy as np
        >>> p = np.eye(4)[[[1, 2, 0, 3]]]
        >>> done = tree_speculative_verify(np.array([[0, 1, 2]]), np.array([[-1, -1, 1]]), p)
        >>> done.output_token_ids.tolist(), done.accepted_nodes.tolist()
        ([[1, 0, -1, -1]], [[1, -1, -1]])

    Reference:
        Miao et al. 2024 (SpecInfer), arXiv:2305.09781, multi-step speculative sampling; Li et al. 2024 (EAGLE-2),
        arXiv:2406.16858, for children chosen without chance.
    """
    op = "tree_speculative_verify"
    if arrays.compiling():
        from . import _operators

        return _operators.tree(
            draft_token_ids,
            parents,
            target_probs,
            draft_probs,
            replacement,
            num_nodes,
            max_depth,
            seed,
            offset,
            impl,
        )
    target = check_law(op, "target_probs", target_probs, ("B", "M+1", "V"))
    ids = check.array(op, "draft_token_ids", draft_token_ids, arrays.INTEGERS, 2)
    check.same_place(op, "draft_token_ids", ids, "target_probs", target.values)
    check.array(op, "parents", parents, arrays.INTEGERS, 2)
    check.same_place(op, "parents", parents, "target_probs", target.values)
    batch, m = map(int, ids.shape)
    vocabulary = int(target.values.shape[2])
    check.shape(op, "parents", parents, (batch, m), "like draft_token_ids")
    check.shape(
        op, "target_probs", target.values, (batch, m + 1, vocabulary), "for that many nodes"
    )
    draft = None
    if draft_probs is not None:
        draft = check_law(op, "draft_probs", draft_probs, ("B", "M+1", "V"))
        _call.check_draft(op, draft, target, m + 1)
    _call.check_lengths(op, "num_nodes", num_nodes, batch, m, ids)
    depth = m if max_depth is None else integer(op, "max_depth", max_depth, at_least=0, at_most=m)
    _call.check_stream(op, seed, offset, batch, ids)
    if environment.checks_on():
        check_ids(op, "draft_token_ids", ids, vocabulary)
        _check_parents(op, parents, num_nodes)
    chosen = choose(op, impl, "target_probs", target.values, _call.WITH_CUDA)
    if chosen == "reference":
        with naming(op, target_probs=target, draft_probs=draft):
            return _reference_tree.tree_speculative_verify(
                ids,
                parents,
                target,
                draft,
                replacement=replacement,
                num_nodes=num_nodes,
                max_depth=depth,
                seed=seed,
                offset=offset,
            )
    outputs = verified_like(ids, batch, depth + 1)
    nodes = arrays.empty(ids, (batch, depth), "int64")
    arguments = (
        batch,
        m,
        depth,
        arrays.unit_stride(ids),
        arrays.dense(parents, "int64"),
        pack(target),
        None if draft is None else pack(draft),
        bool(replacement),
        _call.packed_lengths(num_nodes, m),
        *_call.packed_stream(seed, offset, batch, ids),
        tuple(outputs),
        nodes,
    )
    if chosen == "cuda":
        from . import _cuda

        _cuda.tree(outputs, target.values, *arguments)
    elif native.core.decode.tree(*arguments):
        refuse_probabilities(op, target_probs=target, draft_probs=draft)
    return VerifiedTree(outputs.output_token_ids, nodes, *outputs[1:])


def _check_parents(op: str, parents: Any, num_nodes: Any) -> None:
    x = arrays.to_numpy(parents)
    node = np.arange(x.shape[1])
    bad = (x < -1) | (x >= node)
    if num_nodes is not None:
        bad &= node < arrays.to_numpy(num_nodes)[:, None]
    check.refuse(
        op, "parents", x, bad, "-1 or an earlier node", "List every parent before its children; a tree has no cycle."
    )  # fmt: skip


def greedy_speculative_accept(
    draft_token_ids: Any,
    target_logits: Any,
    *,
    num_draft_tokens: Any = None,
    impl: Impl = "auto",
) -> Verified | VerifiedPaths:
    """Accept draft tokens as long as each is the target's most likely one: the output of plain greedy decoding.

    g_i = argmax_v z_i(v), lowest id among equals; NaN never wins. num_accepted = number of leading i with x_i = g_i;
    the output is g_0..g_num_accepted.

    Args:
        draft_token_ids: (B, K): one chain per request; or (B, P, K+1), int32 or int64: P candidate paths, each with
            the token before the draft first.
        target_logits: (B, K+1, V), or (B, P, K+1, V), where row i follows token i of the path; logits, or ``Logits``
            whose temperature and truncation do not matter here. For paths the longest accepted one is taken, the first
            among equals.
        num_draft_tokens: (B,) draft tokens of each request, 0 to K; None for K.
        impl: "auto", "cuda" (chains), "cpu" or "reference".

    Returns:
        ``Verified`` for chains, ``VerifiedPaths`` for paths.

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device. With HOTLOOP_CHECK=1 also NaN or
            +inf logits, and ids out of range.
        NotImplementedError: a forced ``impl`` that cannot run.

    Example:
        >>> import numpy as np
        >>> z = np.eye(3)[[[2, 1, 0]]]
        >>> greedy_speculative_accept(np.array([[2, 0]]), z).output_token_ids.tolist()
        [[2, 1, -1]]

    Reference:
        Stern et al. 2018, arXiv:1811.03115; Medusa and EAGLE evaluate_posterior at temperature 0 (Cai et al. 2024,
        arXiv:2401.10774).
    """
    op = "greedy_speculative_accept"
    law = target_logits if isinstance(target_logits, Logits) else Logits(target_logits)
    law = replace(law, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    if arrays.compiling() and draft_token_ids.ndim == 2:
        from . import _operators

        return _operators.chain(
            op, "greedy", None, draft_token_ids, law, num_draft_tokens, 0, 0, impl
        )
    check.array(op, "draft_token_ids", draft_token_ids, arrays.INTEGERS, 2, 3)
    if draft_token_ids.ndim == 3:
        return _paths(op, draft_token_ids, law, num_draft_tokens, impl, 0, 0)
    target = check_law(op, "target_logits", law, ("B", "K+1", "V"))
    ids = draft_token_ids
    batch, k = map(int, ids.shape)
    vocabulary = int(target.values.shape[2])
    check.same_place(op, "draft_token_ids", ids, "target_logits", target.values)
    check.shape(
        op, "target_logits", target.values, (batch, k + 1, vocabulary), "for that many draft tokens"
    )
    _call.check_lengths(op, "num_draft_tokens", num_draft_tokens, batch, k, ids)
    if environment.checks_on():
        check_ids(op, "draft_token_ids", ids, vocabulary)
    chosen = choose(op, impl, "target_logits", target.values, _call.WITH_CUDA)
    if chosen == "reference":
        done = _reference_paths.greedy_speculative_accept(
            ids, target, num_draft_tokens=num_draft_tokens
        )
        return done
    outputs = verified_like(ids, batch, k + 1)
    arguments = (
        False,
        batch,
        k,
        arrays.unit_stride(ids),
        pack(target),
        None,
        _call.packed_lengths(num_draft_tokens, k),
        0,
        0,
        tuple(outputs),
    )
    if chosen == "cuda":
        from . import _cuda

        _cuda.chain(outputs, target.values, *arguments)
    else:
        native.core.decode.chain(*arguments)
    return outputs


def typical_accept(
    draft_token_ids: Any,
    target_logits: Any,
    *,
    epsilon: float = 0.3,
    alpha: float = 0.09,
    entropy_eps: float = 0.0,
    num_draft_tokens: Any = None,
    seed: Any = None,
    offset: Any = 0,
    impl: Impl = "auto",
) -> VerifiedPaths:
    """Accept candidate tokens that are typical of the target. Not lossless: the output law is not the target's.

    Token x_{i+1} of a path is accepted if pi_i(x_{i+1}) > min(epsilon, alpha exp(-H_i)), pi_i the target's law after
    token i before truncation, H_i its entropy. The longest accepted path is kept; among equals of length > 0 the one
    with the largest sum of log pi, then the first. The token after it is sampled from the target's law there.

    Args:
        draft_token_ids: (B, P, K+1), int32 or int64: candidate paths, each with the token before the draft first.
        target_logits: (B, P, K+1, V), row i follows token i: ``Logits`` (Medusa's temperature is 0.7), ``Probs``, or a
            bare array, which is taken as probabilities.
        epsilon: largest threshold, in [0, 1]. Default 0.3.
        alpha: factor of exp(-H), >= 0; Medusa uses 0.3 * epsilon, its paper sqrt(epsilon). Default 0.09.
        entropy_eps: 0 for the exact entropy in one pass; Medusa's code takes log(pi + 1e-5) instead: pass 1e-5 to
            match it to the digit. Default 0.
        num_draft_tokens, seed, offset: as in ``chain_speculative_sampling``.
        impl: "auto", "cpu" or "reference".

    Returns:
        ``VerifiedPaths``: ``output_token_ids`` (B, K+1), ``best_path`` (B,), ``num_accepted`` (B,), ``rows_read`` (B,).

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device, a number out of range. With
            HOTLOOP_CHECK=1 also rows that are no law, and ids out of range.
        NotImplementedError: a forced ``impl`` that cannot run.

    Example:
        >>> import numpy as np
        >>> z = np.log(np.array([[[[0.1, 0.9], [0.2, 0.8]]]]))
        >>> typical_accept(np.array([[[0, 1]]]), Logits(z), seed=1).num_accepted.tolist()
        [1]

    Reference:
        Cai et al. 2024 (Medusa), arXiv:2401.10774, section 2.3.1 and medusa/model/utils.py evaluate_posterior.
    """
    op = "typical_accept"
    number(op, "epsilon", epsilon, at_least=0.0, at_most=1.0)
    check.number(op, "alpha", alpha, at_least=0.0)
    number(op, "entropy_eps", entropy_eps, at_least=0.0, at_most=1.0)
    check.array(op, "draft_token_ids", draft_token_ids, arrays.INTEGERS, 3)
    law = check_law(op, "target_logits", target_logits, ("B", "P", "K+1", "V"))
    numbers = (float(epsilon), float(alpha), float(entropy_eps))
    return _paths(op, draft_token_ids, law, num_draft_tokens, impl, seed, offset, numbers)


def _paths(
    op: str,
    ids: Any,
    law: Law,
    num_draft_tokens: Any,
    impl: Impl,
    seed: Any,
    offset: Any,
    typical: tuple[float, float, float] | None = None,
) -> VerifiedPaths:
    target = check_law(op, "target_logits", law, ("B", "P", "K+1", "V"))
    batch, paths, tokens = map(int, ids.shape)
    vocabulary = int(target.values.shape[3])
    check.same_place(op, "draft_token_ids", ids, "target_logits", target.values)
    if tokens < 1 or paths < 1:
        raise ValueError(
            f"[{op}] draft_token_ids: expected at least one path of at least one token, got shape {tuple(ids.shape)}."
        )
    check.shape(
        op, "target_logits", target.values, (batch, paths, tokens, vocabulary), "for those paths"
    )
    _call.check_lengths(op, "num_draft_tokens", num_draft_tokens, batch, tokens - 1, ids)
    _call.check_stream(op, seed, offset, batch, ids)
    if environment.checks_on():
        check_ids(op, "draft_token_ids", ids, vocabulary)
    chosen = choose(op, impl, "target_logits", target.values)
    if chosen == "reference":
        if typical is None:
            return _reference_paths.greedy_speculative_accept(
                ids, target, num_draft_tokens=num_draft_tokens
            )  # type: ignore[return-value]
        epsilon, alpha, entropy_eps = typical
        with naming(op, target_logits=target):
            return _reference_paths.typical_accept(
                ids,
                target,
                epsilon=epsilon,
                alpha=alpha,
                entropy_eps=entropy_eps,
                num_draft_tokens=num_draft_tokens,
                seed=seed,
                offset=offset,
            )
    wide = arrays.dense(ids, "int64")
    outputs = VerifiedPaths(
        arrays.empty(ids, (batch, tokens), "int64"),
        *(arrays.empty(ids, (batch,), "int64") for _ in range(3)),
    )
    if native.core.decode.paths(
        typical is not None,
        batch,
        paths,
        tokens - 1,
        wide,
        pack(target),
        *(typical or (0.0, 0.0, 0.0)),
        _call.packed_lengths(num_draft_tokens, tokens - 1),
        *_call.packed_stream(seed, offset, batch, ids),
        tuple(outputs),
    ):
        refuse_probabilities(op, target_logits=target)
    if arrays.dtype(ids) == "int32":
        return outputs._replace(output_token_ids=arrays.dense(outputs.output_token_ids, "int32"))
    return outputs
