# SPDX-License-Identifier: Apache-2.0
"""What a bench is made of: inputs, contenders, a cost, targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ._options import Options

Roof = Callable[[], Callable[[], object]]
"""Allocates for a plain copy or product and returns it."""
Role = Literal["ours", "rival", "plain", "compiled", "floor", "roof"]


@dataclass
class Inputs:
    """One input set: ``wrt`` is differentiated, ``upstream`` is the gradient from above."""

    tensors: dict[str, Any]
    wrt: tuple[str, ...]
    upstream: Tensor | None = None

    def __getitem__(self, name: str) -> Any:
        return self.tensors[name]

    def pick(self, *names: str) -> tuple[Any, ...]:
        return tuple(self.tensors[name] for name in names)

    def leaves(self) -> list[Tensor]:
        return [self.tensors[name] for name in self.wrt]


@dataclass(frozen=True)
class Contender:
    """One way to compute the op: ``forward`` gives the value, autograd the gradients.

    A "floor" is the bare work (matrix products, say) without a result: timed, never checked. Other
    contenders may be off by ``k`` times the error of plain torch at the same dtype; a k above 2
    says why.
    """

    name: str
    role: Role
    forward: Callable[[Inputs], Any]
    k: float = 2.0
    why: str = ""
    compiles: bool = False
    """Runs code that torch.compile generates."""
    elsewhere: bool = False
    """Works in another process, so that its memory is not measured."""

    @property
    def checked(self) -> bool:
        return self.role not in ("floor", "roof")


@dataclass(frozen=True)
class Verdict:
    """What a ``Case.judge`` says of a contender."""

    errors: list[float]
    """Deviations for the row; what they are is the judge's to say."""
    complaint: str = ""
    """Why the contender must not be timed, with the numbers; empty if it may."""


@dataclass(frozen=True)
class Missing:
    """A contender that cannot run here, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Lazy:
    """A contender whose library is imported when it is first wanted."""

    name: str
    resolve: Callable[[], Contender | Missing]


Entry = Contender | Missing | Lazy


@dataclass(frozen=True)
class Cost:
    """The least work of a step: a formula over ``dims``, in flops or bytes."""

    unit: Literal["flops", "bytes"]
    formula: str
    dims: dict[str, int]

    @property
    def amount(self) -> float:
        # A literal of this folder; evaluated, so that text and number in a row cannot differ.
        return float(eval(self.formula, {"__builtins__": {}}, dict(self.dims)))


@dataclass(frozen=True)
class Target:
    """Ours over the rival is to stay at or below ``ratio``, in time or in peak memory."""

    id: str
    rival: str
    ratio: float
    what: Literal["time", "memory"] = "time"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape and dtype on one device."""

    op: str
    mode: Literal["fwd", "fwd+bwd", "step"] = "fwd"
    """"step": ``forward`` is a whole training step, its own backward included."""
    label: str = ""
    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"
    make_inputs: Callable[[int], Inputs]
    truth: Callable[[Inputs], list[Tensor]] | None = None
    """Value and gradients in higher precision, from ``hotloop.reference``; None with a judge."""
    contenders: Sequence[Entry]
    cost: Cost
    roof: Roof | None = None
    """A plain copy or product of the same shape; None for no roof."""
    roof_amount: float | None = None
    """What the roof does, in the unit of the cost; None for as much as the cost."""
    targets: tuple[Target, ...] = ()
    sets: int = 3
    threads: int | None = None
    judge: Callable[[Contender, Inputs], Verdict] | None = None
    """Takes the place of the comparison with ``truth`` where results are random."""

    @property
    def key(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{self.op} {self.mode} {size} {self.dtype} {self.label}".strip()


@dataclass(frozen=True)
class Bench:
    """One op and the cases it is measured at."""

    op: str
    summary: str
    cases: Callable[[Options], list[Case]]


def on_cpu(cases: Callable[[Options], list[Case]]) -> Callable[[Options], list[Case]]:
    """No cases on other devices."""
    return lambda options: cases(options) if options.device == "cpu" else []


def step(contender: Contender, inputs: Inputs, mode: str) -> list[Tensor]:
    """One step: value, and gradients of the leaves where ``mode`` asks for them."""
    if mode != "fwd+bwd" or not contender.checked:
        with torch.set_grad_enabled(mode == "step"):
            value = contender.forward(inputs)
        if isinstance(value, Tensor):
            return [value]
        return [x for x in value if isinstance(x, Tensor)] if isinstance(value, tuple) else []
    value = contender.forward(inputs)
    upstream = inputs.upstream
    if upstream is not None and upstream.dtype != value.dtype:
        upstream = upstream.to(value.dtype)
    return [value, *torch.autograd.grad(value, inputs.leaves(), upstream)]


def resolve(entry: Entry) -> Contender | Missing:
    return entry.resolve() if isinstance(entry, Lazy) else entry
