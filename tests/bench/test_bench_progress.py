# SPDX-License-Identifier: Apache-2.0
"""The progress bar: on a terminal only, and only where rich is installed."""

from __future__ import annotations

import io
import sys
import threading

import pytest

from bench.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, **settings: bool) -> str:
    """What a terminal gets to see of two stages; no thread takes its time from what is measured."""
    terminal, threads = Terminal(), threading.active_count()
    monkeypatch.setattr("bench.progress._REDRAW_S", 0.0)
    with monkeypatch.context() as patch:
        # Here and not in a fixture: pytest puts its own stderr back between set-up and test.
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "200")
        with Progress(**settings) as progress:
            progress.stage("first stage", total=4)
            progress.step(2, "half of it")
            assert threading.active_count() == threads
            progress.stage("second stage")
    return terminal.getvalue()


def test_no_terminal_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(keep=True) as progress:
        progress.stage("first stage", total=4)
        progress.step(4, "all of it")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("keep", [False, True])
def test_a_terminal_shows_stages_and_keeps_those_it_should(
    keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    before, _, after = shown(monkeypatch, keep=keep).partition("second stage")
    assert "first stage" in before
    assert "2/4" in before
    assert "half of it" in before
    assert ("first stage" in after) is keep


def test_quiet_shows_nothing_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, quiet=True) == ""


def test_without_rich_a_terminal_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert shown(monkeypatch) == ""
