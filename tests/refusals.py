# SPDX-License-Identifier: Apache-2.0
"""Calls that are refused, as tables: the text of an error, and the argument that brings it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Table = dict[str, Any]
"""By text, the value of the argument that the text begins with, or a dictionary of arguments."""


def each(values: Table, types: Table) -> list[Any]:
    """(text, what is changed in a valid call, error) of each row: ``ValueError``s, then ``TypeError``s."""
    return [
        pytest.param(text, x if isinstance(x, dict) else {text.partition(":")[0]: x}, kind, id=text)
        for kind, table in ((ValueError, values), (TypeError, types))
        for text, x in table.items()
    ]


def refused(values: Table, types: Table) -> Any:
    """Run a test of ``text``, ``changes`` and ``kind`` over both tables."""
    return pytest.mark.parametrize(("text", "changes", "kind"), each(values, types))


def assert_refused(
    call: Callable[..., Any], arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    """The call raises, and the error begins with the name of the op and ``text``."""
    with pytest.raises(kind, match=rf"^\[{call.__name__}\] {text}"):
        call(**arguments)
