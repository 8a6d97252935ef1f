# SPDX-License-Identifier: Apache-2.0
"""Losses of all rooms that run through the pointwise loop, one thread: many rows, and the eight of a step.

A room writes its losses in ``bench/<room>/rows.py``, as a tuple ``ROWS``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import hotloop
import hotloop.reference
import torch
from torch import Tensor

from .. import _roofs
from .._case import Bench, Case, Cost, Inputs, Target
from .._options import Options
from .._registry import attribute_of_rooms
from ..contenders import ours, plain

MANY, FEW = 2**20, 8

_MANY_TARGETS = (
    Target("pair.eager", "torch", 1 / 8),
    Target("pair.compile", "torch.compile", 1 / 1.5),
)
_FEW_TARGETS = (Target("pair.few", "torch", 1.0),)


def answers(n: int, g: torch.Generator) -> dict[str, Tensor]:
    """Answers of 20 to 400 tokens at about one nat each; the reference differs by a few nats.

    Chosen and rejected: ``pc`` and ``pr`` of the policy, ``rc`` and ``rr`` of the reference, ``nc`` and ``nr`` tokens,
    ``mc`` and ``mr`` means per token. Unpaired: ``good`` marks half of the rows, whose numbers are in ``chosen``.
    """

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=g, device=g.device) * (high - low) + low

    def normal(scale: float) -> Tensor:
        return torch.randn(n, generator=g, device=g.device) * scale

    nc, nr = uniform(20, 400).round(), uniform(20, 400).round()
    pc, pr = -nc * uniform(0.5, 1.5), -nr * uniform(0.5, 1.5)
    order = torch.randperm(n, generator=g, device=g.device)
    chosen, rejected = order[: n // 2].sort().values, order[n // 2 :].sort().values
    kl = -uniform(20, 400)
    return {
        "pc": pc, "pr": pr, "rc": pc + normal(5), "rr": pr + normal(5), "nc": nc, "nr": nr,
        "mc": pc / nc, "mr": pr / nr, "nll": -pc / nc,
        "kl": kl, "ref_kl": kl - normal(5) - 1, "chosen": chosen, "rejected": rejected,
        "good": torch.zeros(n, device=g.device).index_fill_(0, chosen, 1.0),
    }  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A loss, and the same up to the mean in eager torch: ``rival(*columns, *numbers among the keywords)``."""

    loss: str
    rival: Callable[..., Tensor]
    grad: tuple[str, ...]
    """Columns that are differentiated, by their names in ``inputs``; they come first."""
    const: tuple[str, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int, torch.Generator], dict[str, Tensor]] = answers
    """Columns of n rows, drawn on the generator's device."""
    rival_const: tuple[str, ...] | None = None
    """Where the rival takes other columns than ``const``."""
    quick: bool = False
    """Part of a quick run; every row is compared with its rival by the tests."""
    room: str = ""
    """Filled in from the folder."""

    @property
    def op(self) -> str:
        return f"{self.room}.{self.loss}"

    def make(self, seed: int, n: int, device: str) -> Inputs:
        made = self.inputs(n, torch.Generator(device).manual_seed(seed))
        used = {*self.grad, *self.const, *(self.rival_const or ())}
        tensors = {name: x.requires_grad_(name in self.grad) for name, x in made.items() if name in used}  # fmt: skip
        return Inputs(tensors, self.grad)


def rows() -> tuple[Row, ...]:
    return tuple(replace(row, room=room) for room, row in attribute_of_rooms("rows", "ROWS"))


def case(row: Row, n: int, device: str, targets: tuple[Target, ...] = ()) -> Case:
    columns = (*row.grad, *row.const)
    rival_columns = (*row.grad, *(row.const if row.rival_const is None else row.rival_const))
    numbers = [x for x in row.keywords.values() if isinstance(x, (int, float))]

    def forward(function: ours.Function, x: Inputs) -> Tensor:
        return function(*(x[name] for name in columns), **row.keywords)  # type: ignore[no-any-return]

    def truth(x: Inputs) -> list[Tensor]:
        wide = {name: x[name].detach().double() for name in columns}
        leaves = [wide[name].requires_grad_() for name in row.grad]
        reference = getattr(getattr(hotloop.reference, row.room), row.loss)
        value = reference(*wide.values(), **row.keywords)
        return [value, *torch.autograd.grad(value, leaves)]

    # float32 columns read once, and one gradient written per differentiable column.
    cost = Cost("bytes", f"{2 * len(row.grad) + len(row.const)}*n*4", {"n": n})
    return Case(
        op=row.op,
        mode="fwd+bwd",
        shape=(n,),
        device=device,
        make_inputs=lambda seed: row.make(seed, n, device),
        truth=truth,
        contenders=(
            *ours.contenders(f"hotloop.{row.room}", row.loss, ours.loop_impls(device), forward),
            *plain.eager_and_compiled(
                row.rival, lambda x: (*(x[name] for name in rival_columns), *numbers)
            ),
        ),
        cost=cost,
        roof=_roofs.copy(int(cost.amount), device) if n >= 2**14 else None,
        targets=targets,
        # On a GPU the sets together have to be larger than its last cache; eight pairs never are.
        sets=12 if device == "cuda" else 3,
        threads=1,
    )


def _cases(row: Row, options: Options) -> list[Case]:
    device = options.device
    if options.quick:
        return [case(row, n, device) for n in (2**12, FEW)] if row.quick else []
    on_cpu = device == "cpu"
    found = [
        case(row, MANY, device, _MANY_TARGETS if on_cpu else ()),
        case(row, FEW, device, _FEW_TARGETS if on_cpu else ()),
    ]
    if not on_cpu:
        found.append(case(row, 2**24, device))
    if options.sweep:
        found += [case(row, 2**k, device) for k in (6, 9, 12, 15, 18)]
    return found


def _summary(row: Row) -> str:
    """The first line of the loss's docstring."""
    function = getattr(getattr(hotloop, row.room), row.loss, None)
    return (inspect.getdoc(function) or row.loss).splitlines()[0].rstrip(".")


def benches() -> list[Bench]:
    return [Bench(row.op, _summary(row), functools.partial(_cases, row)) for row in rows()]
