# SPDX-License-Identifier: Apache-2.0
"""LANTERN's relaxed acceptance, position by position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...front import arrays
from .draws import VERIFICATION, Row, number, residual
from .law import Law, Logits, as_law
from .results import VerifiedRelaxed
from .speculative import Emitted, pick_left_over, requests


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
) -> VerifiedRelaxed:
    target, draft = as_law(target_probs), None if draft_probs is None else as_law(draft_probs)
    ids, near = arrays.to_numpy(draft_token_ids), arrays.to_numpy(neighbors)
    batch, width = ids.shape
    out = Emitted(draft_token_ids, batch, width + 1)
    moved = np.zeros((batch, width), np.float32)
    for b, stream, n in requests(draft_token_ids, num_draft_tokens, seed, offset):
        greedy = isinstance(target, Logits) and not number(target.temperature, b) > 0
        law: Law = target
        if isinstance(target, Logits) and greedy:
            law = replace(target, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        for i in range(n + 1):
            p = Row(law, b, (b, i))
            out.rows_read[b] += 1
            if not p.valid:
                break
            accept, u = stream.draw(i, VERIFICATION)
            if i == n:
                out.put(b, i, p.best if greedy else p.pick(u), p)
                break
            token = int(ids[b, i])
            known = 0 <= token < p.p.size
            p_token = p.probability(token)
            mass = 0.0
            bound = delta if delta <= 1 else (delta - 1.0) * p_token
            for v in near[token][:k] if known else ():
                if mass + p.probability(int(v)) > bound:
                    break
                mass += p.probability(int(v))
            moved[b, i] = mass
            relaxed = p_token + mass
            if greedy:
                best = p.probability(p.best)
                fine = token == p.best or (
                    p_token > 0 and (relaxed > best or (relaxed == best and token < p.best))
                )
            else:
                q = None if draft is None else Row(draft, b, (b, i))
                q_token = float(known) if q is None else q.probability(token)
                fine = p_token > 0 and accept * q_token <= relaxed
            if fine:
                out.put(b, i, token, p)
                out.accepted[b] += 1
                continue
            if greedy:
                out.put(b, i, p.best, p)
                break
            # As in the authors' code one neighbour more is spared here than was counted above.
            spared = near[token][: k + 1] if mass > 0 else near[:0].reshape(-1)
            left = residual(1.0, p.p, 1.0, q.p) if q is not None else residual(1.0, p.p, 0.0, 0.0)
            whole = residual(1.0, p.p, 0.0, 0.0)
            for v in spared:
                if 0 <= v < left.size:
                    left[v] = whole[v] if q is not None else 0
            if q is None and known:
                left[token] = 0
            out.put(b, i, pick_left_over(left, p, u), p)
            break
    done = out.result()
    return VerifiedRelaxed(*done, arrays.from_numpy(moved, draft_token_ids))
