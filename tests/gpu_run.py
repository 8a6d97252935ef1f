# SPDX-License-Identifier: Apache-2.0
"""A run of the GPU tests alone, in which all of them skipped, has shown nothing: it ends in red."""

from __future__ import annotations

from typing import Any

import pytest

_ran: set[str] = set()


def asked_for(config: pytest.Config) -> bool:
    """Whether the marks select GPU tests and nothing else, as ``-m gpu`` and ``-m 'gpu and not big'`` do."""
    return str(config.getoption("markexpr", "")).split(" and ")[0].strip() == "gpu"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.outcome != "skipped":
        _ran.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    listing = session.config.getoption("collectonly", False)
    if exitstatus == 0 and asked_for(session.config) and not _ran and not listing:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if asked_for(config) and not _ran:
        terminalreporter.write_line("no GPU test ran: this run has shown nothing", red=True)
