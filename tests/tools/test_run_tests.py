# SPDX-License-Identifier: Apache-2.0
"""``make test`` ends with one line that counts every test, and is red whenever something did not run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.source
ROOT = Path(__file__).resolve().parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


run_tests = load("run_tests")

JUNIT = {
    "pytest": '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>',
    "ctest": '<testsuite tests="9" failures="2" disabled="1" skipped="1"/>',
}


@pytest.mark.parametrize("kind", JUNIT)
def test_reports_of_pytest_and_ctest_are_counted(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    path.write_text(JUNIT[kind])
    assert str(run_tests.counted(path)) == "5 passed, 2 failed, 2 skipped"


@pytest.mark.parametrize("text", [None, "", "<testsuite tests='3'"])
def test_a_suite_without_a_report_has_failed(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    if text is not None:
        path.write_text(text)
    assert run_tests.counted(path).failed == 1


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("def test_a(): pass\ndef test_b(): assert 0\n", "1 passed, 1 failed, 0 skipped"),
        ("import pytest\ndef test_a(): pytest.skip('no')\n", "0 passed, 0 failed, 1 skipped"),
        ("import os\ndef test_a(): os._exit(3)\n", "0 passed, 1 failed, 0 skipped"),
        ("", "0 passed, 1 failed, 0 skipped"),  # nothing collected is not all right
    ],
    ids=["one fails", "one is skipped", "the process dies", "nothing there"],
)
def test_a_suite_of_python_tests(
    body: str, line: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_it.py").write_text(body)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    assert str(run_tests.pytest("toy", str(tmp_path), "-p", "no:cacheprovider")) == line
    assert capfd.readouterr().out.splitlines()[-1].startswith(f"toy: {line} in ")


def test_the_last_line_counts_all_suites(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = run_tests.Counts
    monkeypatch.setitem(run_tests.SUITES, "cpp", lambda: counts(5, 0, 1))
    monkeypatch.setitem(run_tests.SUITES, "python", lambda: counts(8, 0, 2))
    assert run_tests.main(["cpp", "python"]) == 0
    assert re.fullmatch(r"13 passed, 0 failed, 3 skipped in \d+ s\n", capsys.readouterr().out)
    monkeypatch.setitem(run_tests.SUITES, "python", lambda: counts(8, 1, 2))
    assert run_tests.main(["cpp", "python"]) == 1
    assert run_tests.main(["nothing"]) == 2


def test_help_names_every_target_and_every_target_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"\.PHONY: (.*)", makefile)[1].split())  # type: ignore[index]
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    assert phony == targets
    named = set(re.findall(r"[a-z-]+", " ".join(re.findall(r'"make (.*?)(?:  |")', makefile))))
    assert targets - {"help", "clean"} <= named
    run = (ROOT / ".ci" / "run").read_text()
    for target in ("test", "test-sanitized", "test-slow", "peers", "lint", "wheel"):
        assert re.search(rf"make {target}$", run, re.M), target
