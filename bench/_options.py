"""The flags that every command shares."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, fields
from pathlib import Path

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


@dataclass(frozen=True)
class Options:
    """What to run and how long; ``argv`` hands it to a child process."""

    device: str = "cpu"
    dtype: str | None = None
    """Only cases of this dtype; None for all."""
    quick: bool = False
    """Small shapes and few rounds: shows that a bench works, its times are no results."""
    sweep: bool = False
    """More sizes per bench, for plots over size."""
    only: str | None = None
    """Comma-separated contenders to run beside ours; None for all."""
    threads: int | None = None
    """CPU threads; None for what the case says, or else all the cores allowed."""
    simd: str = "native"
    seconds: float = 20.0
    """Time to spend measuring one case, warm-up aside."""
    order_seed: int = 0
    """Draws the order of the contenders, anew in every round."""
    memory: bool | None = None
    """Measure peak memory; None for unless ``quick``."""
    products: bool = True
    """Compute matrix products; without, memory is measured with zeros of their size."""
    judge: bool = True
    """Judge random results by their law; without, a contender only has to run."""
    keep_going: bool = False
    """Leave a rival out that fails its check; otherwise the whole case prints no number."""
    quiet: bool = False

    @property
    def measures_memory(self) -> bool:
        return not self.quick if self.memory is None else self.memory

    def wants(self, contender: str) -> bool:
        return self.only is None or contender in self.only.split(",")

    def argv(self) -> list[str]:
        words: list[str] = []
        for field in fields(self):
            value = getattr(self, field.name)
            flag = "--" + field.name.replace("_", "-")
            if value == field.default:
                continue
            if field.name in ("memory", "judge", "products"):
                words.append(flag if value else f"--no-{field.name}")
            elif isinstance(value, bool):
                words.append(flag)
            else:
                words += [flag, str(value)]
        return words


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The same flags for every command, so that a line can be edited from ``list`` to ``run``."""
    d = Options()
    parser.add_argument("--device", choices=("cpu", "cuda"), default=d.device)
    parser.add_argument("--dtype", choices=DTYPES, default=d.dtype, help="only this dtype")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, few rounds: a smoke run"
    )
    parser.add_argument("--sweep", action="store_true", help="more sizes, for plots")
    parser.add_argument("--only", metavar="NAMES", default=d.only, help="rivals to run, a,b,c")
    parser.add_argument("--threads", type=int, default=d.threads, help="CPU threads")
    parser.add_argument("--simd", choices=SIMD, default=d.simd, help="highest instruction set")
    parser.add_argument("--seconds", type=float, default=d.seconds, help="measuring time per case")
    parser.add_argument(
        "--order-seed",
        type=int,
        metavar="N",
        default=d.order_seed,
        help="draws the order of the contenders in every round",
    )
    parser.add_argument(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=d.memory,
        help="measure peak memory",
    )
    parser.add_argument(
        "--products",
        action=argparse.BooleanOptionalAction,
        default=d.products,
        help="for memory: compute matrix products (no: zeros of their size, in seconds)",
    )
    parser.add_argument(
        "--judge",
        action=argparse.BooleanOptionalAction,
        default=d.judge,
        help="judge random results by their law, seconds per contender (no: tests have done it)",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="drop a rival that fails its check, time the rest"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        default=DEFAULT_OUT,
        help=f"rows (default {DEFAULT_OUT}, of memory {DEFAULT_MEMORY_OUT})",
    )


def from_arguments(parsed: argparse.Namespace) -> Options:
    return Options(**{field.name: getattr(parsed, field.name) for field in fields(Options)})


def pin(options: Options) -> None:
    """Fix cores, threads and instruction set. Only sure to work before torch is imported."""
    if hasattr(os, "sched_setaffinity") and options.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if options.simd != "native":
        os.environ.update(_SIMD_VARIABLES[options.simd])
        os.environ["HOTLOOP_SIMD"] = options.simd
