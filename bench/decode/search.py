# SPDX-License-Identifier: Apache-2.0
"""A step of a beam search, and the neighbours of a codebook."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hotloop.decode import BeamState
from hotloop.reference.decode import search as reference
from torch import Tensor

from .. import _roofs
from .._case import Bench, Case, Contender, Cost, Inputs, Target, Verdict, on_cpu
from .._options import Options
from ..contenders import decode_plain, ours, plain
from . import _inputs

BEAM, NEIGHBORS = "likelihood_beam_search", "vq_neighbor_table"
_TOKENS = 16
"""Tokens that every beam holds before the step."""
_BEAM_ERROR = 1e-5
"""Relative, of a sum of float32 log-probabilities."""


def _beam_case(
    device: str, dtype: str, size: tuple[int, int, int], targets: tuple[Target, ...] = ()
) -> Case:
    batch, beams, vocabulary = size

    def make_inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        logits = _inputs.logits(generator, (batch, beams), vocabulary).to(getattr(torch, dtype))
        state = BeamState.start(batch, beams, like=logits)
        lost = torch.rand(batch, beams, generator=generator, device=device).cumsum(-1).double()
        shape = (batch, beams, _TOKENS)
        tokens = torch.randint(vocabulary, shape, generator=generator, device=device)
        state = state._replace(
            scores=-20 - lost, token_ids=tokens, finished_token_ids=torch.full_like(tokens, -1)
        )
        return Inputs({"logits": logits, "state": state}, ())

    def forward(function: ours.Function, x: Inputs) -> tuple[Tensor, Tensor]:
        state = function(x["logits"], x["state"])
        return state.scores, state.token_ids

    def eager_arguments(x: Inputs) -> tuple[object, ...]:
        return x["logits"], x["state"].scores.float(), x["state"].token_ids

    return Case(
        op=f"decode.{BEAM}",
        label=f"{_TOKENS} tokens so far",
        shape=size,
        # Logits of every beam read once.
        **_inputs.rows_read(dtype, device, b=batch, k=beams, v=vocabulary),
        make_inputs=make_inputs,
        contenders=(
            *ours.contenders("hotloop.decode.search", BEAM, ("cpu",), forward),
            *plain.eager_and_compiled(decode_plain.beam_step, eager_arguments),
        ),
        targets=targets,
        judge=_judge_beams,
    )


def _judge_beams(contender: Contender, inputs: Inputs) -> Verdict:
    """Scores against the reference, and every sequence against its own score: among equal scores
    contenders may choose differently."""
    logits, state = inputs["logits"], inputs["state"]
    wanted = reference.likelihood_beam_search(logits, state).scores
    scores, sequences = contender.forward(inputs)
    children = logits.double().log_softmax(-1) + state.scores.unsqueeze(-1)
    own = torch.full_like(wanted, -math.inf)
    for b, i in itertools.product(*map(range, wanted.shape)):
        came_from = (state.token_ids[b] == sequences[b, i, :-1]).all(-1)
        if came_from.any():
            own[b, i] = children[b, int(came_from.long().argmax()), sequences[b, i, -1]]
    off = [float(((x.double() - wanted) / wanted).abs().max()) for x in (scores, own)]
    distinct = {tuple(x) for x in sequences.flatten(0, 1).tolist()}
    if not max(off) <= _BEAM_ERROR or len(distinct) < wanted.numel():
        return Verdict(off, f"is off by {off[0]:.1e} in scores, {off[1]:.1e} in what they are of")
    return Verdict(off)


@on_cpu
def beam_cases(options: Options) -> list[Case]:
    if options.quick:
        return [_beam_case("cpu", dtype, (2, 3, 1000)) for dtype in ("float32", "bfloat16")]
    targets = (Target("C3.5", "torch", 0.30),)
    return [_beam_case("cpu", dtype, (8, 5, 128256), targets) for dtype in ("float32", "bfloat16")]


_JUDGED_ROWS = 64


def _judge_neighbors(contender: Contender, inputs: Inputs) -> Verdict:
    """Ours must be the exact table. Rivals round products, so that near neighbours may change
    places: theirs must be as near, rank by rank."""
    codebook = inputs["codebook"]
    (table,) = contender.forward(inputs)
    if table.shape != (len(codebook), inputs["k"]):
        return Verdict([math.inf], f"gave a table of shape {tuple(table.shape)}")
    worst = 0.0
    for i in range(0, len(codebook), max(1, len(codebook) // _JUDGED_ROWS)):
        distances = (codebook.double() - codebook[i].double()).square().sum(-1)
        distances[i] = math.inf
        wanted = distances.sort(stable=True)
        row = table[i].long()
        if contender.role == "ours" and not torch.equal(row, wanted.indices[: row.numel()]):
            return Verdict([math.inf], f"differs from the exact table in row {i}")
        if len(row.unique()) != len(row):
            return Verdict([math.inf], f"names a code twice in row {i}")
        off = distances[row].sqrt() / wanted.values[: row.numel()].sqrt() - 1
        worst = max(worst, float(off.abs().max()))
    complaint = f"is off by {worst:.1e} in distance, allowed 1e-3" if not worst <= 1e-3 else ""
    return Verdict([worst], complaint)


def _neighbors_case(size: tuple[int, int], k: int, targets: tuple[Target, ...] = ()) -> Case:
    codes, width = size

    def make_inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return Inputs({"codebook": torch.randn(codes, width, generator=generator), "k": k}, ())

    def forward(function: ours.Function, x: Inputs) -> tuple[Any]:
        return (function(x["codebook"], k=k),)

    return Case(
        op=f"decode.{NEIGHBORS}",
        label=f"{k} neighbours",
        shape=size,
        make_inputs=make_inputs,
        contenders=(
            *ours.contenders("hotloop.decode.search", NEIGHBORS, ("cpu",), forward),
            Contender(
                "torch", "plain", lambda x: decode_plain.neighbor_table(x["codebook"], x["k"])
            ),
        ),
        # One product of the codebook with itself.
        cost=Cost("flops", "2*v*v*d", {"v": codes, "d": width}),
        roof=_roofs.product(codes, width, codes, "float32", "cpu"),
        roof_amount=2.0 * codes * codes * width,
        targets=targets,
        sets=1,
        judge=_judge_neighbors,
    )


@on_cpu
def neighbor_cases(options: Options) -> list[Case]:
    if options.quick:
        return [_neighbors_case((300, 8), 40)]
    return [_neighbors_case((16384, 8), 1000, (Target("C3.6", "torch", 1.0),))]


BENCHES = (
    Bench(f"decode.{BEAM}", "a step of a beam search by likelihood", beam_cases),
    Bench(f"decode.{NEIGHBORS}", "nearest codes of every code", neighbor_cases),
)
