# SPDX-License-Identifier: Apache-2.0
"""The flags that every command shares."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
SIMD = ("native", "baseline", "avx2", "avx512")
DEFAULT_OUT = Path("out/bench.jsonl")
DEFAULT_MEMORY_OUT = Path("out/memory.jsonl")

# Cores of this process before anything is pinned.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# What each library must be told, before it is loaded, to stay below an instruction set.
_SIMD_VARIABLES = {
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
}


def _flag(default: Any, help: str = "", **how: Any) -> Any:
    return field(default=default, metadata={"help": help, **how})


_YES_OR_NO = {"action": argparse.BooleanOptionalAction}


@dataclass(frozen=True)
class Options:
    """What to run and how long; each field is a flag, and ``argv`` hands them to a child process."""

    device: str = _flag("cpu", choices=("cpu", "cuda"))
    dtype: str | None = _flag(None, "only cases of this dtype", choices=DTYPES)
    quick: bool = _flag(
        False, "small shapes, few rounds: shows that a bench works, its times are no results"
    )
    sweep: bool = _flag(False, "more sizes per bench, for plots over size")
    only: str | None = _flag(None, "rivals to run beside ours, a,b,c", metavar="NAMES")
    threads: int | None = _flag(
        None, "CPU threads, if not what the case says, or else all the cores allowed", type=int
    )
    simd: str = _flag("native", "highest instruction set", choices=SIMD)
    seconds: float = _flag(20.0, "measuring time per case, warm-up aside", type=float)
    order_seed: int = _flag(
        0, "draws the order of the contenders, anew in every round", type=int, metavar="N"
    )
    memory: bool | None = _flag(None, "measure peak memory; not if --quick", **_YES_OR_NO)
    products: bool = _flag(
        True,
        "for memory: compute matrix products (no: zeros of their size, in seconds)",
        **_YES_OR_NO,
    )
    judge: bool = _flag(
        True,
        "judge random results by their law, seconds per contender (no: tests have done it)",
        **_YES_OR_NO,
    )
    keep_going: bool = _flag(False, "drop a rival that fails its check, time the rest")
    quiet: bool = _flag(False, "no progress bar")

    @property
    def measures_memory(self) -> bool:
        return not self.quick if self.memory is None else self.memory

    def wants(self, contender: str) -> bool:
        return self.only is None or contender in self.only.split(",")

    def argv(self) -> list[str]:
        words: list[str] = []
        for each in fields(self):
            value = getattr(self, each.name)
            flag = "--" + each.name.replace("_", "-")
            if value == each.default:
                continue
            if not isinstance(value, bool):
                words += [flag, str(value)]
            else:
                words.append(flag if value else f"--no-{each.name}")
        return words


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The same flags for every command, so that a line can be edited from ``list`` to ``run``."""
    for each in fields(Options):
        how = {"action": "store_true"} if each.default is False else {}
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, default=each.default, **how, **each.metadata)
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=DEFAULT_OUT,
        help=f"rows (default {DEFAULT_OUT}, of memory {DEFAULT_MEMORY_OUT})",
    )


def from_arguments(parsed: argparse.Namespace) -> Options:
    return Options(**{each.name: getattr(parsed, each.name) for each in fields(Options)})


def pin(options: Options) -> None:
    """Fix cores, threads and instruction set. Only sure to work before torch is imported."""
    if hasattr(os, "sched_setaffinity") and options.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.simd != "native":
        os.environ.update(_SIMD_VARIABLES[options.simd])
        os.environ["HOTLOOP_SIMD"] = options.simd
