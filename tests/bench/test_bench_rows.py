# SPDX-License-Identifier: Apache-2.0
"""The row format: what is accepted, what is refused, what survives an interrupt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import _row


def test_fixed_rows_are_well_formed(rows: list[_row.Row]) -> None:
    assert len(rows) == 11
    for row in rows:
        assert _row.problems(row) == []
        assert tuple(row) == _row.FIELDS


@pytest.mark.parametrize("name", _row.FIELDS)
def test_a_missing_field_is_named(rows: list[_row.Row], name: str) -> None:
    row = dict(rows[0])
    del row[name]
    assert f"{name}: missing" in _row.problems(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"median_us": "3"}, "median_us: expected float, got '3'"),
        ({"median_us": float("nan")}, "median_us: expected a finite number"),
        ({"median_us": True}, "median_us: expected float, got True"),
        ({"quick": 1}, "quick: expected bool, got 1"),
        ({"p20_us": 1e9}, "expected 0 < p20 <= median <= p80"),
        ({"flops": "2*n"}, "bytes, flops: expected exactly one"),
        ({"colour": "red"}, "colour: unknown field"),
    ],
)
def test_a_wrong_field_is_named(
    rows: list[_row.Row], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    row = {**rows[0], **change}
    assert any(message in problem for problem in _row.problems(row))
    with pytest.raises(ValueError, match=r"\[bench\] row of preference.dpo_loss hotloop cpu"):
        _row.write(row, tmp_path / "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists()


def test_rows_come_back_as_written(rows: list[_row.Row], tmp_path: Path) -> None:
    for row in rows:
        _row.write(row, tmp_path / "new" / "rows.jsonl")
    assert _row.read(tmp_path / "new" / "rows.jsonl") == rows


def test_the_last_of_equal_rows_counts(rows: list[_row.Row]) -> None:
    later = {**rows[0], "median_us": rows[0]["median_us"] + 1}
    read = _row.parse("".join(json.dumps(row) + "\n" for row in (*rows, later)))
    assert read == [*rows[1:], later]


def test_a_cut_off_last_line_is_left_out_and_any_other_is_an_error(rows: list[_row.Row]) -> None:
    lines = [json.dumps(row) for row in rows]
    assert _row.parse("\n".join([*lines, lines[0][:50]])) == rows
    with pytest.raises(ValueError, match="line 1: not JSON"):
        _row.parse("\n".join([lines[0][:50], *lines]), "file")


def test_formula_and_rate_of_a_row_agree(rows: list[_row.Row]) -> None:
    for row in rows:
        amount = eval(row["bytes"] or row["flops"], {"__builtins__": {}}, row["dims"])
        rate = row["gb_per_s"] or 1e3 * row["tflop_per_s"]
        assert rate == pytest.approx(amount / row["median_us"] * 1e-3)
