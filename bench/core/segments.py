# SPDX-License-Identifier: Apache-2.0
"""Reductions over ragged groups, and the stable sort by key, one thread: groups of a few values, and sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hotloop.reference import core as reference
from torch import Tensor

from .. import _roofs
from .._case import Bench, Case, Contender, Cost, Inputs
from .._options import Options
from ..contenders import ours

MANY = 2**20
_TO_SCATTER = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}


@dataclass(frozen=True)
class Shape:
    label: str
    rows: int
    columns: int
    longest: int
    """Lengths are drawn from 1 to this."""


SHAPES = (
    Shape("groups of 16", MANY, 1, 16),
    Shape("sequences", MANY, 1, 2000),
    Shape("rows of 64", 2**15, 64, 64),
)


def _inputs(seed: int, shape: Shape, device: str) -> Inputs:
    g = torch.Generator("cpu").manual_seed(seed)
    lengths = torch.randint(1, shape.longest + 1, (2 * shape.rows // shape.longest + 64,), generator=g)  # fmt: skip
    ends = lengths.cumsum(0).clamp(max=shape.rows)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), ends))
    offsets[-1] = shape.rows
    ids = torch.repeat_interleave(torch.arange(len(ends)), offsets.diff())
    ids = ids[torch.randperm(shape.rows, generator=g)]
    size = (shape.rows,) if shape.columns == 1 else (shape.rows, shape.columns)
    values = torch.randn(size, generator=g).to(device).requires_grad_()
    made = {"values": values, "offsets": offsets.to(device), "ids": ids.to(device)}
    upstream = torch.randn((len(ends), *size[1:]), generator=g).to(device)
    empty = offsets.diff().eq(0).to(device)
    upstream[empty] = 0.0
    return Inputs(made, ("values",), upstream)


def _scattered(x: Inputs, reduction: str, ids: Tensor) -> Tensor:
    values, count = x["values"], x["offsets"].shape[0] - 1
    zeros = values.new_zeros((count, *values.shape[1:]))
    if reduction == "sum":
        return zeros.index_add(0, ids, values)
    index = ids if values.ndim == 1 else ids[:, None].expand_as(values)
    out: Tensor = zeros.scatter_reduce(0, index, values, _TO_SCATTER[reduction], include_self=False)
    return out


def _logsumexp(x: Inputs, ids: Tensor) -> Tensor:
    """As one writes it: the largest value, the sum of exponentials, the logarithm."""
    values, count = x["values"], x["offsets"].shape[0] - 1
    index = ids if values.ndim == 1 else ids[:, None].expand_as(values)
    shape = (count, *values.shape[1:])
    most = values.detach().new_full(shape, -1e30).scatter_reduce(0, index, values.detach(), "amax")
    total = values.new_zeros(shape).index_add(0, ids, (values - most[ids]).exp())
    return most + total.log()


def case(reduction: str, shape: Shape, by_ids: bool, device: str) -> Case:
    def arguments(x: Inputs) -> dict[str, object]:
        if by_ids:
            return {"segment_ids": x["ids"], "num_segments": x["offsets"].shape[0] - 1}
        return {"cu_seqlens": x["offsets"]}

    def ids_of(x: Inputs) -> Tensor:
        if by_ids:
            found: Tensor = x["ids"]
            return found
        count = x["offsets"].shape[0] - 1
        return torch.repeat_interleave(torch.arange(count, device=device), x["offsets"].diff())

    def truth(x: Inputs) -> list[Tensor]:
        wide = x["values"].detach().double().requires_grad_()
        value = getattr(reference, f"segment_{reduction}")(wide, **arguments(x))
        (slope,) = torch.autograd.grad(value, wide, x.upstream.double())  # type: ignore[union-attr]
        return [value.nan_to_num(neginf=0.0), slope]

    def finite(value: Tensor) -> Tensor:
        return value.nan_to_num(neginf=0.0)  # the few groups without values

    rivals = []
    if not by_ids and reduction != "logsumexp":
        rivals.append(
            Contender(
                "torch.segment_reduce",
                "rival",
                lambda x: finite(
                    torch.segment_reduce(x["values"], reduction, offsets=x["offsets"])
                ),
            )
        )
    plain = (
        (lambda x: finite(_logsumexp(x, ids_of(x))))
        if reduction == "logsumexp"
        else (lambda x: finite(_scattered(x, reduction, ids_of(x))))
    )
    name = "index_add" if reduction == "sum" else "scatter_reduce"
    # Values read once, their gradient written once, and 8 bytes per row that say where it belongs.
    formula = "2*n*d*4 + n*8" if by_ids else "2*n*d*4"
    cost = Cost("bytes", formula, {"n": shape.rows, "d": shape.columns})
    return Case(
        op=f"core.segment_{reduction}",
        mode="fwd+bwd",
        label=f"{shape.label}{', ids' if by_ids else ''}",
        shape=(shape.rows, shape.columns),
        device=device,
        make_inputs=lambda seed: _inputs(seed, shape, device),
        truth=truth,
        contenders=(
            *ours.contenders(
                "hotloop.core",
                f"segment_{reduction}",
                ours.loop_impls(device),
                lambda function, x: finite(function(x["values"], **arguments(x))),
            ),
            *rivals,
            Contender(name, "plain", plain),
        ),
        cost=cost,
        roof=_roofs.copy(int(cost.amount), device),
        threads=1,
    )


def sort_case(n: int, num_keys: int, device: str) -> Case:
    def make(seed: int) -> Inputs:
        g = torch.Generator("cpu").manual_seed(seed)
        return Inputs({"keys": torch.randint(0, num_keys, (n,), generator=g).to(device)}, ())

    def numpy(x: Inputs) -> Tensor:
        return torch.from_numpy(np.argsort(x["keys"].numpy(), kind="stable"))

    cost = Cost("bytes", "n*16", {"n": n})
    return Case(
        op="core.counting_sort",
        label=f"{num_keys} keys",
        shape=(n,),
        device=device,
        make_inputs=make,
        truth=lambda x: [torch.sort(x["keys"], stable=True).indices],
        contenders=(
            *ours.contenders(
                "hotloop.core",
                "counting_sort",
                ours.loop_impls(device),
                lambda function, x: (
                    function(x["keys"], num_keys, order_only=num_keys > 2**20).order
                ),
            ),
            Contender("torch.sort", "plain", lambda x: torch.sort(x["keys"], stable=True).indices),
            *((Contender("numpy.argsort", "rival", numpy),) if device == "cpu" else ()),
        ),
        cost=cost,
        roof=_roofs.copy(int(cost.amount), device),
        threads=1,
    )


def _cases(reduction: str) -> Callable[[Options], list[Case]]:
    def cases(options: Options) -> list[Case]:
        shapes = (Shape("sequences", 2**12, 1, 200),) if options.quick else SHAPES
        return [
            case(reduction, shape, by_ids, options.device)
            for shape in shapes
            for by_ids in (False, True)
        ]

    return cases


def _sort_cases(options: Options) -> list[Case]:
    if options.quick:
        return [sort_case(2**12, 64, options.device)]
    return [sort_case(MANY, k, options.device) for k in (64, 2048, 2**17, 2**40)][
        : 4 if options.sweep else 3
    ]


BENCHES = (
    *(
        Bench(f"core.segment_{r}", f"{r} over ragged groups", _cases(r))
        for r in ("sum", "max", "logsumexp")
    ),
    Bench("core.counting_sort", "stable order of small integer keys", _sort_cases),
)
