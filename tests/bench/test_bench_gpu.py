# SPDX-License-Identifier: Apache-2.0
"""The GPU run itself: a package that cannot run there is an error, and a run of nothing is red."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, python

from bench import _loads, _smoke


@pytest.mark.parametrize(
    ("devices", "held", "problem"),
    [
        (1, ["sm_80", "sm_90"], ""),
        (0, ["sm_90"], "finds no device"),
        (1, ["sm_80", "compute_80"], "holds sm_80 compute_80, not sm_90"),
        (1, [], "holds , not sm_90"),
    ],
)
def test_a_package_without_a_device_or_its_code_is_refused(
    devices: int, held: list[str], problem: str
) -> None:
    cuda = SimpleNamespace(device_count=lambda: devices, architectures=lambda: held)
    found = _loads.problem(cuda, 90)  # type: ignore[arg-type]
    assert problem in found
    assert bool(found) == bool(problem)


def test_a_module_that_cannot_be_imported_fails_with_the_cause(tmp_path: Path) -> None:
    package = tmp_path / "hotloop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_core.py").write_text("")
    (package / "_cuda.py").write_text("raise ImportError('undefined symbol: cudaFoo')")
    # -S: an editable install finds hotloop before the path is looked at.
    path = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p.endswith("site-packages"))])
    done = python("-S", "-m", "bench._loads", "90", PYTHONPATH=path)
    assert done.returncode == 1
    assert "undefined symbol: cudaFoo" in done.stderr


def test_the_smoke_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the same cases are right; a wrong loss is named."""
    assert _smoke.main(["preference"], "cpu") == 0
    case = next(iter(_smoke.cases("preference", "cpu")))
    assert _smoke.wrong(case) == ""
    monkeypatch.setattr(_smoke, "check", lambda *_: SimpleNamespace(
        broken={}, disagree={c.name: "is off" for c in case.contenders}
    ))  # fmt: skip
    assert "is off" in _smoke.wrong(case)
    assert _smoke.main([], "cpu") == 1


def run_pytest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from gpu_run import pytest_runtest_logreport, pytest_sessionfinish, "
        "pytest_terminal_summary\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a GPU\n")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_gpu_run_in_which_nothing_ran_is_red(tmp_path: Path) -> None:
    test = tmp_path / "test_one.py"
    test.write_text(
        textwrap.dedent(
            """
            import os, pytest

            @pytest.mark.gpu
            @pytest.mark.skipif("THERE" not in os.environ, reason="no CUDA device")
            def test_kernel(): pass

            def test_other(): pass
            """
        )
    )
    red = run_pytest(tmp_path, "-m", "gpu")
    assert red.returncode == 1, red.stdout
    assert "no GPU test ran" in red.stdout
    # Another selection may skip them.
    assert run_pytest(tmp_path).returncode == 0
    assert run_pytest(tmp_path, "-m", "not gpu").returncode == 0
    os.environ["THERE"] = "1"
    try:
        assert run_pytest(tmp_path, "-m", "gpu").returncode == 0
    finally:
        del os.environ["THERE"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_this_machine_can_run_what_is_installed() -> None:
    """An ImportError of ``_cuda`` is a failure here, where all other GPU tests would skip."""
    major, minor = torch.cuda.get_device_capability()
    assert _loads.main(10 * major + minor) == 0
