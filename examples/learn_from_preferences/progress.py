"""A bar on a terminal, plain lines at doubling intervals in a log, nothing when quiet."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Reporter:
    """Shows one stage at a time; use as a context manager."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self.console, self.quiet = console, quiet
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.name, self.total, self.next_line, self.started = "", 0, 1, 0.0
        if console.is_terminal and not quiet:
            self.bar = Progress(
                TextColumn("{task.description:32s}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
            )

    def __enter__(self) -> Reporter:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stage(self, name: str, total: int, done: int) -> None:
        self.name, self.total, self.started = name, total, time.monotonic()
        self.next_line = done + 1
        if self.bar is not None:
            self.task = self.bar.add_task(name, total=total, completed=done, note="")

    def step(self, done: int, note: str) -> None:
        """``done`` of the stage's steps are over."""
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=done, note=note)
        elif not self.quiet and (done >= self.next_line or done == self.total):
            self.next_line = max(2 * self.next_line, done + 1)
            seconds = time.monotonic() - self.started
            self.say(f"{self.name}: {done}/{self.total}  {seconds:.1f} s  {note}")
            sys.stdout.flush()
