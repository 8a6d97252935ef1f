# SPDX-License-Identifier: Apache-2.0
"""Figures from rows: one per op, a panel per dtype and case, the same numbers as CSV beside it."""

from __future__ import annotations

import csv
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _row
from ._report import duration, header, shape
from ._row import Row

# The same colour in every figure, from Okabe and Ito's palette for colour-blind readers.
_COLOURS = {
    "ours": "#d55e00",
    "torch": "#000000",
    "torch.compile": "#7f7f7f",
    "trl": "#0072b2",
    "liger": "#009e73",
    "cce": "#cc79a7",
    "torch linear_ce chunked": "#e69f00",
    "torch linear_ce": "#b8860b",
    "floor": "#56b4e9",
}
_SPARE = "#882255"
_PANELS_PER_LINE = 3
_CHARACTERS_PER_INCH = 19  # of the small print


def figures(rows: Sequence[Row], folder: Path, stem: str) -> list[Path]:
    """Draw ``<stem>-<op>.png`` and ``.csv`` for every op and device; return the figures."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["device"]), []).append(row)
    paths = []
    for (op, device), group in groups.items():
        several = sum(name == op for name, _ in groups) > 1
        name = "-".join([stem, op, *([device] if several else [])])
        path = folder / (re.sub(r"[^A-Za-z0-9._-]+", "_", name) + ".png")
        figure = _figure(plt, op, group)
        figure.savefig(path, dpi=144)
        plt.close(figure)
        _write_csv(group, path.with_suffix(".csv"))
        paths.append(path)
    return paths


def _figure(plt: Any, op: str, rows: Sequence[Row]) -> Any:
    panels: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        panels.setdefault(
            (row["mode"], row["label"], row["dtype"], str(row["threads"])), []
        ).append(row)
    panels = {
        (*name, part): part_rows
        for name, panel in panels.items()
        for part, part_rows in _split(panel).items()
    }
    across = min(_PANELS_PER_LINE, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = plt.subplots(
        down, across, figsize=(5.4 * across, 3.9 * down + 1.0), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((mode, label, dtype, threads, _), panel) in zip(axes.flat, panels.items()):
        plural = "" if threads == "1" else "s"
        title = ", ".join(x for x in (mode, dtype, label, f"{threads} thread{plural}") if x)
        if len({tuple(row["shape"]) for row in panel}) > 1:
            _lines(axis, panel)
        else:
            _dots(axis, panel)
            title += f"\n{shape(panel[0])}"
        axis.set_title(title, fontsize=9)
    quick = "  (quick run, no result)" if any(row["quick"] for row in rows) else ""
    figure.suptitle(f"{op} on {rows[0]['device']}{quick}", fontsize=11)
    wide = int(_CHARACTERS_PER_INCH * figure.get_size_inches()[0])
    small = "\n".join(textwrap.wrap(_versions(header(rows)), wide))
    figure.supxlabel(small, fontsize=6.5, color="#555555")
    return figure


def _split(panel: Sequence[Row]) -> dict[str, list[Row]]:
    """Shapes that differ in more than the first extent have no common axis: one panel each."""
    found: dict[str, list[Row]] = {}
    for row in panel:
        found.setdefault(str(row["shape"][1:]), []).append(row)
    return found


def _lines(axis: Any, panel: Sequence[Row]) -> None:
    """Throughput over size, both axes logarithmic."""
    for name, series in _series(panel).items():
        series = sorted(series, key=lambda row: row["shape"][0])
        x = [row["shape"][0] for row in series]
        middle = [_rate(row) for row in series]
        low = [_rate(row) * row["median_us"] / row["p80_us"] for row in series]
        high = [_rate(row) * row["median_us"] / row["p20_us"] for row in series]
        if series[0]["role"] == "roof":
            axis.plot(
                x, middle, color="#444444", linestyle="--", linewidth=1, label=_roof_name(series[0])
            )
            continue
        colour = _colour(series[0])
        axis.plot(
            x, middle, color=colour, marker="o", markersize=3.5, label=name, **_style(series[0])
        )
        axis.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("size (first extent)")
    axis.set_ylabel(_rate_unit(panel[0]))
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.legend(fontsize=7, frameon=False)


def _dots(axis: Any, panel: Sequence[Row]) -> None:
    """One size: time per contender, with its spread, and the time at the roof."""
    rows = sorted((r for r in panel if r["role"] != "roof"), key=lambda row: -row["median_us"])
    for at, row in enumerate(rows):
        middle, low, high = row["median_us"], row["p20_us"], row["p80_us"]
        colour = _colour(row)
        axis.errorbar(
            middle, at, xerr=[[middle - low], [high - middle]], fmt="o", color=colour, markersize=5,
            capsize=3,
        )  # fmt: skip
        axis.annotate(
            duration(middle),
            (middle, at), textcoords="offset points", xytext=(0, 5), ha="center", fontsize=7,
        )  # fmt: skip
    axis.set_yticks(range(len(rows)), [row["impl"] for row in rows], fontsize=8)
    for label, row in zip(axis.get_yticklabels(), rows):
        label.set_color(_colour(row))
        label.set_fontweight("bold" if row["role"] == "ours" else "normal")
    axis.set_ylim(-0.6, len(rows) - 0.2)
    axis.set_xscale("log")
    shares = [row for row in rows if row["roof_share"]]
    if shares:
        at_roof = shares[0]["median_us"] * shares[0]["roof_share"]
        roof = next((row for row in panel if row["role"] == "roof"), None)
        axis.axvline(at_roof, color="#444444", linestyle="--", linewidth=1)
        axis.annotate(
            _roof_name(roof or shares[0]), (at_roof, 0.02), xycoords=("data", "axes fraction"),
            textcoords="offset points", xytext=(3, 0), fontsize=7, rotation=90, va="bottom",
        )  # fmt: skip
    low_edge, high_edge = axis.get_xlim()
    axis.set_xlim(low_edge / 1.5, high_edge * 1.5)
    _time_ticks(axis.xaxis, high_edge / low_edge)
    axis.set_xlabel("time of a step")
    axis.grid(True, axis="x", which="major", color="#dddddd", linewidth=0.6)


def _time_ticks(axis: Any, span: float) -> None:
    """At most a handful of ticks, with units; matplotlib labels every minor tick of a short axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if span > 300 else (1.0, 3.0), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda us, _: duration(us)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(labelsize=8)


