# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

def backtrack(
    batch: int,
    phrases: int,
    p_unconfident: Any,
    span_ends: Any,
    lengths: tuple[Any, ...],
    before: tuple[Any, ...],
    numbers: Sequence[float],
    limits: Sequence[int],
    after: tuple[Any, ...],
    outputs: tuple[Any, ...],
) -> None: ...
def beam_step(
    width: int,
    length: int,
    logits: Any,
    ref_logits: Any,
    eos: Sequence[int],
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    beam_indices: Any,
    next_ids: Any,
) -> None: ...
def branch_reuse(
    batch: int,
    width: int,
    kappa: int,
    following: int,
    emitted: Any,
    accepted: Any,
    roots: Any,
    branches: Any,
    reused: Any,
    branch: Any,
    window: Any,
) -> None: ...
def chain(
    whole_block: bool,
    batch: int,
    width: int,
    ids: Any,
    target: tuple[Any, ...],
    draft: Any,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
) -> int: ...
def lantern(
    batch: int,
    width: int,
    ids: Any,
    target: tuple[Any, ...],
    draft: Any,
    neighbors: Any,
    k: int,
    delta: float,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
    moved: Any,
) -> int: ...
def logits(batch: int, law: tuple[Any, ...], wide: bool, out: Any) -> None: ...
def nearest_codes(
    products: Any, codebook: Any, squares: Any, first: int, errors: Sequence[float], out: Any
) -> None: ...
def paths(
    typical: bool,
    batch: int,
    paths: int,
    width: int,
    ids: Any,
    target: tuple[Any, ...],
    epsilon: float,
    alpha: float,
    entropy_eps: float,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
) -> int: ...
def probs(batch: int, rows: int, law: tuple[Any, ...], log: bool, wide: bool, out: Any) -> int: ...
def puct_step(
    tree: tuple[Any, ...],
    nodes: tuple[Any, ...],
    max_depth: int,
    numbers: Sequence[float],
    outputs: tuple[Any, ...],
) -> None: ...
def sample(
    batch: int, rows: int, law: tuple[Any, ...], seed: Any, offset: Any, ids: Any, logps: Any
) -> int: ...
def star_step(
    tree: tuple[Any, ...],
    nodes: tuple[Any, ...],
    rollouts: Any,
    max_depth: int,
    numbers: Sequence[float],
    seed: Any,
    offset: int,
    outputs: tuple[Any, ...],
) -> None: ...
def temperatures(
    batch: int,
    rows: int,
    law: tuple[Any, ...],
    statistics: tuple[Any, ...],
    temperature: float,
    tau: float,
    out: Any,
) -> None: ...
def top(batch: int, rows: int, k: int, law: tuple[Any, ...], ids: Any, logps: Any) -> int: ...
def tree(
    batch: int,
    width: int,
    depth: int,
    ids: Any,
    parents: Any,
    target: tuple[Any, ...],
    draft: Any,
    replacement: bool,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
    nodes: Any,
) -> int: ...
