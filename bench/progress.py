# SPDX-License-Identifier: Apache-2.0
"""The progress bar of the benches and of the examples: on stderr where that is a terminal and rich is installed."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

_REDRAW_S = 0.1


class Progress:
    """Shows one stage at a time; use as a context manager. Without a terminal or rich, or quiet, it shows nothing.

    It is drawn by the calls alone: a thread that redraws would take its time from what is measured.
    """

    def __init__(self, *, quiet: bool = False, keep: bool = False) -> None:
        """``keep`` leaves the bars of finished stages on the screen."""
        self._bar = None if quiet or not sys.stderr.isatty() else _bar(keep)
        self._keep = keep
        self._task: rich.progress.TaskID | None = None
        self._drawn = 0.0

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str, total: float | None = None, done: int = 0) -> None:
        """Begin a stage of ``total`` steps, None where nobody knows."""
        if self._bar is None:
            return
        if self._task is not None and not self._keep:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(name, total=total, completed=done, note="")  # drawn by this

    def step(self, done: float, note: str = "") -> None:
        """``done`` of the stage's steps are over."""
        if self._bar is None or self._task is None:
            return
        self._bar.update(self._task, completed=done, note=note)
        if time.monotonic() - self._drawn > _REDRAW_S:
            self._bar.refresh()
            self._drawn = time.monotonic()


def _bar(keep: bool) -> rich.progress.Progress | None:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description:32s}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=not keep,
        # What is printed meanwhile goes above the bar, unless it goes elsewhere.
        redirect_stdout=sys.stdout.isatty(),
    )
