# SPDX-License-Identifier: Apache-2.0
"""Sampling a token of every row: top-k and top-p, top-p alone, the whole law."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from hotloop import decode
from hotloop.reference import decode as reference

from .._case import Bench, Case, Contender, Entry, Inputs, Target
from .._options import Options
from ..contenders import decode_plain, huggingface, ours, plain
from . import _inputs, _judge

OP = "sample"


@dataclass(frozen=True)
class Truncation:
    name: str
    top_k: int
    top_p: float


_BOTH = Truncation("top-k 50, top-p 0.9", 50, 0.9)
_NUCLEUS = Truncation("top-p 0.9", 0, 0.9)
_WHOLE = Truncation("whole law", 0, 1.0)
_ALL = (_BOTH, _NUCLEUS, _WHOLE)


def _case(
    device: str,
    dtype: str,
    size: tuple[int, int],
    cut: Truncation,
    targets: tuple[Target, ...] = (),
) -> Case:
    batch, vocabulary = size

    def make_inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        logits = _inputs.logits(generator, (batch,), vocabulary).to(getattr(torch, dtype))
        return Inputs({"logits": logits, "seeds": count()}, ())

    def law(x: Inputs) -> decode.Logits:
        return decode.Logits(x["logits"], top_k=cut.top_k, top_p=cut.top_p)

    def forward(function: ours.Function, x: Inputs) -> tuple[Any, ...]:
        return function(law(x), seed=next(x["seeds"]))  # type: ignore[no-any-return]

    def by_reference(x: Inputs, seed: int) -> tuple[Any, ...]:
        return reference.sample(law(x), seed=seed)

    rivals: list[Entry] = []
    if cut is _WHOLE:
        eager = plain.eager_and_compiled(decode_plain.sample, lambda x: (x["logits"],))
        rivals.append(Contender("torch by cdf", "rival", _by_cdf))
    else:
        eager = plain.eager_and_compiled(
            decode_plain.sample_sorted, lambda x: (x["logits"], cut.top_k, cut.top_p)
        )
        rivals.append(huggingface.sample(cut.top_k, cut.top_p))
    if cut.top_k:
        rivals.append(
            Contender(
                "torch topk first",
                "rival",
                lambda x: decode_plain.sample_topk_first(x["logits"], cut.top_k, cut.top_p),
            )
        )
    return Case(
        op=f"decode.{OP}",
        label=cut.name,
        shape=size,
        # Rows read once.
        **_inputs.rows_read(dtype, device, b=batch, v=vocabulary),
        make_inputs=make_inputs,
        contenders=(
            *ours.contenders("hotloop.decode", OP, ours.loop_impls(device), forward),
            *eager,
            *rivals,
        ),
        targets=targets,
        judge=_judge.draws(_judge.truncated(cut.top_k, cut.top_p), by_reference),
    )


def _by_cdf(x: Inputs) -> tuple[torch.Tensor]:
    return decode_plain.sample(x["logits"], decode_plain.inverse_cdf)


def cases(options: Options) -> list[Case]:
    device = options.device
    if options.quick:
        return [
            _case(device, dtype, (8, 1000), cut)
            for cut in _ALL
            for dtype in ("float32", "bfloat16")
        ]
    target = (Target("C3.4", "torch", 0.30),) if device == "cpu" else ()
    size = (64, 128256)
    found = [
        _case(device, dtype, size, cut, target if cut is _BOTH else ())
        for cut in _ALL
        for dtype in ("float32", "bfloat16")
    ]
    if options.sweep:
        found += [_case(device, "float32", (b, 128256), _BOTH) for b in (1, 4, 16)]
    return found


BENCHES = (Bench(f"decode.{OP}", "a token of every row of logits", cases),)
