# SPDX-License-Identifier: Apache-2.0
"""Valid calls of the ops of the catalogue: cases of the pointwise loop, and ``CALLS`` of ``tests/<room>/cases.py``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hotloop
import pointwise_cases
import torch
from rooms import of_rooms
from torch import Tensor

V, D = 11, 4
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    op: str
    arguments: Callable[[int], Arguments]
    """By name, for a batch of n; a tensor that has a gradient requires it."""
    variant: str = ""
    """What tells calls of the same op apart."""
    room: str = ""
    """Filled in from the folder of the call."""

    @property
    def id(self) -> str:
        return self.variant or self.op

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(getattr(hotloop, self.room), self.op)

    def numbers(self, n: int) -> dict[str, float]:
        """Every number that the call leaves at its default, said out loud."""
        given = self.arguments(n)
        parameters = inspect.signature(self.function).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if type(p.default) in (int, float) and p.name not in given
        }


def generator(n: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(n)


def normal(*shape: int, leaf: bool = False) -> Tensor:
    seed = generator(sum(shape))
    x = torch.randn(shape, generator=seed, dtype=torch.float32, device="cpu")
    return x.requires_grad_() if leaf else x


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=generator(sum(shape) + 1), device="cpu")


def some_ignored(n: int) -> Tensor:
    labels = tokens(n)
    labels[::3] = -100
    return labels


def of_case(case: pointwise_cases.Case) -> Call:
    def arguments(n: int) -> Arguments:
        grad, const = case.inputs(n, seed=n)
        rest = {"reduction": "mean"} if case.only_mean else {}
        leaves = {name: x.requires_grad_() for name, x in grad.items()}
        return {**leaves, **const, **case.kwargs, **rest}

    return Call(case.op, arguments, case.id, case.room)


@functools.cache
def everything() -> list[Call]:
    """Collected when first asked for: the rooms' files import this one."""
    return [*map(of_case, pointwise_cases.CASES), *of_rooms("cases", "CALLS")]


def calls(op: Any) -> list[Call]:
    """Every call that is known of an op; none where its inputs are no tensors."""
    return [call for call in everything() if (call.room, call.op) == (op.room, op.name)]


def calls_of(select: Callable[[Any], bool]) -> list[tuple[Any, Call]]:
    return [(op, call) for op in hotloop.catalog() if select(op) for call in calls(op)]
