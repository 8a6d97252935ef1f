# SPDX-License-Identifier: Apache-2.0
"""Results before times: every contender against the same op in higher precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ._case import Case, Contender, Inputs, Verdict, step

T = TypeVar("T")


# Errors this small need no comparison with plain torch's: a few roundings of the result itself.
_FLOOR = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 1e-3, "float64": 1e-12}
# Plain torch at the same dtype has to stay below this, or the bench itself is wrong.
_CEILING = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2, "float64": 1e-9}
_BLOCK = 2**24


class CheckFailed(Exception):
    """Contenders disagree; the text says which and by how much."""


@dataclass(frozen=True)
class Checked:
    errors: dict[str, list[float]]
    """Relative L2 error of value and gradients, by contender."""
    disagree: dict[str, str]
    """Contenders outside their limit, with the numbers."""
    broken: dict[str, str]
    """Contenders that raised, with the message."""


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth| in the L2 norm; infinite for a wrong shape, NaN or infinity."""
    if found.shape != truth.shape:
        return math.inf
    difference = size = 0.0
    for a, b in zip(found.detach().reshape(-1).split(_BLOCK), truth.reshape(-1).split(_BLOCK)):
        wide = b.double()
        difference += float((a.double() - wide).square().sum())
        size += float(wide.square().sum())
    error = math.sqrt(difference) / max(math.sqrt(size), 1e-300)
    return error if math.isfinite(error) else math.inf


def check(
    case: Case, contenders: Sequence[Contender], inputs: Inputs, judge: bool = True
) -> Checked:
    """Compare every contender with the truth.

    |error| <= k * (error of plain torch at the same dtype), or k / 2 floors of the dtype where that
    is more. Without a plain contender the ceiling takes the place of its error. A case with a judge
    leaves it to the judge; with ``judge=False`` its contenders only have to run.
    """
    if case.judge is not None and judge:
        return _judged(case.judge, contenders, inputs)
    if case.judge is not None:
        ran = Checked({}, {}, {})
        for contender in (c for c in contenders if c.checked):
            attempt(partial(step, contender, inputs, case.mode), ran.broken, contender.name)
        return ran
    assert case.truth is not None
    truth = [t.detach() for t in case.truth(inputs)]
    errors: dict[str, list[float]] = {}
    disagree: dict[str, str] = {}
    broken: dict[str, str] = {}
    for contender in (c for c in contenders if c.checked):
        found = attempt(partial(step, contender, inputs, case.mode), broken, contender.name)
        if found is None:
            continue
        if len(found) != len(truth):
            errors[contender.name] = [math.inf] * len(truth)
            continue
        errors[contender.name] = [relative_error(a, b) for a, b in zip(found, truth)]
    floor, ceiling = _FLOOR[case.dtype], _CEILING[case.dtype]
    plain = next(
        (errors[c.name] for c in contenders if c.role == "plain" and c.name in errors), None
    )
    for contender in contenders:
        if contender.name not in errors:
            continue
        if contender.role == "plain":
            limits = [ceiling] * len(truth)
        else:
            base = plain or [ceiling / contender.k] * len(truth)
            limits = [contender.k * max(e, floor / 2) for e in base]
        found_errors = errors[contender.name]
        if not all(e <= limit for e, limit in zip(found_errors, limits)):
            disagree[contender.name] = (
                f"{contender.name} is off by {_numbers(found_errors)} (value, gradients), "
                f"allowed {_numbers(limits)}"
            )
    return Checked(errors, disagree, broken)


def _judged(
    judge: Callable[[Contender, Inputs], Verdict], contenders: Sequence[Contender], inputs: Inputs
) -> Checked:
    found = Checked({}, {}, {})
    for contender in (c for c in contenders if c.checked):
        verdict = attempt(partial(judge, contender, inputs), found.broken, contender.name)
        if verdict is None:
            continue
        found.errors[contender.name] = verdict.errors
        if verdict.complaint:
            found.disagree[contender.name] = f"{contender.name} {verdict.complaint}"
    return found


def attempt(call: Callable[[], T], broken: dict[str, str], name: str) -> T | None:
    """Run a contender; a failure of any kind is noted under its name instead of ending the run."""
    try:
        return call()
    except Exception as error:
        broken[name] = first_line(error)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{x:.1e}" for x in values)
