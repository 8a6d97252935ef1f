# SPDX-License-Identifier: Apache-2.0
"""Tree verification, node by node."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...front import arrays
from .draws import RESIDUAL_UNIT, VERIFICATION, Row, Stream, residual
from .law import as_law
from .results import VerifiedTree
from .speculative import Emitted, pick_left_over, requests


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
) -> VerifiedTree:
    target, draft = as_law(target_probs), None if draft_probs is None else as_law(draft_probs)
    ids, parent = arrays.to_numpy(draft_token_ids), arrays.to_numpy(parents)
    batch, m = ids.shape
    depth_limit = m if max_depth is None else max_depth
    out = Emitted(draft_token_ids, batch, depth_limit + 1)
    nodes = np.full((batch, depth_limit), -1, np.int64)
    for b, stream, n in requests(draft_token_ids, num_nodes, seed, offset):
        row, depth = 0, 0
        while True:
            p = Row(target, b, (b, row))
            out.rows_read[b] += 1
            if not p.valid:
                break
            children = [j for j in range(row, n) if parent[b, j] == row - 1]
            if not children or depth == depth_limit:
                out.put(b, depth, p.pick(stream.draw(depth, VERIFICATION)[1]), p)
                break
            if draft is None:
                child, left = _try_certain(children, ids[b], p, stream, depth)
            else:
                q = Row(draft, b, (b, row))
                child, left = _try_drawn(children, ids[b], p, q, stream, depth, replacement)
            if child < 0:
                u = stream.draw(depth, VERIFICATION)[1]
                out.put(b, depth, pick_left_over(left, p, u), p)
                break
            out.put(b, depth, int(ids[b, child]), p)
            nodes[b, depth] = child
            out.accepted[b] += 1
            row, depth = child + 1, depth + 1
    done = out.result()
    return VerifiedTree(done.output_token_ids, arrays.from_numpy(nodes, draft_token_ids), *done[1:])


def _try_certain(
    children: list[int], ids: np.ndarray, p: Row, stream: Stream, depth: int
) -> tuple[int, np.ndarray]:
    """Children chosen without chance (the k most likely of the draft): each takes its own token out of the law."""
    left = residual(1.0, p.p, 0.0, 0.0)
    tried: set[int] = set()
    rest, likely = 1.0, -1
    for attempt, j in enumerate(children):
        token = int(ids[j])
        p_token = p.probability(token)
        if token in tried or p_token <= 0:
            continue
        likely = j
        if stream.draw(depth, VERIFICATION, attempt)[0] * rest <= p_token:
            return j, left
        tried.add(token)
        rest -= p_token
        left[token] = 0
    # All mass lay on children, yet rounding let each fail: the last one is certain.
    return (likely if not left.any() else -1), left


def _try_drawn(
    children: list[int],
    ids: np.ndarray,
    p: Row,
    q: Row,
    stream: Stream,
    depth: int,
    replacement: bool,
) -> tuple[int, np.ndarray]:
    """Children drawn from q. After r rejections the law is max(p - a q, 0) / z: a grows, nothing is stored."""
    a, z, rest = 0.0, 1.0, 1.0
    left = residual(1.0, p.p, 0.0, q.p)
    tried: set[int] = set()
    for attempt, j in enumerate(children):
        token = int(ids[j])
        if not replacement and token in tried:
            continue
        tried.add(token)
        q_token = q.probability(token)
        now = p.probability(token) - a * q_token
        accept = stream.draw(depth, VERIFICATION, attempt)[0]
        if now > 0 and accept * (q_token / rest) * z <= now:
            return j, left
        a += z / rest
        left = residual(1.0, p.p, a, q.p)
        z = float(left.sum()) * RESIDUAL_UNIT
        if not replacement:
            rest -= q_token
        if z <= 0 or rest <= 0:
            break
    return -1, left
