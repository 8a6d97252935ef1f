# SPDX-License-Identifier: Apache-2.0
"""``bench/run_gpu.sh`` from end to end with a Python that only plays its part: limits, interrupts, what it builds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from bench import _registry

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "run_gpu.sh"
ROOMS = {bench.op.split(".")[0] for bench in _registry.benches()}
pytestmark = [
    pytest.mark.source,
    pytest.mark.skipif(
        any(shutil.which(name) is None for name in ("bash", "timeout", "env")), reason="no bash"
    ),
]

# What the script asks of Python: the device, whether it can build, and its own summary; all else is a step. A step
# writes a line when it starts, and another when it is interrupted: SLOW ones wait for that.
PLAYED = """
#!{python}
import os, signal, sys, time
words = sys.argv[1:]
text = " ".join(words)
if words[:1] == ["-"]:
    sys.argv = words
    exec(compile(sys.stdin.read(), "summary", "exec"), {{"__name__": "__main__"}})
    sys.exit()
if "get_device_capability" in text:
    print("90")
    sys.exit()
if "scik" in text or "cmakedir" in text:
    sys.exit(0 if "scik" in text else 1)
log = open(os.environ["PLAYED_LOG"], "a", buffering=1)
log.write("start " + text + "\\n")
try:
    for name in os.environ.get("PLAYED_SLOW", "").split(","):
        if name and name in text:
            time.sleep(60)
    for name in os.environ.get("PLAYED_FAIL", "").split(","):
        if name and name in text:
            sys.exit(1)
except KeyboardInterrupt:
    log.write("interrupted " + text + "\\n")
    sys.exit(130)
"""


def play(tmp_path: Path, **environment: str) -> tuple[dict[str, Any], list[str], int]:
    """The summary, what the played Python was asked for, and the exit status."""
    python = tmp_path / "python"
    python.write_text(textwrap.dedent(PLAYED).lstrip().format(python=sys.executable))
    python.chmod(0o755)
    log = tmp_path / "played.txt"
    log.write_text("")
    done = subprocess.run(
        ["bash", str(SCRIPT), str(tmp_path / "out")],
        env={
            **os.environ, "HOTLOOP_PYTHON": str(python), "PLAYED_LOG": str(log), "TMPDIR": str(tmp_path),
            **environment,
        },
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    return summary, log.read_text().splitlines(), done.returncode


def status(summary: dict[str, Any]) -> dict[str, str]:
    return {step["step"]: step["status"] for step in summary["steps"]}


def test_a_run_in_which_all_goes_well(tmp_path: Path) -> None:
    summary, asked, _ = play(tmp_path)
    found = status(summary)
    # nvidia-smi and compute-sanitizer are not part of the play.
    rest = {k: v for k, v in found.items() if k not in ("environment", "memcheck", "racecheck")}
    assert set(rest.values()) == {"ok"}, found
    smoke = [line for line in asked if "bench._smoke" in line]
    assert {line.split()[-1] for line in smoke} == ROOMS  # a process per room
    assert len(smoke) == len(ROOMS)
    first_number = next(i for i, line in enumerate(asked) if "bench run" in line)
    tests = next(i for i, line in enumerate(asked) if "-m pytest" in line)
    assert asked.index(smoke[-1]) < first_number < tests
    assert all("--no-judge" in line for line in asked if "bench run" in line)


def test_a_step_out_of_time_is_interrupted_and_can_write_what_it_has(tmp_path: Path) -> None:
    """TERM would end pytest and the benches without a report."""
    summary, asked, code = play(tmp_path, PLAYED_SLOW="-m pytest", HOTLOOP_BUDGET_S="13")
    assert status(summary)["pytest-gpu"] == "timed out"
    assert [line for line in asked if line.startswith("interrupted") and "-m pytest" in line]
    assert status(summary)["memcheck"] == "not started"
    assert code == 1


def test_a_smoke_in_the_background_is_interrupted_too(tmp_path: Path) -> None:
    summary, asked, _ = play(tmp_path, PLAYED_SLOW="bench._smoke", HOTLOOP_BUDGET_S="13")
    assert status(summary)["smoke"] == "timed out"
    assert len([line for line in asked if line.startswith("interrupted")]) == len(ROOMS)


def test_one_wrong_room_makes_the_smoke_red(tmp_path: Path) -> None:
    summary, _, code = play(tmp_path, PLAYED_FAIL="bench._smoke table")
    assert status(summary)["smoke"] == "failed"
    assert "smoke" in summary["failed"]
    assert code == 1


def test_a_package_that_does_not_load_is_built_instead(tmp_path: Path) -> None:
    prebuilt = tmp_path / "prebuilt"
    prebuilt.mkdir()
    summary, _, _ = play(tmp_path, HOTLOOP_PREBUILT=str(prebuilt))
    assert status(summary)["prebuilt"] == "ok"
    assert "build" not in status(summary)
    summary, asked, _ = play(tmp_path, HOTLOOP_PREBUILT=str(prebuilt), PLAYED_FAIL="bench._loads")
    assert status(summary)["prebuilt"] == "failed"
    assert status(summary)["build"] == "ok"
    # A package that was built and does not load either is red, and not a list of skipped tests.
    assert status(summary)["info"] == "failed"
    assert any("pip install" in line for line in asked)


def test_prebuilding_is_one_command_for_one_architecture(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(SCRIPT), "--prebuild", str(tmp_path / "package"), "--dry-run"],
        env={**os.environ, "HOTLOOP_ARCH": "100"}, capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    assert f"--target '{tmp_path / 'package'}'" in done.stdout
    assert "HOTLOOP_CUDA_ARCHS=100-real" in done.stdout
