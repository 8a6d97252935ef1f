# SPDX-License-Identifier: Apache-2.0
"""The regression gate: two files of rows, or one file now and at a git ref."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import _row
from ._machine import ROOT
from ._report import duration, plain_table, shape
from ._row import Row
from ._timing import percentile

DEFAULT_TOLERANCE = 0.10

_COLUMNS = ("op", "impl", "shape", "dtype", "before", "after", "change", "machine", "verdict")


@dataclass(frozen=True)
class Finding:
    before: Row
    after: Row | None
    change: float
    """Time after over time before, the machine's own change taken out."""
    machine: float
    """The same of the other contenders of the case: how much the machine itself has changed."""
    verdict: str
    """"ok", "slower", "faster" or "gone"."""

    @property
    def bad(self) -> bool:
        return self.verdict in ("slower", "gone")


def gate(
    before: Sequence[Row],
    after: Sequence[Row],
    tolerance: float = DEFAULT_TOLERANCE,
    common: bool = False,
) -> list[Finding]:
    """Compare our rows.

    Slower means both: the median grew by more than ``tolerance``, and the spreads do not overlap
    (p20 after lies above p80 before). Both are judged after division by the median change of the
    contenders that are not ours, which ran in the same rounds: a busy machine slows all of them.

    Args:
        before: rows measured earlier.
        after: rows measured now.
        tolerance: growth of the median that counts as noise, > 0.
        common: leave out rows of ``before`` that ``after`` lacks; else they are "gone" and fail.
    """
    now = {_row.key(row): row for row in after}
    others_before = _others(before)
    others_now = _others(after)
    found = []
    for row in (r for r in before if r["role"] == "ours"):
        match = now.get(_row.key(row))
        if match is None:
            if not common:
                found.append(Finding(row, None, 1.0, 1.0, "gone"))
            continue
        case = _row.case_key(row)
        shared = others_before.get(case, {}).keys() & others_now.get(case, {}).keys()
        changes = [others_now[case][name] / others_before[case][name] for name in shared]
        machine = percentile(changes, 0.5) if changes else 1.0
        change = match["median_us"] / row["median_us"] / machine
        if change > 1 + tolerance and match["p20_us"] / machine > row["p80_us"]:
            verdict = "slower"
        elif change < 1 / (1 + tolerance) and match["p80_us"] / machine < row["p20_us"]:
            verdict = "faster"
        else:
            verdict = "ok"
        found.append(Finding(row, match, change, machine, verdict))
    return found


def _others(rows: Sequence[Row]) -> dict[tuple[object, ...], dict[str, float]]:
    found: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        if row["role"] != "ours":
            found.setdefault(_row.case_key(row), {})[row["impl"]] = row["median_us"]
    return found


def table(findings: Sequence[Finding]) -> list[str]:
    lines = [
        {
            "op": f"{f.before['op']} {f.before['label']}".strip(),
            "impl": f.before["impl"],
            "shape": shape(f.before),
            "dtype": f.before["dtype"],
            "before": duration(f.before["median_us"]),
            "after": "" if f.after is None else duration(f.after["median_us"]),
            "change": "" if f.after is None else f"{f.change:.3f}",
            "machine": "" if f.after is None else f"{f.machine:.3f}",
            "verdict": f.verdict,
        }
        for f in findings
    ]
    return plain_table(_COLUMNS, lines)


def notes(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """Differences that make the comparison weaker than it looks."""
    found = []
    for name in ("device", "threads", "simd", "versions"):
        a, b = ({str(row[name]) for row in rows} for rows in (before, after))
        if a != b:
            found.append(
                f"note: {name} differs: {'; '.join(sorted(a))} against {'; '.join(sorted(b))}"
            )
    if any(row["quick"] for row in (*before, *after)):
        found.append("note: quick rows are too short to judge a change by")
    return found


def read_at(path: Path, ref: str) -> list[Row]:
    """Rows of a file as committed at a git ref.

    Raises:
        ValueError: the ref has no such file.
    """
    inside = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
    done = subprocess.run(
        ["git", "-C", str(ROOT), "show", f"{ref}:{inside.as_posix()}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(
            f"[bench] --base: expected a git ref that has {inside}, got {ref!r} "
            f"({done.stderr.strip()}). Commit the rows to compare with."
        )
    return _row.parse(done.stdout, f"{ref}:{inside}")
