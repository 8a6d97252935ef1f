# SPDX-License-Identifier: Apache-2.0
"""Kills of a process that writes files or trains a table: in saves, in publishing, in growth. Nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import table_kill
from hotloop.table import Table


@pytest.mark.parametrize("what", table_kill.WRITERS)
def test_two_hundred_kills_lose_nothing(tmp_path, what):
    """And no finished write: the program asserts it after each kill. It must have seen every kind of kill."""
    command = [sys.executable, table_kill.__file__, what, str(tmp_path / "x"), "200"]
    # One thread: libgomp's do not survive a fork.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["old"] + seen.get("new", 0) + seen["done"] == 200
    assert seen["old"] >= 20 and seen["done"] >= 3, seen
    assert seen["left-overs"] or not what.startswith("files-"), seen


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda v: v.__setitem__((5, 3), 1.0), "a row is torn"),
        (lambda v: v.__setitem__(5, v[6]), "a row of another key"),
    ],
)
def test_the_program_sees_a_row_that_is_not_whole(spoil, text):
    table, values = Table(table_kill.DIM), table_kill.rows_of(3)
    table.insert_or_assign(table_kill.KEYS, values)
    assert table_kill.write_of(table)[:2] == (3, 3)
    spoil(values)
    table.insert_or_assign(table_kill.KEYS, values)
    with pytest.raises(AssertionError, match=text):
        table_kill.write_of(table)
    assert np.isfinite(values).all()