def _series(panel: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in panel:
        found.setdefault(row["impl"], []).append(row)
    return found


def _rate(row: Row) -> float:
    return float(row["tflop_per_s"] if row["flops"] else row["gb_per_s"])


def _rate_unit(row: Row) -> str:
    return f"TFLOP/s of {row['flops']}" if row["flops"] else f"GB/s of {row['bytes']}"


def _roof_name(row: Row) -> str:
    return "roof: torch.mm" if row["flops"] else "roof: copy"


def _colour(row: Row) -> str:
    if row["role"] in ("ours", "floor"):
        return _COLOURS[row["role"]]
    return _COLOURS.get(row["impl"]) or _COLOURS.get(row["impl"].split()[0], _SPARE)


def _style(row: Row) -> dict[str, Any]:
    """The same library keeps its colour; its second form is dashed."""
    second = "eager" in row["impl"] or "triton" in row["impl"]
    dashed = second and row["role"] == "rival"
    return {"linestyle": ":" if dashed else "-", "linewidth": 2.2 if row["role"] == "ours" else 1.3}


def _versions(facts: Sequence[str]) -> str:
    chosen = [line for line in facts if line.startswith(("versions ", "commit ", "time "))]
    return "   ".join(" ".join(line.split()[1:]) for line in chosen)


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _row.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
