# SPDX-License-Identifier: Apache-2.0
"""Keywords a function does not take: the error names the one that was meant, in the house form."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def known(
    hints: Mapping[str, str] | Callable[[str, Any], str | None],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Answer an unknown keyword with the hint for it, or with the nearest name and the list of all.

    Args:
        hints: what to say to a keyword of another library or another function, by keyword, or as a function of it and
            its value; whole sentences.
    """
    hint = hints if callable(hints) else lambda name, value: hints.get(name)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        op = function.__name__
        names = tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for name, value in kwargs.items():
                if name not in names:
                    raise TypeError(refusal(op, name, names, hint(name, value)))
            return function(*args, **kwargs)

        return call

    return decorate


def refusal(op: str, name: str, names: tuple[str, ...], hint: str | None) -> str:
    if hint is None:
        near = difflib.get_close_matches(name, names, 1)
        hint = f"Did you mean {near[0]}?" if near else "Leave it out."
    return f"[{op}] {name}: expected one of {', '.join(names)}, got an unknown keyword. {hint}"
