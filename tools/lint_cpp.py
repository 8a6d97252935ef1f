# SPDX-License-Identifier: Apache-2.0
"""Lint C++ and CUDA: formatted by clang-format, and with ``--tidy`` the host's files looked at by clang-tidy.

``python tools/lint_cpp.py`` exits 1 on a finding; ``--fix`` formats instead. clang-tidy (.clang-tidy has its checks)
needs no build: it gets the include paths alone. It skips csrc/**/*.simd.cpp, whose target pragmas are GCC's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SUFFIXES = {".cpp", ".hpp", ".cu", ".cuh"}
FOLDERS = ("csrc", "kernels", "tests/cpp", "bench")


def sources() -> list[Path]:
    return sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*") if p.suffix in SUFFIXES)


def flags() -> list[str]:
    """How a host file compiles. omp.h is GCC's, behind clang's own headers."""
    import pybind11

    found = subprocess.run(
        ["c++", "-print-file-name=include"], capture_output=True, text=True, check=True
    )
    system = (sysconfig.get_paths()["include"], pybind11.get_include())
    return [
        "-std=c++20",
        "-fopenmp",
        "-DHOTLOOP_SIMD_LEVELS=0,1,2",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT}",
        *(word for path in system for word in ("-isystem", path)),
        *("-idirafter", found.stdout.strip()),
    ]


def tidy(file: Path, words: list[str]) -> str:
    """What clang-tidy found in a file, "" if nothing."""
    command = [str(BIN / "clang-tidy"), "--quiet", str(file), "--", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode != 0 else ""


def main(arguments: list[str]) -> int:
    every = sources()
    how = ["-i"] if "--fix" in arguments else ["--dry-run", "--Werror"]
    formatted = subprocess.run([str(BIN / "clang-format"), *how, *map(str, every)], check=False)
    if "--tidy" not in arguments:
        return formatted.returncode
    host = [
        p
        for p in every
        if p.is_relative_to(ROOT / "csrc")
        and p.suffix == ".cpp"
        and not p.name.endswith(".simd.cpp")
        and not p.name.startswith("cuda_")
    ]
    words = flags()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = [text for text in pool.map(lambda file: tidy(file, words), host) if text]
    print("".join(found), end="")
    return 1 if found or formatted.returncode != 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
