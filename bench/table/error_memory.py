# SPDX-License-Identifier: Apache-2.0
"""Correcting predictions from an error memory and from its sketch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hotloop.reference import table as reference
from torch import Tensor
from torch.nn.functional import normalize

from .. import _roofs
from .._case import Bench, Case, Contender, Cost, Inputs, Target, Verdict, on_cpu
from .._options import Options
from ..contenders import ours, plain

MEMORY, SKETCH = "error_memory_compensate", "lsh_error_sketch"
_JUDGED = 8
"""Queries that the reference answers, which takes them one by one."""
_ERROR = 2e-5
"""Absolute, of a probability: a softmax of float32 similarities over a temperature of 0.1."""
_TAU, _LAM = 0.1, 0.9


def _judge(wanted: Tensor, found: Tensor) -> Verdict:
    off = float((found[: len(wanted)].double() - wanted).abs().max())
    return Verdict([off], f"is off by {off:.1e}, allowed {_ERROR}" if not off <= _ERROR else "")


def _memory_inputs(seed: int, batch: int, slots: int, dim: int, k: int, dtype: str) -> Inputs:
    """Hidden vectors of 50 kinds of samples, so that neighbours are near, in a memory."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(50, dim, generator=g)

    def hidden(n: int) -> Tensor:
        kinds = torch.randint(50, (n,), generator=g)
        noisy = centers[kinds] + torch.randn(n, dim, generator=g)
        return noisy.to(getattr(torch, dtype))

    made = {
        "query": hidden(batch),
        "base": torch.rand(batch, generator=g),
        "keys": hidden(slots),
        "labels": (torch.rand(slots, generator=g) < 0.3).float(),
        "stored": torch.rand(slots, generator=g),
        "k": k,
    }
    return Inputs(made, ())


def _columns(x: Inputs) -> tuple[Any, ...]:
    return x["query"], x["base"], x["keys"], x["labels"], x["stored"]


def full_matrix(
    query: Tensor, base: Tensor, keys: Tensor, labels: Tensor, stored: Tensor, k: int
) -> tuple[Tensor]:
    """All similarities, ``topk`` of every row."""
    similarity = normalize(query.float(), dim=-1) @ normalize(keys.float(), dim=-1).T
    s, at = similarity.topk(k, dim=-1)
    label = ((s / _TAU).softmax(-1) * labels[at]).sum(-1)
    return ((base + _LAM * (label - base)).clamp(0, 1),)


def tiles(
    query: Tensor, base: Tensor, keys: Tensor, labels: Tensor, stored: Tensor, k: int
) -> tuple[Tensor]:
    """8192 slots at a time: ``topk`` of the tile and of what was best so far."""
    unit = normalize(query.float(), dim=-1)
    best = torch.full((len(query), 0), 0.0)
    at = torch.zeros(len(query), 0, dtype=torch.long)
    for first in range(0, len(keys), 8192):
        tile = unit @ normalize(keys[first : first + 8192].float(), dim=-1).T
        s, i = tile.topk(min(k, tile.shape[1]), dim=-1)
        best, at = torch.cat([best, s], -1), torch.cat([at, i + first], -1)
        best, i = best.topk(min(k, best.shape[1]), dim=-1)
        at = at.gather(-1, i)
    label = ((best / _TAU).softmax(-1) * labels[at]).sum(-1)
    return ((base + _LAM * (label - base)).clamp(0, 1),)


def numpy_matrix(
    query: Tensor, base: Tensor, keys: Tensor, labels: Tensor, stored: Tensor, k: int
) -> tuple[Tensor]:
    """All similarities, ``argpartition`` of every row."""
    q, h = (x.float().numpy() for x in (query, keys))
    q, h = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (q, h))
    similarity = q @ h.T
    at = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    s = np.take_along_axis(similarity, at, axis=1) / np.float32(_TAU)
    a = np.exp(s - s.max(1, keepdims=True))
    label = (a * labels.numpy()[at]).sum(1) / a.sum(1)
    moved = base.numpy() + np.float32(_LAM) * (label - base.numpy())
    return (torch.from_numpy(np.clip(moved, 0, 1)),)


