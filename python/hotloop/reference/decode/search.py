# SPDX-License-Identifier: Apache-2.0
"""The searches, one request, one tree and one code at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ...front import arrays
from .draws import draw
from .results import (
    ACTIONS,
    Backtrack,
    BacktrackState,
    BeamState,
    PuctStep,
    PuctTree,
    StarStep,
    StarTree,
)

TIES = 2  # the domain of draws for ties


def log_sum_exp(z: np.ndarray) -> np.ndarray:
    """Of each row in float64; NaN counts as -inf, and a row without a law gives NaN."""
    z = np.where(np.isnan(z), -np.inf, z.astype(np.float64))
    largest = z.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        found = largest + np.log(np.exp(z - largest).sum(axis=-1, keepdims=True))
    return np.where(np.isfinite(largest), found, np.nan)[..., 0]


def likelihood_beam_search(
    logits: Any, state: BeamState, ref_logits: Any = None, *, eos_token_ids: Any = ()
) -> BeamState:
    eos = [eos_token_ids] if isinstance(eos_token_ids, int) else sorted(set(eos_token_ids))
    policy = arrays.to_numpy(logits)
    ref = None if ref_logits is None else arrays.to_numpy(ref_logits)
    old = BeamState(*(arrays.to_numpy(x) for x in state))
    batch, width, length = old.token_ids.shape
    rows = policy.shape[1]
    new = BeamState(
        scores=np.full((batch, width), -np.inf),
        token_ids=np.full((batch, width, length + 1), -1, np.int64),
        beam_indices=np.zeros((batch, width), np.int64),
        next_token_ids=np.zeros((batch, width), np.int64),
        finished_scores=np.full((batch, width), -np.inf),
        finished_token_ids=np.full((batch, width, length + 1), -1, np.int64),
        finished_lengths=np.full((batch, width), -1, np.int64),
        done=old.done.astype(bool),
    )
    for b in range(batch):
        if old.done[b]:
            for field in ("scores", "finished_scores", "finished_lengths"):
                getattr(new, field)[b] = getattr(old, field)[b]
            new.token_ids[b, :, :length] = old.token_ids[b]
            new.finished_token_ids[b, :, :length] = old.finished_token_ids[b]
            new.beam_indices[b] = np.arange(width)
            continue
        shift, key = log_sum_exp(policy[b]), policy[b].astype(np.float64)
        if ref is not None:
            with np.errstate(invalid="ignore"):
                shift, key = shift - log_sum_exp(ref[b]), key - ref[b].astype(np.float64)
        key = np.where(key < np.inf, key, -np.inf)  # NaN too
        with np.errstate(invalid="ignore"):
            score = old.scores[b, :rows, None] + (key - shift[:, None])
        row, token = np.nonzero(score > -np.inf)
        order = np.lexsort((token, -key[row, token], row, -score[row, token]))
        children = [(float(score[row[i], token[i]]), int(row[i]), int(token[i])) for i in order]
        finished = (old.finished_scores[b], old.finished_token_ids[b], old.finished_lengths[b])
        pool = [(float(s), ids, int(n)) for s, ids, n in zip(*finished) if n >= 0]
        for s, r, v in children[:width]:
            if v in eos:
                pool.append((s, np.append(old.token_ids[b, r], v), length + 1))
        pool = sorted(pool, key=lambda f: -f[0])[:width]
        for i, (s, ids, n) in enumerate(pool):
            new.finished_scores[b, i], new.finished_lengths[b, i] = s, n
            new.finished_token_ids[b, i, : len(ids)] = ids
        live = [child for child in children if child[2] not in eos][:width]
        for i, (s, r, v) in enumerate(live):
            new.scores[b, i], new.beam_indices[b, i], new.next_token_ids[b, i] = s, r, v
            new.token_ids[b, i] = np.append(old.token_ids[b, r], v)
        beaten = ref is None and len(pool) == width and new.scores[b, 0] <= pool[-1][0]
        new.done[b] = not live or beaten
    return BeamState(*(arrays.from_numpy(x, logits) for x in new))


def _children(parents: np.ndarray, node: int) -> list[int]:
    return [int(i) for i in np.flatnonzero(parents == node)]


def _path_up(parents: np.ndarray, node: int, root: int) -> list[int]:
    """The nodes above ``node``, up to the root of the search or the root of the tree."""
    path = []
    while node != root and parents[node] >= 0:
        node = int(parents[node])
        path.append(node)
    return path


def _node(nodes: Any, b: int, default: int) -> int:
    return default if nodes is None else int(arrays.to_numpy(nodes)[b])


def _descend(
    parents: np.ndarray, start: int, root: int, max_depth: int | None, best: Any
) -> tuple[int, int]:
    node, depth = start, 0
    if node >= 0:
        depth = len(_path_up(parents, node, root))
        while (max_depth is None or depth < max_depth) and _children(parents, node):
            node = best(node, depth)
            depth += 1
    return node, depth


def mcts_star_step(
    tree: StarTree,
    leaves: Any = None,
    rollout_values: Any = None,
    starts: Any = None,
    roots: Any = None,
    *,
    c: float = 0.7,
    alpha: float = 0.5,
    unvisited_bonus: float = math.inf,
    end_gate: float = 0.9,
    max_depth: int | None = None,
    seed: int | None = None,
    offset: int = 0,
) -> StarStep:
    columns = [arrays.to_numpy(x) for x in tree]
    trees, slots = columns[0].shape
    nodes, depths = np.full(trees, -1, np.int64), np.zeros(trees, np.int64)
    ended = np.zeros(trees, bool)

    def search(b: int, parents: np.ndarray, value: np.ndarray, visits: np.ndarray) -> None:
        def average(node: int) -> None:
            weighted = total = 0.0
            for i in _children(parents, node):
                weighted += float(value[i]) * int(visits[i])
                total += int(visits[i])
            if total > 0:
                value[node] = weighted / total

        def best(node: int, depth: int) -> int:
            log_parent = 2.0 * math.log(max(int(visits[node]), 1))
            ranks = {}
            for i in _children(parents, node):
                v, n = float(value[i]), int(visits[i])
                first = n == 0 and unvisited_bonus == math.inf
                bonus = (
                    c * math.sqrt(log_parent / n) if n > 0 else 0.0 if first else unvisited_bonus
                )
                ranks[i] = (first, -math.inf if math.isnan(v + bonus) else v + bonus)
            top = max(ranks.values())
            tied = [i for i, rank in ranks.items() if rank == top]
            if seed is None or len(tied) == 1:
                return tied[0]
            u = draw(seed, b, offset, depth, TIES)[1]
            return tied[min(int(u * len(tied)), len(tied) - 1)]

        leaf, root = _node(leaves, b, -1), _node(roots, b, 0)
        if leaf >= 0:
            r = math.nan if rollout_values is None else float(arrays.to_numpy(rollout_values)[b])
            visits[leaf] += 1
            if math.isnan(r):
                average(leaf)
            else:
                value[leaf] = float(value[leaf]) * (1 - alpha) + r * alpha
            for node in _path_up(parents, leaf, root):
                visits[node] += 1
                average(node)
        nodes[b], depths[b] = _descend(parents, _node(starts, b, root), root, max_depth, best)
        ended[b] = nodes[b] >= 0 and value[nodes[b]] >= end_gate

    for b in range(trees if slots else 0):
        search(b, *(x[b] for x in columns))
    return StarStep(*(arrays.from_numpy(x, tree.parents) for x in (nodes, depths, ended)))


def puct_select_backup(
    tree: PuctTree,
    leaves: Any = None,
    starts: Any = None,
    roots: Any = None,
    *,
    c_puct: float = 1.0,
    gamma: float = 1.0,
    length_penalty: float = 1.25,
    max_depth: int | None = None,
) -> PuctStep:
    columns = PuctTree(*(arrays.to_numpy(x) for x in tree))
    trees, slots = columns.parents.shape
    nodes, depths = np.full(trees, -1, np.int64), np.zeros(trees, np.int64)

    def search(b: int, t: PuctTree) -> None:
        def best(node: int, _: int) -> int:
            def score(i: int) -> float:
                p = math.exp(float(t.logps[i]) / float(t.lengths[i]) ** length_penalty)
                explore = c_puct * p * math.sqrt(int(t.visits[node])) / (1 + int(t.visits[i]))
                s = float(t.q[i]) + explore
                return -math.inf if math.isnan(s) else s

            return max(_children(t.parents, node), key=score)

        leaf, root = _node(leaves, b, -1), _node(roots, b, 0)
        for node in [] if leaf < 0 else [leaf, *_path_up(t.parents, leaf, root)]:
            if node != leaf:
                weighted = total = 0.0
                for i in _children(t.parents, node):
                    weighted += max(1, int(t.visits[i])) * float(t.q[i])
                    total += max(1, int(t.visits[i]))
                t.v[node] = weighted / total
            t.visits[node] += 1
            if node == leaf or node != 0:
                above = float(t.values[t.parents[node]]) if node != 0 else 0.0
                t.q[node] = (float(t.values[node]) - above) + gamma * float(t.v[node])
        nodes[b], depths[b] = _descend(t.parents, _node(starts, b, root), root, max_depth, best)

    for b in range(trees if slots else 0):
        search(b, PuctTree(*(x[b] for x in columns)))
    return PuctStep(*(arrays.from_numpy(x, tree.parents) for x in (nodes, depths)))


def retrospective_backtrack(
    p_unconfident: Any,
    span_ends: Any,
    chunk_lengths: Any,
    prefix_lengths: Any,
    sentence_lengths: Any,
    state: BacktrackState,
    *,
    tau: float = 0.003,
    temperature: float = 1.0,
    temperature_step: float = 0.05,
    temperature_rise: float = 0.5,
    max_local_attempts: int = 10,
    max_total_attempts: int = 50,
) -> Backtrack:
    p, ends, chunk, prefix, sentence = (
        arrays.to_numpy(x)
        for x in (p_unconfident, span_ends, chunk_lengths, prefix_lengths, sentence_lengths)
    )
    batch = len(chunk)
    local, total, heat, correcting, done = (
        arrays.to_numpy(x).astype(t)
        for x, t in zip(state, (np.int64, np.int64, np.float64, bool, bool))
    )
    actions, kept, flagged = (np.full(batch, -1, np.int64) for _ in range(3))
    for b in range(batch):
        kept[b] = prefix[b]
        if not correcting[b]:
            heat[b] = temperature
        if done[b]:
            continue
        total[b] += 1
        phrases = [i for i in range(p.shape[1]) if ends[b, i] >= 0][: 1 if correcting[b] else None]
        bad = [i for i in phrases if float(p[b, i]) > tau]
        if bad:
            flagged[b] = bad[0]
            correcting[b] = True
            local[b] += 1
            heat[b] = min(heat[b] + temperature_step, temperature + temperature_rise)
            if local[b] >= max_local_attempts:
                actions[b], local[b], kept[b] = ACTIONS["cut"], 0, sentence[b]
            else:
                actions[b] = ACTIONS["resample"]
                kept[b] += 0 if bad[0] == 0 else ends[b, bad[0] - 1] + 1
        elif correcting[b]:
            actions[b], correcting[b] = ACTIONS["continue"], False
            local[b], heat[b] = 0, temperature
            kept[b] += ends[b, 0] + 1 if phrases else chunk[b]
        else:
            actions[b], done[b] = ACTIONS["accept"], True
            kept[b] += chunk[b]
        if not done[b] and total[b] >= max_total_attempts:
            actions[b], done[b] = ACTIONS["stop"], True
    back = [arrays.from_numpy(x, p_unconfident) for x in (actions, kept, flagged)]
    counters = (local, total, heat, correcting, done)
    after = BacktrackState(*(arrays.from_numpy(x, p_unconfident) for x in counters))
    return Backtrack(back[0], back[1], back[2], after)


def vq_neighbor_table(codebook: Any, *, k: int | None = None) -> Any:
    e = arrays.to_numpy(codebook).astype(np.float64)
    codes = len(e)
    width = min(1000, max(codes - 1, 0)) if k is None else k
    table = np.empty((codes, width), np.int32)
    for i in range(codes):
        squared = np.zeros(codes)
        for d in range(e.shape[1]):
            squared += (e[i, d] - e[:, d]) ** 2
        order = np.argsort(squared, kind="stable")
        table[i] = order[order != i][:width]
    return arrays.from_numpy(table, codebook)
