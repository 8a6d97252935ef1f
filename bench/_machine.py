# SPDX-License-Identifier: Apache-2.0
"""The machine and the versions a row was measured with. Models, never names of hosts."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from ._options import CORES

ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch", "triton", "numpy", "hotloop", "trl", "liger-kernel", "cut-cross-entropy", "torchrec",
    "fbgemm-gpu-cpu",
)  # fmt: skip
_HEADERS = ("libcuckoo-dev", "libabsl-dev")


@functools.cache
def cpu_name() -> str:
    """Model of the CPU and the number of cores this process may use, e.g. "Xeon 8480 (2 cores)"."""
    from hotloop import info

    model = re.sub(r"\((R|TM)\)|CPU|Processor|@[^f]*", "", info.cpu_name())
    plural = "" if CORES == 1 else "s"
    return f"{' '.join(model.split())} ({CORES} core{plural})"


@functools.cache
def device_name(device: str) -> str:
    if device == "cpu":
        return cpu_name()
    import torch

    return str(torch.cuda.get_device_name())


def simd() -> dict[str, str]:
    """Instruction sets that torch and hotloop run with."""
    import torch

    found = {"torch": torch.backends.cpu.get_cpu_capability()}
    try:
        from hotloop.front import native

        found["hotloop"] = str(native.core.simd_level())
    except (ImportError, AttributeError):
        found["hotloop"] = "not built"
    return found


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "hotloop" not in found and importlib.util.find_spec("hotloop"):
        import hotloop

        found["hotloop"] = hotloop.__version__
    for package in _HEADERS:
        version = _output(["dpkg-query", "-W", "-f", "${Version}", package])
        if version:
            found[package.removesuffix("-dev")] = version
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    if driver:
        found["driver"] = driver.splitlines()[0]
    return found


@functools.cache
def commit() -> str:
    """Short hash, with "-dirty" for a changed tree.

    Outside a git checkout what ``BENCH_COMMIT`` says (``run_gpu.sh`` sets it for a package built
    elsewhere), or "unknown".
    """
    head = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if not head:
        return os.environ.get("BENCH_COMMIT") or "unknown"
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return head + ("-dirty" if changed else "")


def command() -> str:
    if Path(sys.argv[0]).name == "__main__.py":
        return shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _output(words: list[str]) -> str:
    if shutil.which(words[0]) is None:
        return ""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
