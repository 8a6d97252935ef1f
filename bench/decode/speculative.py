# SPDX-License-Identifier: Apache-2.0
"""Verification of drafted chains, token by token and as a block, from logits and probabilities.

The draft is right about 70 % of the time. Every call draws anew, so calls visit different rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from hotloop import decode
from hotloop.reference import decode as reference

from .._case import Bench, Case, Contender, Entry, Inputs, Target
from .._options import Options
from ..contenders import decode_plain, huggingface, ours, plain
from . import _inputs, _judge

_K = 4
_SMALL, _LARGE, _GPU_VOCABULARY = 32000, 151936, 128256
# Input sets of one request are small: more of them, so that their acceptance averages out.
_SETS = {1: 8, 16: 3}
_QUICK = ((1, _K, 1000), (3, 2, 1537))


def _laws(x: Inputs) -> tuple[Any, Any]:
    if x["probabilities"]:
        return x["draft"], x["target"]
    return decode.Logits(x["draft"]), decode.Logits(x["target"])


def _arguments(x: Inputs) -> tuple[object, ...]:
    return x["target"], x["draft"], x["tokens"]


def _case(
    op: str,
    device: str,
    dtype: str,
    size: tuple[int, int, int],
    targets: tuple[Target, ...] = (),
    probabilities: bool = False,
) -> Case:
    batch, k, vocabulary = size
    whole_block = op == "block_speculative_sampling"

    def forward(function: ours.Function, x: Inputs) -> tuple[Any, ...]:
        draft, target = _laws(x)
        found: tuple[Any, ...] = function(draft, x["tokens"], target, seed=next(x["seeds"]))
        return found

    def by_reference(x: Inputs, seed: int) -> tuple[Any, ...]:
        draft, target = _laws(x)
        found: tuple[Any, ...] = getattr(reference, op)(draft, x["tokens"], target, seed=seed)
        return found

    if whole_block:
        eager, exact, rows = decode_plain.block, _judge.block, batch * (2 * k + 1)
    else:
        eager = decode_plain.chain_of_probs if probabilities else decode_plain.chain
        exact = _judge.chain
        counted = _inputs.residual_rows if probabilities else _inputs.visited_rows
        rows = counted(batch, k)
    rivals: list[Entry] = [
        Contender(
            "torch by cdf", "rival", lambda x: eager(*_arguments(x), decode_plain.inverse_cdf)
        )
    ]
    if whole_block:
        rivals.append(Contender("chain, as many rows", "floor", _chain_of_all))
    elif batch == 1 and not probabilities:
        rivals.append(huggingface.speculative_sampling())
    return Case(
        op=f"decode.{op}",
        label=f"{'probabilities' if probabilities else 'logits'}, 70% accepted",
        shape=size,
        # Rows read once: target and draft up to the first rejection; given probabilities, only the rows
        # that a token is drawn from; for a block all rows.
        **_inputs.rows_read(dtype, device, rows=rows, v=vocabulary),
        make_inputs=lambda seed: _inputs.chain(seed, size, dtype, device, probabilities),
        contenders=(
            *ours.contenders("hotloop.decode", op, ours.loop_impls(device), forward),
            *plain.eager_and_compiled(eager, _arguments),
            *rivals,
        ),
        targets=targets,
        sets=_SETS.get(batch, 3),
        judge=_judge.verification(exact, by_reference),
    )


def _chain_of_all(x: Inputs) -> None:
    """A chain whose draft is the target's own law: every row is visited, none is rejected."""
    if "same" not in x.tensors:
        x.tensors["same"] = x["target"][:, :-1].clone()
    decode.chain_speculative_sampling(
        decode.Logits(x["same"]), x["tokens"], decode.Logits(x["target"]), seed=next(x["seeds"])
    )


_chain = partial(_case, "chain_speculative_sampling")
_block = partial(_case, "block_speculative_sampling")


def chain_cases(options: Options) -> list[Case]:
    device = options.device
    if options.quick:
        return [
            *(_chain(device, dtype, size) for size in _QUICK for dtype in ("float32", "bfloat16")),
            *(_chain(device, "float32", size, (), True) for size in _QUICK),
        ]
    if device == "cuda":
        return [_chain(device, "bfloat16", (batch, _K, _GPU_VOCABULARY)) for batch in (1, 8, 64)]
    found = []
    for dtype in ("float32", "bfloat16"):
        for vocabulary, batched in ((_SMALL, 0.30), (_LARGE, 0.25)):
            one = (Target("C3.1", huggingface.NAME, 0.35),)
            many = (Target("C3.2", "torch", batched),)
            found.append(_chain(device, dtype, (1, _K, vocabulary), one))
            found.append(_chain(device, dtype, (16, _K, vocabulary), many))
    found += [_chain(device, "float32", (16, _K, v), (), True) for v in (_SMALL, _LARGE)]
    if options.sweep:
        found += [_chain(device, "float32", (b, _K, _SMALL)) for b in (2, 4, 8, 32)]
        found += [_chain(device, "float32", (1, k, _SMALL)) for k in (1, 2, 8)]
    return found


def block_cases(options: Options) -> list[Case]:
    device = options.device
    if options.quick:
        return [_block(device, dtype, _QUICK[1]) for dtype in ("float32", "bfloat16")]
    return [
        _block(device, dtype, (batch, _K, _SMALL))
        for dtype in ("float32", "bfloat16")
        for batch in (1, 16)
    ]


BENCHES = (
    Bench("decode.chain_speculative_sampling", "verification of a drafted chain", chain_cases),
    Bench("decode.block_speculative_sampling", "verification of a drafted block", block_cases),
)
