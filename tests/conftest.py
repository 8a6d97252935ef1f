# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: poisoned memory, and a list of the implementations that ran."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import gpu_run
import pytest
import torch
from gpu_run import pytest_runtest_logreport
from hotloop.front import impl as _impl

__all__ = ["pytest_runtest_logreport"]

_exercised: dict[str, set[str]] = defaultdict(set)


def _poisoned(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return real(*args, **kwargs)
        t = real(*args, **kwargs)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("hotloop"):
            return t
        with torch.no_grad():
            if t.is_floating_point() or t.is_complex():
                t.fill_(float("nan"))
            elif t.dtype != torch.bool:
                t.fill_(torch.iinfo(t.dtype).max)
        return t

    return empty


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that hotloop takes uninitialised holds NaN, or the largest integer."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))


def pytest_configure(config: pytest.Config) -> None:
    note = _impl.note

    def note_and_remember(op: str, impl: str) -> None:
        note(op, impl)
        if not torch.compiler.is_compiling():
            _exercised[impl].add(op)

    _impl.note = note_and_remember


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    gpu_run.pytest_sessionfinish(session, exitstatus)
    if hasattr(session.config, "workeroutput"):  # a worker of xdist
        session.config.workeroutput["exercised"] = {k: sorted(ops) for k, ops in _exercised.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """What a worker of xdist ran counts here."""
    for impl, ops in getattr(node, "workeroutput", {}).get("exercised", {}).items():
        _exercised[impl].update(ops)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    gpu_run.pytest_terminal_summary(terminalreporter, config)
    if not _exercised:
        return
    terminalreporter.section("hotloop implementations exercised")
    for impl in _impl.IMPLS[1:]:
        ops = sorted(_exercised.get(impl, ()))
        terminalreporter.write_line(f"{impl:10s} {len(ops):3d} ops  {' '.join(ops) or '(none)'}")
