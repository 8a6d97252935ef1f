# SPDX-License-Identifier: Apache-2.0
"""What a run found: report.json, report.png and a table on the terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import hotloop
import torch
from hotloop import _core
from hotloop.info import cpu_name
from rich.console import Console
from rich.table import Table

from . import head_comparison, serve
from .checkpoint import write_atomically
from .run import Run

JSON_NAME, PNG_NAME = "report.json", "report.png"


def machine() -> dict[str, Any]:
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_set": _core.simd_level(),
        "system": platform.platform(),
        "load_average": list(os.getloadavg()),
    }


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hotloop": hotloop.__version__,
    }


def build(run: Run) -> dict[str, Any]:
    """All numbers of a finished run."""
    state = run.state
    curve = state["curve"]
    text_points = [point for point in curve if point["phase"] == "text"]
    return {
        "finished": True,
        "fingerprint": state["fingerprint"],
        "settings": dataclasses.asdict(run.settings),
        "text": run.corpus.facts(),
        "machine": machine(),
        "versions": versions(),
        "rule": run.judge.rule,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "heldout_loss": {
            "unit": "nats per byte",
            "before_feedback": text_points[-1]["heldout"],
            "after_feedback": curve[-1]["heldout"],
        },
        "curve": curve,
        "rounds": [_round(found) for found in state["rounds"]],
        "feedback": run.comparison(),
        "serving": serve.summary(state["served"], run.settings)
        | {"draft_parameters": sum(p.numel() for p in run.draft.parameters()) if run.draft else 0}
        | {"draft_divergence": state["draft_loss"]},
        "head": state["measured"],
        "head_memory_is": head_comparison.MEMORY,
        "head_time_is": head_comparison.TIME,
        "seconds": state["seconds"] | {"total": sum(state["seconds"].values())},
        "resumed": state["resumed"],
    }


def _round(found: dict[str, Any]) -> dict[str, Any]:
    steps = found["steps"]
    last = steps[len(steps) // 2 :]
    means = {
        name: statistics.fmean(step[name] for step in last) for name in (last[0] if last else ())
    }
    return {name: found[name] for name in ("prompts", "pairs", "score")} | {
        "steps": len(steps),
        "second_half": means,
    }


def write(folder: Path, report: dict[str, Any]) -> None:
    """The picture first: whoever finds report.json finds everything."""
    write_atomically(folder / PNG_NAME, picture(report))
    write_atomically(folder / JSON_NAME, (json.dumps(report, indent=1) + "\n").encode())


def read(folder: Path) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads((folder / JSON_NAME).read_text())
    except (OSError, ValueError):
        return None
    return report


def picture(report: dict[str, Any]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from .picture import draw

    figure = draw(report)
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=110)
    return packed.getvalue()


def table(report: dict[str, Any]) -> Table:
    feedback, loss = report["feedback"], report["heldout_loss"]
    low, high = feedback["interval_95"]
    text = report["text"]
    found = Table(title="Learning from preferences", show_header=False, title_justify="left")
    found.add_column(style="bold")
    found.add_column()
    found.add_row("machine", machine_line(report))
    found.add_row(
        "text",
        f"{text['folder']}: {text['train_bytes'] / 1e6:.1f} MB to learn from, "
        f"{text['heldout_bytes'] / 1e6:.2f} MB held out ({text['heldout_files']} files), "
        f"judged as {text['kind']}",
    )
    found.add_row("decoder", f"{report['parameters'] / 1e6:.2f} M parameters, bytes")
    found.add_row(
        "held-out loss",
        f"{loss['before_feedback']:.3f} before, {loss['after_feedback']:.3f} after feedback "
        f"({loss['unit']})",
    )
    found.add_row(
        "pairs learned from",
        " + ".join(str(round_["pairs"]) for round_ in report["rounds"])
        + f" of {sum(round_['prompts'] for round_ in report['rounds'])} prompts",
    )
    found.add_row(
        "win rate",
        f"{feedback['win_rate']:.3f}  (95 % interval {low:.3f} to {high:.3f}; "
        f"{feedback['prompts']} held-out prompts x {feedback['answers_per_prompt']} answers of each "
        "model, ties half)",
    )
    found.add_row(
        "mean score",
        f"{feedback['score_before']:.3f} before, {feedback['score_after']:.3f} after",
    )
    served = report["serving"]
    plain = served["plain"]
    for mode, name in (("token", "speculative"), ("block", "speculative, block")):
        facts = served[mode]
        found.add_row(
            f"serving, {name}",
            f"{facts['bytes_per_call']:.2f} bytes per call of the model, "
            f"{facts['bytes_per_second']:.0f} bytes/s; plain decoding 1.00 and "
            f"{plain['bytes_per_second']:.0f}  (draft of "
            f"{served['draft_parameters'] / 1e6:.2f} M parameters proposes {served['draft_tokens']}, "
            f"batches of {served['batch']})",
        )
        found.add_row(
            "  same law",
            f"chi-square of {facts['bytes']} transformed bytes: p = {facts['law_p_value']:.2g}; "
            f"with rejected bytes taken from the draft: p = {facts['control_p_value']:.2g}",
        )
    for case in report["head"]:
        ours, plain = case["hotloop"], case["torch"]
        found.add_row(
            f"{case['loss']}, {case['size']}",
            f"hotloop {ours['median_ms']:.0f} ms, {ours['peak_mb']:.0f} MB;  torch "
            f"{plain['median_ms']:.0f} ms, {plain['peak_mb']:.0f} MB  ({case['measured']}, "
            f"{case['tokens']} tokens, vocabulary {case['vocabulary']})",
        )
    found.add_row("time", f"{report['seconds']['total']:.0f} s")
    return found


def machine_line(report: dict[str, Any]) -> str:
    facts, version = report["machine"], report["versions"]
    return (
        f"{facts['processor']}, {facts['cores']} cores, torch threads: {facts['torch_threads']}, "
        f"{facts['instruction_set']}, torch {version['torch']}, hotloop {version['hotloop']}"
    )


def show(console: Console, report: dict[str, Any]) -> None:
    console.print(table(report))
    for sample in report["feedback"]["samples"][:2]:
        console.print("\n[bold]a held-out prompt ends with[/bold]")
        console.print(sample["prompt"][-72:].rstrip("\n"), markup=False, highlight=False)
        for when in ("before", "after"):
            console.print(f"[bold]{when} feedback[/bold], score {sample[when + '_score']:.2f}")
            answer = sample[when].rstrip("\n") or "(nothing)"
            console.print(answer, markup=False, highlight=False)
