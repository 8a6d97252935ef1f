"""How the tests of this room ask for an error, and for tables that it has left as they were."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hotloop.table import Table
from hotloop.table.results import Rows

# What many arguments say.
NO_ARRAY = "expected a NumPy, torch or CuPy array, got"
NO_FLOAT = "expected dtype float32, float64, float16, bfloat16, got"
NO_SEED = "expected an integer >= 0 and <= 18446744073709551615, got"


def refused(text: str, kind: type[Exception] = ValueError) -> Any:
    """An error whose text holds this one, or starts with it where it names the op; … stands for anything."""
    start = "^" if text.startswith("[") and not issubclass(kind, OSError) else ""  # [Errno ...]
    return pytest.raises(kind, match=start + re.escape(text).replace("…", ".*"))


def grouped(groups: dict[Any, list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
    """The rows of all groups, each behind the key of its group: the kind of error, or the op and the kind."""
    return [
        (*(key if isinstance(key, tuple) else (key,)), *row)
        for key, rows in groups.items()
        for row in rows
    ]


def assert_rows(found: Rows, wanted: Rows) -> None:
    """Keys, values, optimizer state, scores and uses are equal."""
    for name, a, b in zip(wanted._fields, found, wanted):
        np.testing.assert_array_equal(a, b, name)


@contextlib.contextmanager
def unchanged(*tables: Table) -> Iterator[None]:
    """What is called inside leaves every row of the tables as it was."""
    before = [table.export() for table in tables]
    yield
    for table, rows in zip(tables, before):
        assert_rows(table.export(), rows)
