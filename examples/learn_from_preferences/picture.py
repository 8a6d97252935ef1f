# SPDX-License-Identifier: Apache-2.0
"""The four panels of report.png."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

SHORT = {"whole training step": "whole step", "head, forward and backward": "head alone"}
OURS, PLAIN, QUIET = "#0b6e6e", "#c2410c", "#8a8f98"


def draw(report: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(12.5, 8.6), layout="constrained")
    panels = figure.subplots(2, 2)
    facts, version = report["machine"], report["versions"]
    figure.suptitle(
        f"Learning from preferences: {facts['processor']}, {facts['cores']} cores, "
        f"torch threads: {facts['torch_threads']}, {facts['instruction_set']}, "
        f"torch {version['torch']}, hotloop {version['hotloop']}",
        fontsize=10.5,
    )
    _losses(panels[0, 0], report)
    _wins(panels[0, 1], report)
    _bars(panels[1, 0], report["head"], "median_ms", "ms, log scale", "Time of a training step")
    _bars(
        panels[1, 1],
        report["head"],
        "peak_mb",
        "MB above rest, log scale",
        "Peak memory of a training step",
    )
    return figure


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def _losses(axes: Axes, report: dict[str, Any]) -> None:
    curve = report["curve"]
    text = [point for point in curve if point["phase"] == "text"]
    pairs = [text[-1], *(point for point in curve if point["phase"] == "pairs")]
    axes.plot(
        [p["seconds"] for p in text], [p["heldout"] for p in text], "o-", color=OURS, ms=3.5,
        label="reading the text",
    )  # fmt: skip
    axes.plot(
        [p["seconds"] for p in pairs], [p["heldout"] for p in pairs], "s-", color=PLAIN, ms=4.5,
        label="learning from pairs",
    )  # fmt: skip
    axes.annotate(
        f"{curve[-1]['heldout']:.3f}", (pairs[-1]["seconds"], pairs[-1]["heldout"]),
        xytext=(0, 9), textcoords="offset points", ha="center", fontsize=9, color=PLAIN,
    )  # fmt: skip
    axes.annotate(
        f"{text[-1]['heldout']:.3f}", (text[-1]["seconds"], text[-1]["heldout"]),
        xytext=(0, 9), textcoords="offset points", ha="center", fontsize=9, color=OURS,
    )  # fmt: skip
    axes.set_xlabel("seconds of work", fontsize=9)
    axes.set_ylabel("nats per byte", fontsize=9)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="#e5e7eb", lw=0.8)
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes, "Held-out loss")


def _wins(axes: Axes, report: dict[str, Any]) -> None:
    feedback = report["feedback"]
    rows = [
        ("win rate,\nafter against before", feedback["win_rate"], feedback["interval_95"], OURS),
        (
            "mean score\nafter feedback",
            feedback["score_after"],
            feedback["score_after_interval_95"],
            OURS,
        ),
        (
            "mean score\nbefore feedback",
            feedback["score_before"],
            feedback["score_before_interval_95"],
            QUIET,
        ),
    ]
    for place, (_, value, (low, high), colour) in enumerate(rows):
        axes.plot([low, high], [place, place], color=colour, lw=3, solid_capstyle="butt")
        axes.plot([value], [place], "o", color=colour, ms=9)
        axes.annotate(
            f"{value:.3f}  [{low:.3f}, {high:.3f}]", (min(max(value, 0.16), 0.84), place),
            xytext=(0, 11), textcoords="offset points", ha="center", fontsize=9,
        )  # fmt: skip
    axes.plot([0.5, 0.5], [-0.4, 0.45], color="black", lw=1, ls=":")
    axes.annotate("no better", (0.5, 0.45), ha="center", va="top", fontsize=8,
                  xytext=(0, -2), textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(rows)), [row[0] for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.6)
    axes.set_xlim(0, 1)
    axes.grid(axis="x", color="#e5e7eb", lw=0.8)
    axes.set_axisbelow(True)
    _tidy(
        axes,
        f"{feedback['prompts']} held-out prompts in {feedback['files']} files, 95 % intervals",
    )


def _bars(axes: Axes, cases: list[dict[str, Any]], key: str, unit: str, title: str) -> None:
    if not cases:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=QUIET)
        axes.set_axis_off()
        return
    width = 0.38
    for side, (name, colour) in enumerate((("hotloop", OURS), ("torch", PLAIN))):
        places = [place + (side - 0.5) * width for place in range(len(cases))]
        values = [max(case[name][key], 1e-3) for case in cases]
        spread = None
        if key == "median_ms":
            spread = [
                [case[name]["median_ms"] - case[name]["least_ms"] for case in cases],
                [case[name]["most_ms"] - case[name]["median_ms"] for case in cases],
            ]
        axes.bar(
            places, values, width * 0.94, color=colour, label=name, yerr=spread, capsize=3,
            error_kw={"lw": 1, "ecolor": "#374151"},
        )  # fmt: skip
        tops = [case[name]["most_ms"] for case in cases] if spread else values
        for place, value, top in zip(places, values, tops):
            axes.annotate(
                f"{value:.0f}", (place, top), xytext=(0, 3), textcoords="offset points",
                ha="center", fontsize=9, bbox={"fc": "white", "ec": "none", "pad": 0.6, "alpha": 0.8},
            )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 2)
    labels = [
        f"{case['loss']}\n{case['size']}\n{case['tokens']} tokens\n"
        f"vocabulary {case['vocabulary']}\n{SHORT[case['measured']]}"
        for case in cases
    ]
    axes.set_xticks(range(len(cases)), labels)
    axes.set_ylabel(unit, fontsize=9)
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    _tidy(axes, title)
