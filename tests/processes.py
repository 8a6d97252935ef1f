# SPDX-License-Identifier: Apache-2.0
"""Python in a process of its own: for what an import, a fork, a signal or an environment variable does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

WITHOUT_TORCH = """
import importlib.util, sys, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *r: None if name == "torch" else find(name, *r)

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
"""
"""Before other code: as if torch were not installed."""


def python(*words: str, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the root of the repository with these arguments and environment variables."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def printed(code: str, *words: str, **variables: str) -> str:
    """What the code prints; it has to end well."""
    done = python("-c", code, *words, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
