# SPDX-License-Identifier: Apache-2.0
"""The table and the figures of a fixed file of rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bench import _plot, _report, _row

Rows = list[_row.Row]


def test_header_says_machine_and_versions(rows: Rows) -> None:
    head = "\n".join(_report.header(rows))
    for text in (
        "Example CPU (2 cores)",
        "threads   1",
        "torch AVX2 hotloop avx2",
        "torch 2.13.0",
        "0123456789ab",
        "2026-01-02",
    ):
        assert text in head
    assert "quick" not in head
    assert "no results" in "\n".join(_report.header([{**rows[0], "quick": True}]))


def test_every_row_is_in_the_table_and_losses_are_marked(rows: Rows) -> None:
    records = _report.records(rows)
    assert [record["contender"] for record in records] == [
        "hotloop cpu", "torch", "torch.compile", "roof",
        "hotloop cpu", "torch", "torch.compile",
        "hotloop cpu", "trl", "four products", "roof",
    ]  # fmt: skip
    assert records[1]["ours / it"] == "0.080 (0.075-0.090)"
    assert records[5]["ours / it"] == "1.200 (1.100-1.300) slower"
    assert records[0]["time"] == "4 ms (3.9-4.2)"
    assert records[0]["peak"] == "16.8 MB"
    assert records[0]["op"] == "preference.dpo_loss fwd+bwd"
    assert records[1]["op"] == ""


def test_targets_pass_fail_or_are_not_measured(rows: Rows) -> None:
    found = [(t["id"], t["target"], t["reached"], t["verdict"]) for t in _report.targets(rows)]
    assert found == [
        ("pair.eager", "0.125", "0.080", "pass"),
        ("pair.few", "1.000", "1.200", "FAIL"),
        ("pair.mem", "1.000", "", "not measured"),
    ]


def test_text_is_aligned_and_ends_with_the_count(rows: Rows) -> None:
    text = _report.text(rows)
    assert text.endswith("targets: 1 met, 1 missed, 1 not measured")
    assert "worst comparison: 1.200 of the time of torch, preference.dpo_loss 8 float32" in text
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("op "))
    column = lines[start].index("contender")
    table = lines[start + 2 : start + 13]
    assert [line[column:].split("  ")[0] for line in table[:3]] == [
        "hotloop cpu",
        "torch",
        "torch.compile",
    ]
    assert all(line == line.rstrip() for line in lines)


def test_no_rows_is_said() -> None:
    assert _report.text([]) == "no rows"


@pytest.mark.parametrize(
    ("us", "text"), [(0.5, "0.5 us"), (999.4, "999 us"), (1000.0, "1 ms"), (2.5e6, "2.5 s")]
)
def test_durations(us: float, text: str) -> None:
    assert _report.duration(us) == text


@pytest.mark.filterwarnings("default")
def test_figures_have_their_numbers_beside_them(rows: Rows, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = _plot.figures(rows, tmp_path, "rows")
    assert [path.name for path in paths] == [
        "rows-preference.dpo_loss.png",
        "rows-logprob.linear_logprob.png",
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    with paths[0].with_suffix(".csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["median_us"]) for row in read] == [row["median_us"] for row in rows[:7]]
