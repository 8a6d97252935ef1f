"""Kills of a process that trains a table: in a save beside writes, in publishing, in growth. No row is torn or lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hotloop.table import Table

KILL = Path(__file__).with_name("table_kill_rows.py")


@pytest.mark.parametrize("what", ["save", "publish", "grow"])
def test_two_hundred_kills_lose_no_row(tmp_path, what):
    """The program asserts it after each kill; kills before the end and after it must both have been seen."""
    command = [sys.executable, str(KILL), what, str(tmp_path / "x"), "200"]
    # One thread: libgomp's do not survive a fork.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["old"] + seen.get("new", 0) + seen["done"] == 200
    assert seen["old"] >= 20 and seen["done"] >= 3, seen


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda v: v.__setitem__((5, 3), 1.0), "a row is torn"),
        (lambda v: v.__setitem__(5, v[6]), "a row of another key"),
    ],
)
def test_the_program_sees_a_row_that_is_not_whole(monkeypatch, spoil, text):
    monkeypatch.syspath_prepend(str(KILL.parent))
    import table_kill_rows

    table = Table(table_kill_rows.DIM)
    values = table_kill_rows.rows_of(3)
    table.insert_or_assign(table_kill_rows.KEYS, values)
    assert table_kill_rows.write_of(table)[:2] == (3, 3)
    spoil(values)
    table.insert_or_assign(table_kill_rows.KEYS, values)
    with pytest.raises(AssertionError, match=text):
        table_kill_rows.write_of(table)
    assert np.isfinite(values).all()
