# SPDX-License-Identifier: Apache-2.0
"""Command line: read a text, learn from it, learn from preferences, report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench.progress import Progress

from . import checkpoint, data, report
from .run import Run
from .settings import DEFAULT_MINUTES, DemoError, Settings, settings_for


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.learn_from_preferences",
        description="Train a small decoder on text, then on preferences, with hotloop's fused heads. "
        "A run that was killed goes on from its last checkpoint when it is started again.",
    )
    made.add_argument(
        "--text", type=Path, help="folder of text files (default: the Python standard library)"
    )
    made.add_argument(
        "--out",
        type=Path,
        default=Path("out/demo"),
        help="folder for results (default: %(default)s)",
    )
    made.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    made.add_argument(
        "--minutes",
        type=float,
        default=DEFAULT_MINUTES,
        help="scales the number of steps; about this long on two idle cores (default: %(default)g)",
    )
    made.add_argument("--restart", action="store_true", help="forget an earlier run in --out")
    made.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return made


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> int:
    """Run the program; ``settings`` replaces what the command line would give."""
    given = parser().parse_args(arguments)
    errors = Console(stderr=True)
    try:
        chosen = settings or settings_for(given.minutes, given.seed)
        run_or_resume(given, chosen)
    except DemoError as error:
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print("Interrupted. Start it again to go on from the last checkpoint.")
        return 130
    return 0


def run_or_resume(given: argparse.Namespace, settings: Settings) -> None:
    console = Console(quiet=given.quiet)
    folder: Path = given.out
    corpus = data.load(given.text, settings)
    fingerprint = settings.fingerprint(corpus.digest)
    found = None if given.restart else report.read(folder)
    if found is not None and found.get("finished"):
        _same_run(folder, str(found.get("fingerprint")), fingerprint)
        report.show(console, found)
        console.print(f"\nThis run was finished before; --restart begins anew. {_places(folder)}")
        return
    with Progress(quiet=given.quiet, keep=True) as progress:
        run = Run(corpus, settings, folder, progress)  # raises before anything is written
        _prepare(folder, restart=given.restart)
        saved = checkpoint.load(folder)
        if saved is not None:
            _same_run(folder, str(saved.get("fingerprint")), fingerprint)
            run.restore(saved)
            done = sum(run.state["seconds"].values())
            console.out(
                f"Going on from {folder / checkpoint.NAME}: {done:.0f} s of work are done.",
                highlight=False,
            )
        facts = corpus.facts()
        skipped = "".join(f", {n} {reason} skipped" for reason, n in corpus.skipped.items())
        console.out(
            f"{facts['folder']}: {facts['train_files']} files to learn from, "
            f"{facts['heldout_files']} held out{skipped}; answers are judged as {corpus.kind}.",
            highlight=False,
        )
        run.go()
    results = report.build(run)
    report.write(folder, results)
    report.show(console, results)
    console.print(f"\n{_places(folder)}")


def _same_run(folder: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DemoError(
            f"--out {folder}: it holds a run with other settings or another text. "
            "Pass --restart to replace it, or another --out."
        )


def _prepare(folder: Path, *, restart: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if restart:
            for name in (report.JSON_NAME, report.PNG_NAME, checkpoint.NAME):
                (folder / name).unlink(missing_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise DemoError(f"--out {folder}: cannot be written to ({error.strerror}).") from error


def _places(folder: Path) -> str:
    return f"Report: {folder / report.JSON_NAME} and {folder / report.PNG_NAME}"


if __name__ == "__main__":
    sys.exit(main())