def _memory_case(
    size: tuple[int, int, int], k: int, dtype: str = "float32", targets: tuple[Target, ...] = ()
) -> Case:
    batch, slots, dim = size

    def make_inputs(seed: int) -> Inputs:
        return _memory_inputs(seed, batch, slots, dim, k, dtype)

    def forward(function: ours.Function, x: Inputs) -> tuple[Tensor]:
        return (function(*_columns(x), k=x["k"]),)

    def arguments(x: Inputs) -> tuple[object, ...]:
        return (*_columns(x), x["k"])

    def judge(contender: Contender, x: Inputs) -> Verdict:
        query, base, *stored = (v.double() for v in _columns(x))
        wanted = reference.error_memory_compensate(
            query[:_JUDGED], base[:_JUDGED], *stored, k=x["k"]
        )
        return _judge(wanted, contender.forward(x)[0])

    cost = Cost("flops", "2*b*n*d", {"b": batch, "n": slots, "d": dim})
    return Case(
        op=f"table.{MEMORY}",
        label=f"{k} neighbours",
        shape=size,
        dtype=dtype,
        make_inputs=make_inputs,
        contenders=(
            *ours.contenders("hotloop.table", MEMORY, ("cpu",), forward),
            Contender("torch", "plain", lambda x: full_matrix(*arguments(x))),  # type: ignore[arg-type]
            Contender("torch tiles", "rival", lambda x: tiles(*arguments(x))),  # type: ignore[arg-type]
            Contender("numpy", "rival", lambda x: numpy_matrix(*arguments(x))),  # type: ignore[arg-type]
        ),
        cost=cost,
        roof=_roofs.product(batch, dim, slots, "float32", "cpu"),
        targets=targets,
        sets=1,
        judge=judge,
    )


@on_cpu
def memory_cases(options: Options) -> list[Case]:
    if options.quick:
        return [_memory_case((64, 2000, 16), 20), _memory_case((8, 999, 16), 20, "bfloat16")]
    cases = [
        _memory_case((1024, 100000, 64), 180),
        _memory_case((1024, 100000, 64), 70),
        _memory_case((1024, 100000, 64), 180, "bfloat16"),
        _memory_case((1, 100000, 64), 180),
        _memory_case((16, 100000, 64), 180),
    ]
    if options.sweep:
        cases += [_memory_case((1024, n, 64), 180) for n in (1000, 10000, 300000)]
    return cases


def plain_sketch(
    hidden: Tensor, base: Tensor, projections: Tensor, sketch: Tensor
) -> tuple[Tensor]:
    """One product, bits packed by a sum, one gather from a float32 sketch."""
    repeats, bits, dim = projections.shape
    z = (hidden @ projections.reshape(-1, dim).T).reshape(-1, repeats, bits)
    buckets = ((z > 0).long() << torch.arange(bits)).sum(-1)
    found = sketch[torch.arange(repeats), buckets]
    c = found[..., 0]
    s = torch.where(c > 0, c / sketch[0, :, 0].sum(), -torch.inf)
    a = (s / _TAU).softmax(-1).nan_to_num(0.0)
    label = (a * found[..., 1] / c.clamp(min=1)).sum(-1)
    label = torch.where((c > 0).any(-1), label, base)
    return ((base + _LAM * (label - base)).clamp(0, 1),)


def _sketch_case(size: tuple[int, int, int, int], written: int) -> Case:
    batch, dim, repeats, bits = size

    def make_inputs(seed: int) -> Inputs:
        from hotloop import table

        x = _memory_inputs(seed, batch, written, dim, 1, "float32")
        memory = table.ErrorSketch(dim, repeats=repeats, bits=bits, like=x["keys"])
        memory.write(x["keys"], x["labels"], x["stored"])
        floats = memory.sketch.float() * torch.tensor([1.0, 2.0**-32, 2.0**-32])
        made = {"projections": memory.projections, "sketch": memory.sketch, "floats": floats}
        return Inputs({**x.tensors, **made}, ())

    def forward(function: ours.Function, x: Inputs) -> tuple[Tensor]:
        from hotloop import table

        buckets = table.lsh_buckets(x["query"], x["projections"])
        return (function(buckets, x["base"], x["sketch"]),)

    def judge(contender: Contender, x: Inputs) -> Verdict:
        buckets = reference.lsh_buckets(x["query"][:_JUDGED], x["projections"])
        wanted = reference.lsh_error_sketch(buckets, x["base"][:_JUDGED].double(), x["sketch"])
        return _judge(wanted, contender.forward(x)[0])

    def arguments(x: Inputs) -> tuple[object, ...]:
        return x["query"], x["base"], x["projections"], x["floats"]

    # The product with the projections, and a record of 24 bytes per sample and repeat.
    cost = Cost("flops", "2*b*d*r*l", {"b": batch, "d": dim, "r": repeats, "l": bits})
    return Case(
        op=f"table.{SKETCH}",
        label=f"hash and read, {written} written",
        shape=size,
        make_inputs=make_inputs,
        contenders=(
            *ours.contenders("hotloop.table", SKETCH, ("cpu",), forward),
            *plain.eager_and_compiled(plain_sketch, arguments),
        ),
        cost=cost,
        roof=_roofs.product(batch, dim, repeats * bits, "float32", "cpu"),
        sets=1,
        judge=judge,
    )


@on_cpu
def sketch_cases(options: Options) -> list[Case]:
    if options.quick:
        return [_sketch_case((64, 16, 20, 8), 500)]
    return [_sketch_case((1024, 64, 180, 16), 20000)]


BENCHES = (
    Bench(f"table.{MEMORY}", "predictions corrected by the nearest stored errors", memory_cases),
    Bench(f"table.{SKETCH}", "predictions corrected by hashed errors", sketch_cases),
)
