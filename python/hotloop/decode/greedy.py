# SPDX-License-Identifier: Apache-2.0
"""Greedy acceptance of drafted chains and of candidate paths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..front import arrays, check
from ..front.impl import Impl
from ..reference.decode.law import Logits
from ..reference.decode.results import Verified, VerifiedPaths
from ..vocabulary import like
from .speculative import chain_speculative_sampling, verify
from .typical import verify_paths


@like(chain_speculative_sampling)
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
        impl: "auto", "cuda" (chains), "cpu" or "reference".

    Returns:
        ``Verified`` for chains, ``VerifiedPaths`` for paths.

    Raises:
        TypeError, ValueError: an array of another dtype, shape, library or device. With HOTLOOP_CHECK=1 also NaN or
            +inf logits, and ids out of range.

    Examples:
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
    check.array(op, "draft_token_ids", draft_token_ids, arrays.INTEGERS, 2, 3)
    if draft_token_ids.ndim == 3:
        return verify_paths(op, draft_token_ids, law, num_draft_tokens, impl)
    return verify(op, (draft_token_ids, law, None, num_draft_tokens, 0, 0), impl)
