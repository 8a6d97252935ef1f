"""The committed stubs are what the built modules give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.source]


def test_stubs_are_those_of_the_built_modules() -> None:
    pytest.importorskip("pybind11_stubgen")
    command = [sys.executable, str(ROOT / "tools" / "write_stubs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
