# SPDX-License-Identifier: Apache-2.0
"""Columns of the pointwise loop that need a step before it: checks of their values, conversions, added terms.

``tokens``, ``probability`` and ``marks`` are ranges (``front/declare.py``) of constants of the row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..front import at_run_time, check, environment, native, plain
from .pointwise import Row, given


def exact(value: Tensor) -> Tensor:
    """Return ``value`` in float32 or better: nothing in front of the head rounds to half."""
    return value if value.dtype == torch.float64 else value.float()


class _Tokens:
    """Token counts, in a dtype that holds them; None is 1. Heads take at least 1."""

    absent = 1.0

    def __call__(self, op: str, name: str, value: Row | None) -> Row:
        if value is None:
            return self.absent
        if isinstance(value, Tensor):
            return exact(check.float_like(op, name, value))
        return max(1.0, check.number(op, name, value, at_least=0))

    def wrong(self) -> Iterator[tuple[Any, type[Exception]]]:
        yield from ((-1, ValueError), (math.nan, ValueError), ("1", TypeError))


tokens = _Tokens()


def count(tokens: Row | None) -> Tensor:
    """A number of tokens as a divisor, in the bodies of losses: at least 1."""
    return given(tokens).clamp(min=1)


# What the compiled checks of rows read: 0.5 us for 8 rows, where a comparison and a reduction of torch take 5.
_NATIVE = (torch.float32, torch.float64)
# Up to here a list of Python numbers is the cheapest look at a tensor of any dtype.
_SHORT = 64


def _seen(value: Tensor) -> bool:
    """Whether values may be looked at: on a GPU that would wait for the device, so it is left to HOTLOOP_CHECK."""
    if not (value.is_cpu or environment.checks_on()):
        return False
    return not torch._C._are_functorch_transforms_active()


class _Marks:
    """True and False, or 1 and 0, in any dtype, shape (n,). -1 for a bad answer would be read as a number."""

    def __call__(self, op: str, name: str, value: Tensor) -> Tensor:
        value = check.tensor(op, name, value)
        if value.dtype is torch.bool:
            return value
        if torch.compiler.is_compiling():
            return at_run_time.checked("marks", op, name, value)
        if not _seen(value):
            return value
        if value.dtype in _NATIVE and value.is_cpu and value.ndim == 1:
            if native.core.pointwise.are_marks(value):
                return value
        plain.check(op, name, value)
        if value.numel() <= _SHORT:
            wrong = [x for x in value.reshape(-1).tolist() if x not in (0, 1)]
        else:
            wrong = value[(value != 0) & (value != 1)][:1].tolist()
        if wrong:
            raise ValueError(
                f"[{op}] {name}: expected True and False, or 1 and 0, got {wrong[0]}. "
                f"Pass {name} > 0 where the marks are 1 and -1."
            )
        return value

    def wrong(self) -> Iterator[tuple[Any, type[Exception]]]:
        yield from (
            (torch.tensor([-1, 1], device="cpu"), ValueError),
            (torch.tensor([math.nan, 1.0], device="cpu"), ValueError),
            (1, TypeError),
        )


marks = _Marks()
at_run_time.look("marks")(marks)


@dataclass(frozen=True)
class Probability:
    """A number from 0 to 1, or from 0 to less than ``below``, or a tensor of such, shape (n,)."""

    below: float | None = None

    def __call__(self, op: str, name: str, value: Row) -> Row:
        below = self.below
        if not isinstance(value, Tensor):
            return check.number(
                op, name, value, at_least=0, below=below, at_most=None if below else 1
            )
        value = check.tensor(op, name, value)
        if torch.compiler.is_compiling():
            numbers = () if below is None else (below,)
            return exact(at_run_time.checked("probability", op, name, value, (), numbers))
        if value.dtype is torch.bool or not _seen(value):
            return exact(value)
        high = 1.0 if below is None else below
        if value.dtype in _NATIVE and value.is_cpu and value.ndim == 1:
            if native.core.pointwise.within(value, high, below is not None):
                return value
        elif value.numel() == 0:
            return exact(value)
        plain.check(op, name, value)
        _check_range(op, name, value, below, high)
        return exact(value)

    def wrong(self) -> Iterator[tuple[Any, type[Exception]]]:
        high = 1.1 if self.below is None else self.below
        for value in (-0.1, high, math.nan):
            yield value, ValueError
            yield torch.tensor([0.0, value], device="cpu"), ValueError
        yield "1", TypeError


probability = Probability()


@at_run_time.look("probability")
def _look_at_probability(op: str, name: str, value: Tensor, below: float | None = None) -> None:
    Probability(below)(op, name, value)


def _check_range(op: str, name: str, value: Tensor, below: float | None, high: float) -> None:
    least, largest = (float(v) for v in torch.aminmax(value.detach().double()))  # NaN if any is
    if least >= 0 and (largest <= high if below is None else largest < high):
        return
    top = f"<= {high:g}" if below is None else f"< {high:g}"
    got = largest if least >= 0 else least
    raise ValueError(f"[{op}] {name}: expected numbers >= 0 and {top}, got {got:g}.")


def check_rows(op: str, ndim: int | None = 1, **rows: Tensor) -> None:
    """Check float tensors that the front door computes with itself: one shape, one device."""
    names = list(rows)
    first = check.float_tensor(op, names[0], rows[names[0]], ndim=ndim)
    for name in names[1:]:
        value = check.float_tensor(op, name, rows[name])
        if value.shape != first.shape:
            raise ValueError(
                f"[{op}] {name}: expected shape {tuple(first.shape)} like {names[0]}, "
                f"got {tuple(value.shape)}. Pass one value for each."
            )
        check.same_place(op, name, value, names[0], first)


def add_term(
    op: str, loss: Tensor, name: str, term: Tensor, like: str, first: Tensor, reduction: str
) -> Tensor:
    """Add ``term``, reduced like the loss. Only a mean may be over a number of rows of its own."""
    check.same_place(op, name, term, like, first)
    if term.numel() == 0 and first.numel() != 0:
        raise ValueError(
            f"[{op}] {name}: expected at least one row beside {like}, got none. A mean over nothing is NaN."
        )
    if reduction == "mean":
        return loss + term.mean()
    if term.shape != first.shape:
        raise ValueError(
            f"[{op}] {name}: expected shape {tuple(first.shape)} like {like} for reduction="
            f"{reduction!r}, got {tuple(term.shape)}. Use reduction='mean' for other counts."
        )
    return loss + (term.sum() if reduction == "sum" else term)
