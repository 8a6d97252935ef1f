# SPDX-License-Identifier: Apache-2.0
"""Ops declared once: a function and the ranges of its arguments become a public function that checks them.

The public function is compiled from the signature of the declared one, so that it takes the same arguments at the cost
of a plain call, and type checkers, ``help()`` and ``inspect`` see the whole signature.
"""

from __future__ import annotations

import functools
import inspect
import linecache
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar, cast, get_args, get_origin

from .. import vocabulary
from . import check

F = TypeVar("F", bound=Callable[..., Any])


class Range(Protocol):
    """Checks an argument and returns it in the form the loops take. Ranges live in ``ranges`` and in rooms."""

    def __call__(self, op: str, name: str, value: Any, /) -> Any: ...

    def wrong(self) -> Iterator[tuple[Any, type[Exception]]]:
        """Values outside the range, with the error that refuses them."""
        ...


@dataclass(frozen=True)
class Declared:
    """What is known of a declared op."""

    function: Callable[..., Any]
    body: Callable[..., Any]
    ranges: Mapping[str, Range]
    choices: Mapping[str, tuple[str, ...]]
    together: tuple[tuple[str, ...], ...]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def room(self) -> str:
        return self.function.__module__.split(".")[1]


OPS: dict[str, Declared] = {}
"""Every declared op of the modules imported so far, by ``room.name``."""


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def together(op: str, **values: object) -> bool:
    """Return whether the values are given; raise if only some of them are."""
    missing = [name for name, value in values.items() if value is None]
    if missing and len(missing) < len(values):
        given = next(name for name, value in values.items() if value is not None)
        raise ValueError(
            f"[{op}] {missing[0]}: expected a value beside {given}, got None. Pass both or neither."
        )
    return not missing


def op(
    body: F,
    call: str,
    names: Mapping[str, Any],
    ranges: Mapping[str, Range],
    pairs: tuple[tuple[str, ...], ...] = (),
) -> F:
    """Make the public function of ``body``: it checks its arguments, then returns ``call``.

    Args:
        body: the declared function; its docstring is completed in place.
        call: the expression that the public function returns, over its arguments and ``names``.
        ranges: what arguments may be. A range is not asked about None where that is the default, unless it has an
            attribute ``absent``: the value that None stands for.
        pairs: groups of arguments that are given all or none.
    """
    vocabulary.documented(body)
    name, signature = body.__name__, inspect.signature(body)
    hints = typing.get_type_hints(body)
    choices: dict[str, tuple[str, ...]] = {}
    scope: dict[str, Any] = {**names, "_choice": check.choice, "_together": together}
    head: list[str] = []
    lines: list[str] = []
    for key, parameter in signature.parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in head:
            head.append("*")
        default = parameter.default
        if default is parameter.empty:
            head.append(key)
        else:
            scope[f"_default_{key}"] = default
            head.append(f"{key}=_default_{key}")
        if key in ranges:
            scope[f"_range_{key}"] = ranges[key]
            checked = f"{key} = _range_{key}({name!r}, {key!r}, {key})"
            takes_none = default is None and not hasattr(ranges[key], "absent")
            lines.append(f"if {key} is not None: {checked}" if takes_none else checked)
        elif get_origin(hints[key]) is Literal and key not in ("reduction", "impl"):
            choices[key] = scope[f"_choices_{key}"] = get_args(hints[key])
            lines.append(f"_choice({name!r}, {key!r}, {key}, _choices_{key})")
    lines[:0] = [f"_together({name!r}, {', '.join(f'{k}={k}' for k in group)})" for group in pairs]
    source = "\n    ".join([f"def {name}({', '.join(head)}):", *lines, f"return {call}"]) + "\n"
    filename = f"<{body.__module__}.{name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    exec(compile(source, filename, "exec"), scope)
    function = functools.update_wrapper(scope[name], body)
    OPS[f"{body.__module__.split('.')[1]}.{name}"] = Declared(
        function, body, ranges, choices, pairs
    )
    return cast(F, function)


def composed(
    *, ranges: Mapping[str, Range], together: tuple[tuple[str, ...], ...] = ()
) -> Callable[[F], F]:
    """Declare an op that is written over fused ops: with impl="reference" the same body is the reference."""

    def declared(body: F) -> F:
        taken = parameters(body)
        arguments = [k if p.kind is not p.KEYWORD_ONLY else f"{k}={k}" for k, p in taken.items()]
        return op(body, f"_body({', '.join(arguments)})", {"_body": body}, ranges, together)

    return declared


def references(room: str, names: dict[str, Any]) -> list[str]:
    """Put the declared ops of a room, as their own references, into ``names``; return what they are called."""
    found = [name for op, name in (full.split(".") for full in OPS) if op == room]
    names.update({name: reference_of(OPS[f"{room}.{name}"].function) for name in found})
    return found


def reference_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op with ``impl="reference"``, and without that argument."""

    @functools.wraps(function)
    def reference(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs, impl="reference")

    signature = inspect.signature(function)
    kept = [p for p in signature.parameters.values() if p.name != "impl"]
    reference.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return reference
