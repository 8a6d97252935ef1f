"""Texts of arguments, results and errors that mean the same in every op; ``documented`` puts them into docstrings.

A docstring in the source says what is special about its op. Arguments it does not describe get the text of this file,
in the order of the signature, so that ``help()`` describes all of them.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

ARGUMENTS = {
    "policy_chosen_logps": "log-probability of the preferred answer under the policy, summed over its tokens, shape "
    "(n,), nats. Differentiable.",
    "policy_rejected_logps": "the same of the other answer, shape (n,). Differentiable.",
    "ref_chosen_logps": "log-probability of the preferred answer under the reference, shape (n,).",
    "ref_rejected_logps": "the same of the other answer, shape (n,).",
    "chosen_lengths": "nc, tokens of the preferred answer, shape (n,) or a number. Counts below 1 count as 1.",
    "rejected_lengths": "nr, tokens of the other answer, shape (n,) or a number.",
    "beta": "inverse temperature, > 0.",
    "reduction": '"mean", "sum" or "none".',
    "impl": '"auto", "cpu", "cuda" or "reference".',
}
RETURNS = {
    "reduced": 'Scalar for "mean" and "sum", shape (n,) for "none"; float32, or float64 if any input is float64.',
}
RAISES = {
    "TypeError": "an argument is not a float tensor, or a number is not a number.",
    "ValueError": "shapes or devices differ, or a number is out of range.",
    "NotImplementedError": "the forced impl cannot run these inputs.",
}
_SECTIONS = ("Args", "Returns", "Raises", "Example", "Reference", "Note")
_WIDTH = 100


def documented(
    function: F,
    *,
    arguments: Mapping[str, str] = ARGUMENTS,
    returns: str = RETURNS["reduced"],
    raises: Mapping[str, str] = RAISES,
) -> F:
    """Complete the docstring of ``function`` and return it.

    Raises:
        TypeError: an argument is described neither in the docstring nor in ``arguments``, or the docstring describes
            one that the function does not take.
    """
    head, sections = split(inspect.getdoc(function) or "")
    described = entries(sections.get("Args", ""))
    parameters = inspect.signature(function).parameters
    lines = []
    for name, parameter in parameters.items():
        if name in described:
            lines.append(described.pop(name))
            continue
        if name not in arguments:
            raise TypeError(f"{function.__name__}: {name} is described nowhere.")
        default = parameter.default
        said = "" if default is parameter.empty else f" Default {_shown(default)}."
        lines.append(_entry(name, arguments[name] + said))
    if described:
        raise TypeError(f"{function.__name__}: {', '.join(described)} is no argument.")
    sections["Args"] = "\n".join(lines)
    sections.setdefault("Returns", textwrap.fill(returns, _WIDTH - 8))
    usual = {name: _entry(name, text) for name, text in raises.items()}
    sections["Raises"] = "\n".join({**usual, **entries(sections.get("Raises", ""))}.values())
    parts = [head]
    for name in _SECTIONS:
        if name in sections:
            parts.append(f"{name}:\n{textwrap.indent(sections[name], '    ')}")
    function.__doc__ = "\n\n".join(parts) + "\n"
    return function


def split(doc: str) -> tuple[str, dict[str, str]]:
    """The text before the first section, and the sections by name, without their indentation."""
    pieces = re.split(rf"^({'|'.join(_SECTIONS)}):\n", doc, flags=re.MULTILINE)
    sections = {
        name: textwrap.dedent(body).strip("\n") for name, body in zip(pieces[1::2], pieces[2::2])
    }
    return pieces[0].strip(), {name: body.rstrip() for name, body in sections.items()}


def entries(section: str) -> dict[str, str]:
    """The entries ``name: text`` of a section as they stand, by name."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if start := re.match(r"(\S[^:]*): ", line):
            name = start[1]
            found[name] = line
        elif name:
            found[name] += "\n" + line
    return found


def _entry(name: str, text: str) -> str:
    return textwrap.fill(f"{name}: {text}", _WIDTH - 8, subsequent_indent="    ")


def _shown(value: object) -> str:
    return (
        f'"{value}"'
        if isinstance(value, str)
        else f"{value:g}"
        if type(value) is float
        else repr(value)
    )
