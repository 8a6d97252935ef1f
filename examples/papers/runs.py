# SPDX-License-Identifier: Apache-2.0
"""What the comparisons of this folder share: which runs there are, what a finished one leaves, and their page.

A comparison trains several kinds of one model under several seeds on one text. A finished run is a line of
``runs.jsonl`` in --out and is not run again, so a program that was stopped goes on, and two of them may share a
folder if their --kinds differ. With --page the runs, their table and their curves go into docs/fidelity.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.progress import Progress
from examples.learn_from_preferences import data
from examples.learn_from_preferences.settings import DemoError, Settings

Run = dict[str, Any]
DOCS = Path(__file__).resolve().parents[2] / "docs"
_COLOURS = ("#8a8f98", "#0b6e6e", "#c2410c")


@dataclass(frozen=True)
class Comparison:
    """Kinds of a model, how one is trained, and how the runs are shown."""

    name: str
    about: str
    kinds: tuple[str, ...]
    sizes: Any
    """A frozen dataclass: all that a run depends on but its kind and seed."""
    length: str
    """The field of ``sizes`` that says how long a run is; an option of the program."""
    train: Callable[[str, int, Any, data.Corpus, Progress], Run]
    """(kind, seed, sizes, corpus, progress) to the numbers of a run. ``curve`` is a list of (length so far, loss)."""
    table: Callable[[list[Run]], str]
    axis: str
    """What stands below the curves."""

    def main(self, arguments: Sequence[str] | None = None) -> int:
        given = self._parser().parse_args(arguments)
        torch.set_num_threads(given.threads)
        try:
            corpus = data.load(given.text, Settings())
            sizes = replace(self.sizes, **{self.length: getattr(given, self.length)})
            runs = self._all(given, sizes, corpus)
        except DemoError as error:
            print(error, file=sys.stderr)
            return 1
        print(self.table(runs))
        (given.out / "table.md").write_text(self.table(runs) + "\n")
        self.draw(runs, given.out / "curves.svg")
        if given.page:
            self.publish(runs)
        return 0

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=f"python -m examples.papers.{self.name}", description=self.about
        )
        known = getattr(self.sizes, self.length)
        parser.add_argument(
            f"--{self.length}", type=type(known), default=known, help="of a run (%(default)s)"
        )
        parser.add_argument("--kinds", nargs="+", choices=self.kinds, default=self.kinds)
        parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
        parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
        parser.add_argument(
            "--text", type=Path, help="a folder (default: the Python standard library)"
        )
        parser.add_argument("--out", type=Path, default=Path("out/papers") / self.name)
        parser.add_argument("--page", action="store_true", help="write docs/fidelity.md too")
        parser.add_argument("--quiet", action="store_true", help="no progress bar")
        return parser

    def _all(self, given: argparse.Namespace, sizes: Any, corpus: data.Corpus) -> list[Run]:
        """Run what is missing; all runs of these sizes and this text, by seed and kind."""
        facts = {"sizes": asdict(sizes), "text": corpus.digest}
        given.out.mkdir(parents=True, exist_ok=True)
        file = given.out / "runs.jsonl"
        done = {(run["kind"], run["seed"]) for run in finished(file, facts)}
        with Progress(quiet=given.quiet, keep=True) as progress:
            for seed in range(given.seeds):
                for kind in (k for k in given.kinds if (k, seed) not in done):
                    progress.stage(f"{kind}, seed {seed}", getattr(sizes, self.length))
                    began = time.perf_counter()
                    found = self.train(kind, seed, sizes, corpus, progress)
                    took = {"seconds": round(time.perf_counter() - began, 1)}
                    keep(file, {"kind": kind, "seed": seed, **found, **took, **facts})
        runs = [run for run in finished(file, facts) if run["seed"] < given.seeds]
        return sorted(runs, key=lambda run: (run["seed"], self.kinds.index(run["kind"])))

    def draw(self, runs: list[Run], path: Path) -> None:
        """The curve of every run, one colour for a kind."""
        import matplotlib as mpl
        from matplotlib.figure import Figure

        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            figure = Figure(figsize=(6.4, 4.0), layout="constrained")
            axes = figure.subplots()
            for kind, colour in zip(self.kinds, _COLOURS):
                for number, run in enumerate(of_kind(runs, kind)):
                    label = None if number else kind
                    axes.plot(*zip(*run["curve"]), "o-", ms=2.5, lw=1, color=colour, label=label)
            axes.set_xlabel(self.axis)
            axes.set_ylabel("held-out loss, nats per byte")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
            figure.savefig(path, metadata={"Date": None})

    def publish(self, runs: list[Run]) -> None:
        """Runs and curves into docs/fidelity, the table into its place on docs/fidelity.md."""
        folder, page = DOCS / "fidelity", DOCS / "fidelity.md"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(run) + "\n" for run in runs]
        (folder / f"{self.name}.jsonl").write_text("".join(lines))
        self.draw(runs, folder / f"{self.name}.svg")
        before, _, after = section(page.read_text(encoding="utf-8"), self.name)
        page.write_text(f"{before}{self.table(runs)}{after}", encoding="utf-8")


def section(page: str, name: str) -> tuple[str, str, str]:
    """A page as what stands before the table of that name, the table, and the rest."""
    start, end = f"<!-- {name}:start -->\n", f"\n<!-- {name}:end -->"
    first, last = page.index(start) + len(start), page.index(end)
    return page[:first], page[first:last], page[last:]


def finished(file: Path, facts: Run) -> list[Run]:
    """The runs of a file that agree with these facts."""
    lines = file.read_text().splitlines() if file.exists() else []
    runs = [json.loads(line) for line in lines]
    return [run for run in runs if {name: run[name] for name in facts} == facts]


def keep(file: Path, run: Run) -> None:
    """Add a line, in one call of the system: another program may do so at the same time."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(run) + "\n").encode())
    finally:
        os.close(descriptor)


def of_kind(runs: list[Run], kind: str) -> list[Run]:
    return [run for run in runs if run["kind"] == kind]


def spread(values: Sequence[float]) -> str:
    """Mean over the seeds and the distance of the farthest one."""
    mean = statistics.fmean(values)
    return f"{mean:.4f} ± {max(abs(value - mean) for value in values):.4f}"


def against(runs: list[Run], kind: str, base: str, name: str) -> str:
    """How far a number lies above that of another kind, seed by seed."""
    known = {run["seed"]: run[name] for run in of_kind(runs, base)}
    mine = [run for run in of_kind(runs, kind) if run["seed"] in known]
    return ", ".join(f"{run[name] - known[run['seed']]:+.4f}" for run in mine)
