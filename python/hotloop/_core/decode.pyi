from __future__ import annotations

import collections.abc
import typing

def backtrack(
    batch: int,
    phrases: int,
    p_unconfident: typing.Any,
    span_ends: typing.Any,
    lengths: tuple[typing.Any, ...],
    before: tuple[typing.Any, ...],
    numbers: typing.Annotated[collections.abc.Sequence[float], "FixedSize(4)"],
    limits: typing.Annotated[collections.abc.Sequence[int], "FixedSize(2)"],
    after: tuple[typing.Any, ...],
    outputs: tuple[typing.Any, ...],
) -> None: ...
def beam_step(
    width: int,
    length: int,
    logits: typing.Any,
    ref_logits: typing.Any,
    eos: collections.abc.Sequence[int],
    before: tuple[typing.Any, ...],
    after: tuple[typing.Any, ...],
    beam_indices: typing.Any,
    next_ids: typing.Any,
) -> None: ...
def branch_reuse(
    batch: int,
    width: int,
    kappa: int,
    following: int,
    emitted: typing.Any,
    accepted: typing.Any,
    roots: typing.Any,
    branches: typing.Any,
    reused: typing.Any,
    branch: typing.Any,
    window: typing.Any,
) -> None: ...
def chain(
    whole_block: bool,
    batch: int,
    width: int,
    ids: typing.Any,
    target: tuple[typing.Any, ...],
    draft: typing.Any,
    lengths: typing.Any,
    seed: typing.Any,
    offset: typing.Any,
    outputs: tuple[typing.Any, ...],
) -> int: ...
def lantern(
    batch: int,
    width: int,
    ids: typing.Any,
    target: tuple[typing.Any, ...],
    draft: typing.Any,
    neighbors: typing.Any,
    k: int,
    delta: float,
    lengths: typing.Any,
    seed: typing.Any,
    offset: typing.Any,
    outputs: tuple[typing.Any, ...],
    moved: typing.Any,
) -> int: ...
def logits(batch: int, law: tuple[typing.Any, ...], wide: bool, out: typing.Any) -> None: ...
def nearest_codes(
    products: typing.Any,
    codebook: typing.Any,
    squares: typing.Any,
    first: int,
    errors: typing.Annotated[collections.abc.Sequence[float], "FixedSize(2)"],
    out: typing.Any,
) -> None: ...
def paths(
    typical: bool,
    batch: int,
    paths: int,
    width: int,
    ids: typing.Any,
    target: tuple[typing.Any, ...],
    epsilon: float,
    alpha: float,
    entropy_eps: float,
    lengths: typing.Any,
    seed: typing.Any,
    offset: typing.Any,
    outputs: tuple[typing.Any, ...],
) -> int: ...
def probs(
    batch: int, rows: int, law: tuple[typing.Any, ...], log: bool, wide: bool, out: typing.Any
) -> int: ...
def puct_step(
    tree: tuple[typing.Any, ...],
    nodes: tuple[typing.Any, ...],
    max_depth: int,
    numbers: typing.Annotated[collections.abc.Sequence[float], "FixedSize(3)"],
    outputs: tuple[typing.Any, ...],
) -> None: ...
def sample(
    batch: int,
    rows: int,
    law: tuple[typing.Any, ...],
    seed: typing.Any,
    offset: typing.Any,
    ids: typing.Any,
    logps: typing.Any,
) -> int: ...
def star_step(
    tree: tuple[typing.Any, ...],
    nodes: tuple[typing.Any, ...],
    rollouts: typing.Any,
    max_depth: int,
    numbers: typing.Annotated[collections.abc.Sequence[float], "FixedSize(4)"],
    seed: typing.Any,
    offset: int,
    outputs: tuple[typing.Any, ...],
) -> None: ...
def temperatures(
    batch: int,
    rows: int,
    law: tuple[typing.Any, ...],
    statistics: tuple[typing.Any, ...],
    temperature: float,
    tau: float,
    out: typing.Any,
) -> None: ...
def top(
    batch: int, rows: int, k: int, law: tuple[typing.Any, ...], ids: typing.Any, logps: typing.Any
) -> int: ...
def tree(
    batch: int,
    width: int,
    depth: int,
    ids: typing.Any,
    parents: typing.Any,
    target: tuple[typing.Any, ...],
    draft: typing.Any,
    replacement: bool,
    lengths: typing.Any,
    seed: typing.Any,
    offset: typing.Any,
    outputs: tuple[typing.Any, ...],
    nodes: typing.Any,
) -> int: ...
