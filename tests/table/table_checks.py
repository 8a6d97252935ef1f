# SPDX-License-Identifier: Apache-2.0
"""What tests of tables ask for: an error, rows that are equal or left as they were, threads that go on meanwhile."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator
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


def assert_rows(found: Table | Rows, wanted: Table | Rows) -> None:
    """Keys, values, optimizer state, scores and uses of two tables, or of what they exported, are equal."""
    found, wanted = (x.export() if isinstance(x, Table) else x for x in (found, wanted))
    for name, a, b in zip(wanted._fields, found, wanted):
        np.testing.assert_array_equal(a, b, name)


@contextlib.contextmanager
def unchanged(*tables: Table) -> Iterator[None]:
    """What is called inside leaves every row of the tables as it was."""
    before = [table.export() for table in tables]
    yield
    for table, rows in zip(tables, before):
        assert_rows(table, rows)


@contextlib.contextmanager
def beside(*works: Callable[[], object]) -> Iterator[threading.Event]:
    """Threads that repeat their work until the block ends or one fails, which sets the event and is raised."""
    done, failures = threading.Event(), []

    def repeat(work: Callable[[], object]) -> None:
        try:
            while not done.is_set():
                work()
        except BaseException as error:
            failures.append(error)
            done.set()

    threads = [threading.Thread(target=repeat, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield done
    finally:
        done.set()
        for thread in threads:
            thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"
    if failures:
        raise failures[0]
