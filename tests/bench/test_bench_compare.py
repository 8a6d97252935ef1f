# SPDX-License-Identifier: Apache-2.0
"""The regression gate: it fails on a slowed row, and passes on noise."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import _compare, _row

Rows = list[_row.Row]


def scaled(rows: Rows, factor: float, role: str | None = None) -> Rows:
    """Rows whose times are multiplied, all or those of one role."""
    names = ("median_us", "p20_us", "p80_us")
    return [
        {**row, **{name: row[name] * factor for name in names}}
        if role in (None, row["role"])
        else row
        for row in rows
    ]


def noisy(rows: Rows, seed: int, size: float) -> Rows:
    draw = random.Random(seed)
    return [row for one in rows for row in scaled([one], 1 + draw.uniform(-size, size))]


def verdicts(before: Rows, after: Rows, **how: Any) -> list[str]:
    return [finding.verdict for finding in _compare.gate(before, after, **how)]


@pytest.mark.parametrize("seed", range(20))
def test_noise_passes(rows: Rows, seed: int) -> None:
    assert verdicts(rows, noisy(rows, seed, 0.04)) == ["ok"] * 3


@pytest.mark.parametrize("factor", [1.3, 2.0, 100.0])
def test_a_slowed_row_fails(rows: Rows, factor: float) -> None:
    assert verdicts(rows, scaled(rows, factor, "ours")) == ["slower"] * 3


@pytest.mark.parametrize("at", range(3))
def test_one_slowed_row_among_others_fails(rows: Rows, at: int) -> None:
    ours = [row for row in rows if row["role"] == "ours"]
    after = [scaled([row], 1.5)[0] if row is ours[at] else row for row in rows]
    expected = ["ok"] * 3
    expected[at] = "slower"
    assert verdicts(rows, after) == expected


def test_a_busy_machine_passes(rows: Rows) -> None:
    assert verdicts(rows, scaled(rows, 1.6)) == ["ok"] * 3


def test_a_slowdown_hidden_by_a_faster_machine_fails(rows: Rows) -> None:
    after = scaled(scaled(rows, 0.5), 1.6, "ours")
    assert verdicts(rows, after) == ["slower"] * 3


def test_a_slowdown_inside_the_spread_or_the_tolerance_passes(rows: Rows) -> None:
    wide = [{**row, "p80_us": row["median_us"] * 2} for row in rows]
    assert verdicts(wide, scaled(wide, 1.5, "ours")) == ["ok"] * 3
    assert verdicts(rows, scaled(rows, 1.3, "ours"), tolerance=0.4) == ["ok"] * 3


@pytest.mark.parametrize(("factor", "verdict"), [(1.0999, "ok"), (1.1001, "slower")])
def test_the_tolerance_is_where_it_says(rows: Rows, factor: float, verdict: str) -> None:
    sharp = [{**row, "p20_us": row["median_us"], "p80_us": row["median_us"]} for row in rows]
    assert verdicts(sharp, scaled(sharp, factor, "ours")) == [verdict] * 3


def test_faster_is_said(rows: Rows) -> None:
    assert verdicts(rows, scaled(rows, 0.5, "ours")) == ["faster"] * 3


def test_a_row_that_vanished_fails_unless_left_out(rows: Rows) -> None:
    after = [row for row in rows if row["op"] != "logprob.linear_logprob"]
    assert verdicts(rows, after) == ["ok", "ok", "gone"]
    assert verdicts(rows, after, common=True) == ["ok", "ok"]


def file_of(rows: Rows, path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_exit_codes(rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = file_of(rows, tmp_path / "a.jsonl")
    slow = file_of(scaled(rows, 2.0, "ours"), tmp_path / "slow.jsonl")
    other = file_of([{**r, "device": "Other CPU (1 cores)"} for r in rows], tmp_path / "o.jsonl")
    assert command.main(["compare", a, a]) == 0
    assert command.main(["compare", a, slow]) == 1
    assert "3 of 3 rows fail" in capsys.readouterr().out
    assert command.main(["compare", a, slow, "--tolerance", "3"]) == 0
    assert command.main(["compare", a, other, "--common"]) == 2
    assert "device differs" in capsys.readouterr().out
    assert command.main(["compare", a]) == 2
    assert "--base REF" in capsys.readouterr().err


def test_base_reads_the_rows_of_a_git_ref(
    rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init", "-q")
    path = file_of(rows, tmp_path / "rows.jsonl")
    git("add", ".")
    git("commit", "-qm", "rows")
    monkeypatch.setattr(_compare, "ROOT", tmp_path)
    assert command.main(["compare", path, "--base", "HEAD"]) == 0
    file_of(scaled(rows, 2.0, "ours"), tmp_path / "rows.jsonl")
    assert command.main(["compare", path, "--base", "HEAD"]) == 1
    with pytest.raises(ValueError, match=r"--base: expected a git ref that has rows\.jsonl"):
        _compare.read_at(tmp_path / "rows.jsonl", "no-such-ref")
