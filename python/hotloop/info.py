# SPDX-License-Identifier: Apache-2.0
"""The environment report: what is compiled, what runs here, and what is missing.

Standard library only, every probe guarded: it prints even where the installation is broken.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Callable
from typing import Any

from . import __version__
from ._catalog import IMPLS, catalog
from .front.environment import VARIABLES

_PACKAGES = (
    "numpy",
    "torch",
    "triton",
    "cupy",
    "transformers",
    "trl",
    "liger_kernel",
    "cut_cross_entropy",
)


def _guard(probe: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return probe()
    except Exception as error:
        return otherwise if otherwise is not None else f"{type(error).__name__}: {error}"


def cpu_name() -> str:
    """Model of the CPU as the system gives it, with family and model number where the name has no number."""
    found: dict[str, str] = {}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                name, _, value = line.partition(":")
                found.setdefault(name.strip(), value.strip())
    except OSError:
        pass
    model = found.get("model name") or platform.processor() or platform.machine() or "unknown"
    if "cpu family" in found and "model" in found and not re.search(r"\d{3}", model):
        model += f" family {found['cpu family']} model {found['model']}"
    return model


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _commit() -> str:
    """The commit this was built from; a source tree that was not installed does not know."""
    found: str = importlib.import_module("hotloop._commit").COMMIT
    return found


def _core() -> dict[str, Any]:
    from .front.native import core as module

    return {
        "loaded_from": module.__file__,
        "compiled": list(module.simd_levels()),
        "runnable": [name for name, runs in module.simd_levels().items() if runs],
        "in_force": module.simd_level(),
        "threads": module.max_threads(),
        "heads": sum(len(heads) for heads in module.pointwise.heads().values()),
    }


def _cuda() -> dict[str, Any]:
    spec = importlib.util.find_spec("hotloop._cuda")
    if spec is None or spec.origin is None:  # only the folder of its stubs
        return {"compiled": False, "devices": 0}
    from .front.native import cuda as module

    if module is None:
        return {
            "compiled": True,
            "loaded_from": spec.origin,
            "error": "cannot be loaded",
            "devices": 0,
        }
    return {
        "compiled": True,
        "loaded_from": module.__file__,
        "architectures": list(module.architectures()),
        "devices": module.device_count(),
    }


def collect() -> dict[str, Any]:
    """Return the report as a dictionary."""
    nvcc = _run("nvcc", "--version")
    driver = _run("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return {
        "hotloop": __version__,
        "commit": _guard(_commit, "unknown"),
        "python": platform.python_version(),
        "platform": f"{platform.system().lower()} {platform.machine()}",
        "cpu": _guard(cpu_name, "unknown"),
        "cores": os.cpu_count(),
        "core_module": _guard(_core, None),
        "cuda_module": _guard(_cuda, None),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda_toolkit": nvcc.splitlines()[-1] if nvcc else None,
        "gpu": driver.splitlines() if driver else [],
        "environment": {name: os.environ.get(name) for name in (*VARIABLES, "OMP_NUM_THREADS")},
        "ops": [op.facts() for op in catalog()],
    }


def _cell(impl: str, op: dict[str, Any], report: dict[str, Any]) -> str:
    if impl not in op["impls"]:
        return "-"
    if impl == "cpu":
        return "yes" if isinstance(report["core_module"], dict) else "not loadable"
    if impl == "cuda":
        module = report["cuda_module"]
        if not isinstance(module, dict) or not module["compiled"]:
            return "not compiled"
        return "yes" if module["devices"] else "no GPU"
    if impl == "triton":
        if report["packages"]["triton"] is None:
            return "not installed"
        return "yes" if report["gpu"] else "no GPU"
    return "needs torch" if op["needs_torch"] and report["packages"]["torch"] is None else "yes"


def render(report: dict[str, Any]) -> str:
    core, cuda = report["core_module"], report["cuda_module"]
    lines = [
        f"hotloop {report['hotloop']} (commit {report['commit']})    python {report['python']}    {report['platform']}",
        f"cpu     {report['cpu']}, {report['cores']} cores",
    ]
    if isinstance(core, dict):
        lines.append(
            f"_core   compiled: {' '.join(core['compiled'])}   runnable here: {' '.join(core['runnable'])}   "
            f"in force: {core['in_force']}   threads: {core['threads']}"
        )
        lines.append(f"        {core['loaded_from']}")
    else:
        lines.append(f"_core   {core}")
    if isinstance(cuda, dict):
        state = "not compiled"
        if cuda["compiled"]:
            state = (
                cuda.get("error")
                or f"compiled for {' '.join(cuda['architectures'])}   devices: {cuda['devices']}"
            )
        lines.append(f"_cuda   {state}")
    else:
        lines.append(f"_cuda   {cuda}")
    packages = "   ".join(
        f"{name} {version or 'not installed'}" for name, version in report["packages"].items()
    )
    lines.append(f"with    {packages}")
    lines.append(
        f"toolkit {report['cuda_toolkit'] or 'none'}   gpu {'; '.join(report['gpu']) or 'none'}"
    )
    lines.append("")
    lines.append(f"{'op':40s}" + "".join(f"{name:15s}" for name in IMPLS) + "maturity")
    for op in report["ops"]:
        cells = "".join(f"{_cell(impl, op, report):15s}" for impl in IMPLS)
        lines.append(f"{op['name']:40s}{cells}{op['maturity']}")
    lines.append("")
    lines.append(
        "   ".join(f"{name} {value or 'unset'}" for name, value in report["environment"].items())
    )
    return "\n".join(lines)
