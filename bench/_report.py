# SPDX-License-Identifier: Apache-2.0
"""The table: machine and versions, every contender of every case, every target. Losses are kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from . import _row
from ._row import Row

COLUMNS = (
    "op",
    "case",
    "shape",
    "dtype",
    "contender",
    "time",
    "ours / it",
    "roof",
    "peak",
    "error",
)
TARGETS = ("id", "op", "shape", "dtype", "rival", "what", "target", "reached", "verdict")
_RIGHT = ("time", "ours / it", "roof", "peak", "beyond gradients", "error", "target", "reached")
_QUICK = "quick run: these times show that the benches work and are no results"

Record = dict[str, str]


def header(rows: Sequence[Row]) -> list[str]:
    """One line per thing that has to be known to read the numbers."""
    lines = []
    for title, values in (
        ("device", (r["device"] for r in rows)),
        ("threads", (str(r["threads"]) for r in rows)),
        ("simd", (_pairs(r["simd"]) for r in rows)),
        ("versions", (_pairs(r["versions"]) for r in rows)),
        ("commit", (r["commit"] for r in rows)),
        ("timer", (r["timer"] for r in rows)),
    ):
        lines.append(f"{title:9s} {'; '.join(dict.fromkeys(values))}")
    times = sorted(r["time"] for r in rows)
    lines.append(f"{'time':9s} {times[0]}" + (f" to {times[-1]}" if times[-1] != times[0] else ""))
    if any(r["quick"] for r in rows):
        lines.append(f"{'note':9s} {_QUICK}")
    return lines


def records(rows: Sequence[Row]) -> list[Record]:
    """A block per case: ours first, then the others with our time over theirs."""
    found: list[Record] = []
    for case in _row.by_case(rows).values():
        ours = [r for r in case if r["role"] == "ours"]
        others = [r for r in case if r["role"] != "ours"]
        for own in ours:
            found.append(_record(own, None, first=True))
            found += [_record(row, own["ratios"].get(row["impl"]), first=False) for row in others]
        if not ours:
            found += [_record(row, None, first=row is others[0]) for row in others]
    return found


def _record(row: Row, ratio: Sequence[float] | None, first: bool) -> Record:
    return {
        "op": f"{row['op']} {row['mode']}" if first else "",
        "case": row["label"] if first else "",
        "shape": shape(row) if first else "",
        "dtype": row["dtype"] if first else "",
        "contender": row["impl"],
        "time": _spread(row),
        "ours / it": ""
        if ratio is None
        else f"{ratio[0]:.3f} ({ratio[1]:.3f}-{ratio[2]:.3f})"
        + (" slower" if ratio[0] > 1 else ""),
        "roof": "" if row["roof_share"] is None else f"{row['roof_share']:.0%}",
        "peak": "" if row["peak_mb"] is None else f"{row['peak_mb']:.1f} MB",
        "error": f"{max(row['errors']):.0e}" if row["errors"] else "",
    }


def targets(rows: Iterable[Row]) -> list[Record]:
    found = []
    for row in rows:
        for target in row["targets"]:
            verdict = {True: "pass", False: "FAIL", None: "not measured"}[target["met"]]
            found.append(
                {
                    "id": target["id"],
                    "op": f"{row['op']} {row['label']}".strip(),
                    "shape": shape(row),
                    "dtype": row["dtype"],
                    "rival": target["rival"],
                    "what": target["what"],
                    "target": f"{target['target']:.3f}",
                    "reached": "" if target["ratio"] is None else f"{target['ratio']:.3f}",
                    "verdict": verdict,
                }
            )
    return found


def worst(rows: Iterable[Row]) -> str:
    """The comparison that looks worst for us."""
    rows = list(rows)
    floors = {row["impl"] for row in rows if row["role"] == "floor"}
    found = [
        (ratio[0], name, row)
        for row in rows
        for name, ratio in row["ratios"].items()
        if name not in floors
    ]
    if not found:
        return "no comparison was measured"
    ratio, name, row = max(found, key=lambda x: x[0])
    return (
        f"worst comparison: {ratio:.3f} of the time of {name}, "
        f"{row['op']} {row['label']} {shape(row)} {row['dtype']}".replace("  ", " ")
    )


def text(rows: Sequence[Row]) -> str:
    """The whole report as plain text."""
    if not rows:
        return "no rows"
    parts = [*header(rows), "", *plain_table(COLUMNS, records(rows)), "", worst(rows)]
    asked = targets(rows)
    if asked:
        met = sum(t["verdict"] == "pass" for t in asked)
        missed = sum(t["verdict"] == "FAIL" for t in asked)
        parts += ["", *plain_table(TARGETS, asked), ""]
        parts.append(
            f"targets: {met} met, {missed} missed, {len(asked) - met - missed} not measured"
        )
    return "\n".join(parts)


def show(rows: Sequence[Row]) -> None:
    """Print the report, in colour where rich is installed and the output is a terminal."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(text(rows))
        return
    console = Console()
    if not rows or not console.is_terminal:
        print(text(rows))
        return
    console.print("\n".join(header(rows)), highlight=False)
    for columns, lines in ((COLUMNS, records(rows)), (TARGETS, targets(rows))):
        if not lines:
            continue
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in columns:
            table.add_column(name, justify="right" if name in _RIGHT else "left", overflow="fold")
        for line in lines:
            bad = "slower" in line.get("ours / it", "") or line.get("verdict") == "FAIL"
            mine = line.get("contender", "").startswith("hotloop")
            table.add_row(
                *(line[name] for name in columns), style="red" if bad else "bold" if mine else ""
            )
        console.print(table)
    console.print(worst(rows), highlight=False)


def plain_table(columns: Sequence[str], lines: Sequence[Record]) -> list[str]:
    widths = [max(len(name), *(len(line[name]) for line in lines)) for name in columns]

    def fit(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if name in _RIGHT else cell.ljust(width)
            for name, cell, width in zip(columns, cells, widths)
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return [fit(columns), rule, *(fit([line[name] for name in columns]) for line in lines)]


def shape(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def duration(us: float) -> str:
    name, size = _unit(us)
    return f"{us / size:.3g} {name}"


def _spread(row: Row) -> str:
    """Median and p20-p80, all in the unit of the median."""
    _, size = _unit(row["median_us"])
    low, high = (f"{row[name] / size:.3g}" for name in ("p20_us", "p80_us"))
    return f"{duration(row['median_us'])} ({low}-{high})"


def _unit(us: float) -> tuple[str, float]:
    return ("us", 1.0) if us < 999.5 else ("ms", 1e3) if us < 999.5e3 else ("s", 1e6)


def _pairs(values: dict[str, str]) -> str:
    return " ".join(f"{name} {value}" for name, value in values.items())
