# SPDX-License-Identifier: Apache-2.0
"""Run test suites one after the other and end with one line of counts: ``python tools/run_tests.py cpp python``.

A suite is quiet while it passes. What fails is printed whole, and the suites after it still run.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "logs"
BIN = Path(sys.executable).parent

QUICK = "not gpu and not big and not peer and not slow"
SLOW = "slow and not gpu and not big and not peer"
# Tests that measure time run after the others, one by one.
ALONE = "alone"
WORKERS = min(len(os.sched_getaffinity(0)), 8)
# Every room: a file of the catalogue.
DOCTESTS = tuple(
    sorted(path.stem for path in (ROOT / "python" / "hotloop" / "_catalog").glob("[a-z]*.py"))
)


@dataclass
class Counts:
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add(self, other: Counts) -> None:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def counted(path: Path) -> Counts:
    """What a JUnit file of pytest or CTest counts; one failure where there is no such file."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return Counts(failed=1)
    suites = [root] if root.tag == "testsuite" else root.findall("testsuite")
    found = Counts()
    for suite in suites:
        bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        skipped = int(suite.get("skipped", 0)) + int(suite.get("disabled", 0))
        found.add(Counts(int(suite.get("tests", 0)) - bad - skipped, bad, skipped))
    return found


def finished(name: str, status: int, found: Counts, begin: float) -> Counts:
    """A suite that ended badly without a failed test (a crash, nothing collected) counts as one failure."""
    if status != 0 and found.failed == 0:
        found.failed = 1
    print(f"{name}: {found} in {time.monotonic() - begin:.0f} s", flush=True)
    return found


def pytest(name: str, *arguments: str, empty: int = 0) -> Counts:
    """Run pytest on the installed package; its progress is shown, its report of what was skipped is not."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        words = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junitxml={junit}"]
        # Threads of different workers share the cores: none may wait by spinning.
        calm = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        done = subprocess.run([*words, *arguments], cwd=ROOT, env=calm, check=False)
        status = 0 if empty and done.returncode == empty else done.returncode
        return finished(name, status, counted(junit), begin)


def in_parallel(name: str, chosen: str, *arguments: str) -> Counts:
    """Run the tests of a selection on a worker per core, then those of it that measure time."""
    found = pytest(name, "-m", f"({chosen}) and not {ALONE}", "-n", str(WORKERS), *arguments)
    # 5: none of the selection measures time.
    found.add(pytest(f"{name}, alone", "-m", f"({chosen}) and {ALONE}", *arguments, empty=5))
    return found


def python() -> Counts:
    found = in_parallel("Python", QUICK, "-rfE", *more())
    found.add(doctests(DOCTESTS))
    return found


def doctests(modules: Sequence[str]) -> Counts:
    names = [f"hotloop.{name}" for name in modules]
    return pytest("docstrings", "-rfE", "--doctest-modules", "--pyargs", *names)


def slow() -> Counts:
    return in_parallel("slow", SLOW, "-rfE", *more())


def peers() -> Counts:
    found = pytest("peers", "-rfEs", "-m", "peer and not gpu", *more())
    found.add(doctests(["integrations.transformers"]))
    return found


def more() -> list[str]:
    return shlex.split(os.environ.get("PYTEST_ARGS", ""))


def cpp(kind: str = "", sanitize: str = "", target: str = "all") -> Counts:
    """Build and run the C++ tests; the compiler's output is shown only if it fails."""
    name = f"C++{' ' + kind if kind else ''}"
    build = ROOT / "build" / ("cpp-" + kind if kind else "cpp")
    begin = time.monotonic()
    print(f"{name}: building", flush=True)
    configure = [str(BIN / "cmake"), "-S", ".", "-B", str(build), "-G", "Ninja"]
    configure += ["-DHOTLOOP_CPP_TESTS=ON", f"-DHOTLOOP_SANITIZE={sanitize}"]
    strict = "OFF" if sanitize else os.environ.get("HOTLOOP_WERROR", "OFF")
    configure += [f"-DHOTLOOP_WERROR={strict}"]
    compile_ = [str(BIN / "cmake"), "--build", str(build), "--target", target]
    for words in (configure, compile_):
        if not quiet(name, words):
            return finished(name, 1, Counts(), begin)
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        words = [str(BIN / "ctest"), "-j2", "--test-dir", str(build), "--output-on-failure"]
        status = 0 if quiet(name, [*words, "--output-junit", str(junit)]) else 1
        return finished(name, status, counted(junit), begin)


def quiet(name: str, words: list[str]) -> bool:
    """Run, with the output in build/logs; print it if the command fails."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name.replace('+', 'p').replace(' ', '-').lower()}.log"
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(
            words, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status != 0:
        print(log.read_text(encoding="utf-8", errors="replace"), flush=True)
    return status == 0


def sanitized() -> Counts:
    found = cpp("sanitized", "address,undefined")
    found.add(cpp("threads", "thread", "test_table"))
    return found


SUITES: dict[str, Callable[[], Counts]] = {
    "cpp": cpp,
    "python": python,
    "sanitized": sanitized,
    "slow": slow,
    "peers": peers,
}


def main(names: Sequence[str]) -> int:
    unknown = [name for name in names if name not in SUITES]
    if unknown or not names:
        print(f"usage: run_tests.py {' | '.join(SUITES)} ...", file=sys.stderr)
        return 2
    begin, total = time.monotonic(), Counts()
    for name in names:
        total.add(SUITES[name]())
    print(f"{total} in {time.monotonic() - begin:.0f} s")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
