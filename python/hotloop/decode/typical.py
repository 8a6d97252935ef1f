# SPDX-License-Identifier: Apache-2.0
"""Acceptance over several candidate paths: the typical tokens of the target, and what greedy acceptance shares."""

from __future__ import annotations

from typing import Any

from ..front import arrays, check, environment, native
from ..front.impl import Impl, choose
from ..reference.decode import paths as reference
from ..reference.decode.results import VerifiedPaths
from ..vocabulary import like
from . import _call
from .law import check_ids, check_law, naming, pack, refuse_probabilities
from .speculative import chain_speculative_sampling


@like(chain_speculative_sampling)
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
        impl: "auto", "cpu" or "reference".

    Returns:
        ``VerifiedPaths``: ``output_token_ids`` (B, K+1), ``best_path`` (B,), ``num_accepted`` (B,), ``rows_read`` (B,).

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device, a number out of range. With
            HOTLOOP_CHECK=1 also rows that are no law, and ids out of range.

    Examples:
        >>> from hotloop.decode import Logits
        >>> z = np.log(np.array([[[[0.1, 0.9], [0.2, 0.8]]]]))
        >>> typical_accept(np.array([[[0, 1]]]), Logits(z), seed=1).num_accepted.tolist()
        [1]

    Reference:
        Cai et al. 2024 (Medusa), arXiv:2401.10774, section 2.3.1 and medusa/model/utils.py evaluate_posterior.
    """
    op = "typical_accept"
    numbers = {
        "epsilon": check.number(op, "epsilon", epsilon, at_least=0.0, at_most=1.0),
        "alpha": check.number(op, "alpha", alpha, at_least=0.0),
        "entropy_eps": check.number(op, "entropy_eps", entropy_eps, at_least=0.0, at_most=1.0),
    }
    check.array(op, "draft_token_ids", draft_token_ids, arrays.INTEGERS, 3)
    return verify_paths(
        op, draft_token_ids, target_logits, num_draft_tokens, impl, seed, offset, numbers
    )


def verify_paths(
    op: str,
    ids: Any,
    law: Any,
    num_draft_tokens: Any,
    impl: Impl,
    seed: Any = 0,
    offset: Any = 0,
    typical: dict[str, float] | None = None,
) -> VerifiedPaths:
    """Run over paths: greedy, or with the numbers of ``typical_accept``."""
    target = check_law(op, "target_logits", law, 4)
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
            return reference.greedy_paths(ids, target, num_draft_tokens)
        with naming(op, target_logits=target):
            return reference.typical_accept(
                ids, target, **typical, num_draft_tokens=num_draft_tokens, seed=seed, offset=offset
            )
    numbers = typical or {"epsilon": 0.0, "alpha": 0.0, "entropy_eps": 0.0}
    outputs = VerifiedPaths(
        arrays.empty(ids, (batch, tokens), "int64"),
        *(arrays.empty(ids, (batch,), "int64") for _ in range(3)),
    )
    if native.core.decode.paths(
        typical is not None,
        batch,
        paths,
        tokens - 1,
        arrays.dense(ids, "int64"),
        pack(target),
        numbers["epsilon"],
        numbers["alpha"],
        numbers["entropy_eps"],
        _call.packed_lengths(num_draft_tokens, tokens - 1),
        *_call.packed_stream(seed, offset, batch, ids),
        tuple(outputs),
    ):
        refuse_probabilities(op, target_logits=target)
    if arrays.dtype(ids) == "int32":
        return outputs._replace(output_token_ids=arrays.dense(outputs.output_token_ids, "int32"))
    return outputs
