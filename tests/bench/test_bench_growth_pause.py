# SPDX-License-Identifier: Apache-2.0
"""The measurement of pauses while a table grows, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.table import growth_pause

pytestmark = pytest.mark.alone


def test_one_run_grows_and_the_control_does_not() -> None:
    grown = growth_pause.measure(2000, 40_000, 2, grows=True, threads=1, slow_ms=0.0)
    control = growth_pause.measure(2000, 40_000, 2, grows=False, threads=1, slow_ms=1e6)
    assert [rows for rows, _ in grown.growths] == sorted({rows for rows, _ in grown.growths})
    assert len(grown.growths) >= 4 and not control.growths
    for run in (grown, control):
        assert run.insert["calls"] == -(-38_000 // growth_pause.BATCH)
        for calls in (run.read, run.insert):
            assert calls["calls"] > 0
            assert 0 < calls["p50"] <= calls["p99"] <= calls["p99.9"] <= calls["max"]
    assert len(grown.slow_inserts) == grown.insert["calls"] and not control.slow_inserts
    # The call that grew is among those that were kept.
    assert {ms for _, ms in grown.growths} <= {ms for _, ms in grown.slow_inserts}


def test_percentiles_are_those_of_the_calls() -> None:
    calls = growth_pause.Calls(begun=[0, 10**6, 2 * 10**6], took=[10**6, 3 * 10**6, 2 * 10**6])
    assert calls.summary() == pytest.approx(
        {"calls": 3, "p50": 2.0, "p99": 2.98, "p99.9": 2.998, "max": 3.0}
    )
    assert calls.slow(10**6, 1.5) == [(0.0, 3.0), (1.0, 2.0)]


def test_a_wrong_read_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    real = growth_pause.Table.find

    def find(self: growth_pause.Table, keys: np.ndarray) -> object:
        found = real(self, keys)
        found.found[0] = False
        return found

    monkeypatch.setattr(growth_pause.Table, "find", find)
    with pytest.raises(AssertionError, match="reads were wrong"):
        growth_pause.measure(2000, 4000, 2, grows=True, threads=1)


def test_the_command_prints_a_table_and_writes_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pauses.jsonl"
    size = ["--rows", "1000", "--until", "9000", "--dim", "2", "--threads", "1"]
    growth_pause.main([*size, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["grows"], row["dim"]) for row in rows] == [(True, 2), (False, 2)]
    text = capsys.readouterr().out
    assert text.count("insert") == 2 and "has room" in text and "growths: " in text
