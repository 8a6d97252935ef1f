# SPDX-License-Identifier: Apache-2.0
"""Texts of arguments, results and errors that mean the same in every op; ``documented`` puts them into docstrings.

A docstring in the source says what is special about its op. Arguments it does not describe get the text of this file,
in the order of the signature, so that ``help()`` describes all of them. ``like`` takes what is missing from the
docstring of another op.
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
    "policy_logps": "log-probability of the answer under the policy, summed over its tokens, shape (n,), nats. "
    "Differentiable.",
    "ref_logps": "the same under the reference, shape (n,).",
    "policy_logps_1": "log-probability of the first answer under the policy, summed over its tokens, shape (n,), nats. "
    "Differentiable.",
    "policy_logps_2": "the same of the second answer, shape (n,). Differentiable.",
    "ref_logps_1": "log-probability of the first answer under the reference, shape (n,).",
    "ref_logps_2": "the same of the second answer, shape (n,).",
    "chosen_lengths": "nc, tokens of the preferred answer, integers or floats, shape (n,) or a number. Counts below 1 "
    "count as 1.",
    "rejected_lengths": "nr, the same of the other answer, given together with chosen_lengths.",
    "chosen_nll": "negative log-likelihood of the preferred answer, shape (n,), or one value for the batch; left out "
    "where None. Differentiable.",
    "beta": "inverse temperature, > 0.",
    "reduction": '"mean", "sum" or "none".',
    "impl": '"auto", "cpu", "cuda" or "reference".',
}
REDUCED = 'Scalar for "mean" and "sum", shape (n,) for "none"; float32, or float64 if any input is float64.'
RAISES = {
    "TypeError": "an argument is not a float tensor, or a number is not a number.",
    "ValueError": "shapes or devices differ, or a number is out of range.",
    "NotImplementedError": "the forced impl cannot run these inputs.",
}
_SECTIONS = ("Args", "Returns", "Raises", "Examples", "Reference", "Note")
_IMPORTS = {"import torch": "torch.", "import numpy as np": "np."}
"""What an example imports by itself where it uses it."""
_WIDTH = 100


def documented(
    function: F,
    *,
    arguments: Mapping[str, str] = ARGUMENTS,
    returns: str | None = REDUCED,
    raises: Mapping[str, str] = RAISES,
) -> F:
    """Complete the docstring of ``function``, or of a class, and return it.

    Args:
        function: entries of its docstring come before those of this file; one may describe several arguments, "a, b".
        arguments: by name. Where a text does not say "Default", that of the signature is added.
        returns: of a docstring without ``Returns``. None: it needs none.
        raises: by name of the exception.

    Raises:
        TypeError: an argument is described neither in the docstring nor in ``arguments``, or the docstring describes
            one that the function does not take.
    """
    known = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in arguments:
            text, default = arguments[name], parameter.default
            if default is not parameter.empty and "Default" not in text:
                text += f" Default {_shown(default)}."
            known[name] = _entry(name, text)
    errors = {name: _entry(name, text) for name, text in raises.items()}
    result = None if returns is None else textwrap.fill(returns, _WIDTH - 8)
    return _complete(function, known, result, errors)


def like(other: Callable[..., Any]) -> Callable[[F], F]:
    """Complete a docstring with the arguments, the result and the errors that the one of ``other`` describes."""
    _, sections = split(inspect.getdoc(other) or "")
    known, errors = (entries(sections.get(name, "")) for name in ("Args", "Raises"))
    return lambda function: _complete(function, known, sections.get("Returns", ""), errors)


def _complete(
    function: F, arguments: Mapping[str, str], returns: str | None, errors: Mapping[str, str]
) -> F:
    doc = inspect.getdoc(function)
    if doc is None:  # python -OO takes docstrings away
        return function
    head, sections = split(doc)
    described = _by_argument(entries(sections.get("Args", "")))
    known = _by_argument(arguments) | described
    parameters = inspect.signature(function).parameters
    lines = []
    for name in parameters:
        if name == "self":
            continue
        if name not in known:
            raise TypeError(f"{function.__name__}: {name} is described nowhere.")
        if known[name] not in lines:
            lines.append(known[name])
    if strange := described.keys() - parameters.keys():
        raise TypeError(f"{function.__name__}: {', '.join(strange)} is no argument.")
    sections["Args"] = "\n".join(lines)
    if returns is not None:
        sections.setdefault("Returns", returns)
    sections["Raises"] = "\n".join(
        dict.fromkeys({**errors, **entries(sections.get("Raises", ""))}.values())
    )
    example = sections.get("Examples", "")
    for line, used in _IMPORTS.items():
        if used in example and line not in example:
            sections["Examples"] = example = f">>> {line}\n{example}"
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
    """The entries ``name: text`` or ``name, name: text`` of a section as they stand, by name."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        if start := re.match(r"(\S[^:]*): ", line):
            names = start[1].split(", ")
            found.update(dict.fromkeys(names, line))
        else:
            found.update({name: f"{found[name]}\n{line}" for name in names})
    return found


def _by_argument(described: Mapping[str, str]) -> dict[str, str]:
    """Entries by argument: one, ``a, b: text``, may describe several."""
    return {name: entry for names, entry in described.items() for name in names.split(", ")}


def _entry(name: str, text: str) -> str:
    return textwrap.fill(f"{name}: {text}", _WIDTH - 8, subsequent_indent="    ")


def _shown(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:g}" if isinstance(value, float) else repr(value)
