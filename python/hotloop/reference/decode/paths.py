# SPDX-License-Identifier: Apache-2.0
"""Greedy and typical acceptance over candidate paths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...front import arrays
from .draws import VERIFICATION, Row, Stream, drawn, number
from .law import Law, Logits, as_law
from .results import Verified, VerifiedPaths
from .speculative import Emitted, drafted


def greedy_speculative_accept(
    draft_token_ids: Any, target_logits: Any, *, num_draft_tokens: Any = None
) -> Verified | VerifiedPaths:
    law = target_logits if isinstance(target_logits, Logits) else Logits(target_logits)
    run = greedy_chain if draft_token_ids.ndim == 2 else greedy_paths
    return run(draft_token_ids, replace(law, temperature=0.0), num_draft_tokens)


def greedy_chain(draft_token_ids: Any, law: Law, num_draft_tokens: Any) -> Verified:
    ids = arrays.to_numpy(draft_token_ids)
    out = Emitted(draft_token_ids, ids.shape[0], ids.shape[1] + 1)
    for b in range(ids.shape[0]):
        n = drafted(num_draft_tokens, b, ids.shape[1])
        for i in range(n + 1):
            row = Row(law, b, (b, i))
            out.rows_read[b] += 1
            if not row.valid:
                break
            out.put(b, i, row.best, row)
            if i == n or ids[b, i] != row.best:
                break
            out.accepted[b] += 1
    return out.result()


def greedy_paths(draft_token_ids: Any, law: Law, num_draft_tokens: Any) -> VerifiedPaths:
    return _best_path(
        draft_token_ids,
        law,
        num_draft_tokens,
        lambda b, row, token: (token == row.best, 0.0),
        lambda b, row, position: row.best,
    )


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
) -> VerifiedPaths:
    law = as_law(target_logits)
    whole = replace(law, top_k=0, top_p=1.0, min_p=0.0)
    seed = drawn(seed, int(draft_token_ids.shape[0]), draft_token_ids)

    def accept(b: int, row: Row, token: int) -> tuple[bool, float]:
        p = row.probability(token)
        if entropy_eps > 0:
            entropy = float(-(row.p * np.log(row.p + entropy_eps)).sum())
        else:
            entropy = row.entropy if number(getattr(law, "temperature", 1.0), b) > 0 else 0.0
        return p > min(epsilon, alpha * np.exp(-entropy)), np.log(p) if p > 0 else -np.inf

    def next_token(b: int, row: tuple[int, ...], position: int) -> int:
        return Row(law, b, row).pick(Stream(seed, offset, b).draw(position, VERIFICATION)[1])

    return _best_path(draft_token_ids, whole, num_draft_tokens, accept, next_token, by_index=True)


def _best_path(
    draft_token_ids: Any,
    law: Any,
    num_draft_tokens: Any,
    accept: Any,
    next_token: Any,
    by_index: bool = False,
) -> VerifiedPaths:
    """The longest accepted path; among equals the largest sum of scores, then the first."""
    ids = arrays.to_numpy(draft_token_ids)
    batch, paths, width = ids.shape
    out = np.full((batch, width), -1, ids.dtype)
    best, length, read = (np.zeros(batch, np.int64) for _ in range(3))
    for b in range(batch):
        n = drafted(num_draft_tokens, b, width - 1)
        top = (-1, -np.inf)
        for path in range(paths):
            score, accepted = 0.0, 0
            while accepted < n:
                row = Row(law, b, (b, path, accepted))
                read[b] += 1
                fine, log_p = (
                    accept(b, row, int(ids[b, path, accepted + 1])) if row.valid else (False, 0.0)
                )
                if not fine:
                    break
                score += log_p
                accepted += 1
            if accepted > top[0] or (accepted == top[0] and accepted > 0 and score > top[1]):
                top = (accepted, score)
                best[b], length[b] = path, accepted
        if paths == 0:
            continue
        at = int(length[b])
        out[b, :at] = ids[b, best[b], 1 : at + 1]
        index = (b, int(best[b]), at)
        row = Row(law, b, index)
        read[b] += 1
        if row.valid:
            out[b, at] = next_token(b, index if by_index else row, at)
    return VerifiedPaths(
        *(arrays.from_numpy(x, draft_token_ids) for x in (out, best, length, read))
    )
