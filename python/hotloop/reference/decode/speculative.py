# SPDX-License-Identifier: Apache-2.0
"""Chain and block verification, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from ...front import arrays
from .draws import RESIDUAL_UNIT, VERIFICATION, Row, Stream, drawn, number, pick, residual
from .law import as_law
from .results import Verified


class Emitted:
    """The outputs of a verification, filled token by token."""

    def __init__(self, like: Any, batch: int, width: int) -> None:
        self.ids = np.full((batch, width), -1, arrays.dtype(like))
        self.accepted = np.zeros(batch, np.int64)
        self.logps = np.zeros((batch, width), np.float32)
        self.rows_read = np.zeros(batch, np.int64)
        self.like = like

    def put(self, b: int, at: int, token: int, law: Row) -> None:
        self.ids[b, at] = token
        self.logps[b, at] = law.logp(token) if token >= 0 else 0.0

    def result(self) -> Verified:
        return Verified(
            *(
                arrays.from_numpy(x, self.like)
                for x in (self.ids, self.accepted, self.logps, self.rows_read)
            )
        )


def left_over(a: float, p: Row, b: float, q: Row | None, token: int) -> np.ndarray:
    """What a rejection of ``token`` leaves, in units of 2^-51; q None means the draft was certain of it."""
    if q is not None:
        return residual(a, p.p, b, q.p)
    left = residual(a, p.p, 0.0, 0.0)
    if 0 <= token < left.size:
        left[token] = 0
    return left


def pick_left_over(left: np.ndarray, law: Row, u: float) -> int:
    mass = int(left.sum())
    # p <= q everywhere, but for rounding: nothing is left, and the target's own law is what remains.
    return pick(left, mass, u) if mass > 0 else law.pick(u)


def drafted(num_draft_tokens: Any, b: int, k: int) -> int:
    return k if num_draft_tokens is None else min(max(int(number(num_draft_tokens, b)), 0), k)


def requests(
    draft_token_ids: Any, lengths: Any, seed: Any, offset: Any
) -> Iterator[tuple[int, Stream, int]]:
    """(request, its draws, its number of draft tokens) of a batch."""
    batch, k = map(int, draft_token_ids.shape[:2])
    seed = drawn(seed, batch, draft_token_ids)
    for b in range(batch):
        yield b, Stream(seed, offset, b), drafted(lengths, b, k)


def chain_speculative_sampling(
    draft_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    *,
    num_draft_tokens: Any = None,
    seed: Any = None,
    offset: Any = 0,
) -> Verified:
    target, draft = as_law(target_probs), None if draft_probs is None else as_law(draft_probs)
    ids = arrays.to_numpy(draft_token_ids)
    out = Emitted(draft_token_ids, ids.shape[0], ids.shape[1] + 1)
    for b, stream, n in requests(draft_token_ids, num_draft_tokens, seed, offset):
        for i in range(n + 1):
            p = Row(target, b, (b, i))
            out.rows_read[b] += 1
            if not p.valid:
                break
            accept, u = stream.draw(i, VERIFICATION)
            if i == n:
                out.put(b, i, p.pick(u), p)
                break
            token = int(ids[b, i])
            q = None if draft is None else Row(draft, b, (b, i))
            certain = 1.0 if 0 <= token < p.p.size else 0.0
            q_token = certain if q is None else q.probability(token)
            if p.probability(token) > 0 and accept * q_token <= p.probability(token):
                out.put(b, i, token, p)
                out.accepted[b] += 1
                continue
            out.put(b, i, pick_left_over(left_over(1.0, p, 1.0, q, token), p, u), p)
            break
    return out.result()


def block_speculative_sampling(
    draft_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    *,
    num_draft_tokens: Any = None,
    seed: Any = None,
    offset: Any = 0,
) -> Verified:
    target, draft = as_law(target_probs), None if draft_probs is None else as_law(draft_probs)
    ids = arrays.to_numpy(draft_token_ids)
    out = Emitted(draft_token_ids, ids.shape[0], ids.shape[1] + 1)
    for b, stream, n in requests(draft_token_ids, num_draft_tokens, seed, offset):
        reach = [1.0]  # the weight that the draft's prefix keeps under the target
        p: list[Row] = []
        q: list[Row | None] = []
        for i in range(n + 1):
            p.append(Row(target, b, (b, i)))
            out.rows_read[b] += 1
            if not p[i].valid or i == n:
                break
            q.append(None if draft is None else Row(draft, b, (b, i)))
            token = int(ids[b, i])
            p_token = p[i].probability(token)
            q_token = 1.0 if draft is None else q[i].probability(token)  # type: ignore[union-attr]
            ahead = reach[i] * p_token
            if ahead <= 0:
                break
            reach.append(ahead / q_token if ahead < q_token else 1.0)
        longest = len(reach) - 1
        if not p[-1].valid:
            longest = min(longest, len(p) - 1)
        tau, left = 0, None
        for i in range(longest, -1, -1):
            if i == n:
                accept = reach[n]
                left = None
            elif not p[i].valid:
                # No law follows this prefix: it is kept as far as it goes, and nothing is emitted after it.
                accept = reach[i]
                left = None
            else:
                left = left_over(reach[i], p[i], 1.0, q[i] if i < len(q) else None, int(ids[b, i]))
                rest = float(left.sum()) * RESIDUAL_UNIT
                accept = 1.0 if reach[i] >= 1 else rest / (rest + (1.0 - reach[i]))
            if i == 0 or stream.draw(i - 1, VERIFICATION)[0] <= accept:
                tau = i
                break
        for i in range(tau):
            out.put(b, i, int(ids[b, i]), p[i])
        out.accepted[b] = tau
        if p[tau].valid:
            u = stream.draw(tau, VERIFICATION)[1]
            token = p[tau].pick(u) if left is None else pick_left_over(left, p[tau], u)
            out.put(b, tau, token, p[tau])
    return out.result()


def speculative_streaming_verify(
    stream_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    *,
    num_draft_tokens: Any = None,
    seed: Any = None,
    offset: Any = 0,
) -> Verified:
    law = as_law(stream_probs)
    batch, steps, streams, vocabulary = law.values.shape
    k = draft_token_ids.shape[1]
    merged = law.values.reshape(batch, steps * streams, vocabulary)[:, :k]
    return chain_speculative_sampling(
        replace(law, values=merged),
        draft_token_ids,
        target_probs,
        num_draft_tokens=num_draft_tokens,
        seed=seed,
        offset=offset,
    )
