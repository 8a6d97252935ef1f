# SPDX-License-Identifier: Apache-2.0
"""Verification of drafted trees: 64 nodes, depth 8, 4 children, chosen without chance."""

from __future__ import annotations

from typing import Any

from hotloop import decode
from hotloop.reference import decode as reference

from .._case import Bench, Case, Contender, Inputs, Target
from .._options import Options
from ..contenders import decode_plain, ours
from . import _inputs, _judge

OP = "tree_speculative_verify"

_CHILDREN = 4
_ROWS = 3.1
"""Rows visited per request, on average: one of the children of a node is kept in 80 % of cases, half have none."""

_AS_MANY_ROWS = "chain, as many rows"


def _case(
    device: str,
    dtype: str,
    size: tuple[int, int, int],
    depth: int,
    targets: tuple[Target, ...] = (),
) -> Case:
    batch, _, vocabulary = size

    def forward(function: ours.Function, x: Inputs) -> tuple[Any, ...]:
        law = decode.Logits(x["target"])
        return function(  # type: ignore[no-any-return]
            x["tokens"], x["parents"], law, max_depth=depth, seed=next(x["seeds"])
        )

    def by_reference(x: Inputs, seed: int) -> tuple[Any, ...]:
        law = decode.Logits(x["target"])
        return reference.tree_speculative_verify(  # type: ignore[no-any-return]
            x["tokens"], x["parents"], law, max_depth=depth, seed=seed
        )

    return Case(
        op=f"decode.{OP}",
        label=f"depth {depth}, {_CHILDREN} children",
        shape=size,
        # Rows on the path read once.
        **_inputs.rows_read(dtype, device, rows=round(batch * _ROWS), v=vocabulary),
        make_inputs=lambda seed: _inputs.tree(seed, size, _CHILDREN, depth, dtype, device),
        contenders=(
            *ours.contenders("hotloop.decode", OP, ours.loop_impls(device), forward),
            Contender("torch", "plain", decode_plain.tree),
            Contender(_AS_MANY_ROWS, "floor", _chain),
        ),
        targets=targets,
        judge=_judge.verification(_judge.tree, by_reference),
    )


def _chain(x: Inputs) -> None:
    """A chain that visits as many rows of each request, seed by seed."""
    chains = x["chains"]
    tokens, lengths = next(chains["chains"])
    decode.chain_speculative_sampling(
        None, tokens, decode.Logits(chains["rows"]), num_draft_tokens=lengths
    )


def cases(options: Options) -> list[Case]:
    device = options.device
    if options.quick:
        return [_case(device, dtype, (3, 20, 1000), 3) for dtype in ("float32", "bfloat16")]
    targets = (Target("G3.3" if device == "cuda" else "C3.3", _AS_MANY_ROWS, 1.3),)
    return [_case(device, dtype, (16, 64, 32000), 8, targets) for dtype in ("float32", "bfloat16")]


BENCHES = (Bench(f"decode.{OP}", "verification of a drafted tree", cases),)
