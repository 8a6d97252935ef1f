# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a step above its inputs: a fresh process on the CPU, the allocator on a GPU.

Whatever a contender holds beyond its inputs counts: gradients, temporaries, and the workspace that it keeps from one
step to the next.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from ._case import Case, Contender, step
from ._machine import ROOT
from ._options import Options

Peak = tuple[float, float]
"""MB above the inputs, and MB above inputs and results (value and gradients); both with what is kept between steps."""

# Every block of 64 KiB or more comes from and goes back to the kernel, so the resident size falls
# when memory is freed and the peak after a warm-up is the peak of the step.
_ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
_TIMEOUT_S = 900


def peak(case: Case, contender: Contender, options: Options) -> Peak | None:
    """Measure, or return None where that cannot be done."""
    if case.device == "cuda":
        return _cuda(case, contender)
    words = [sys.executable, "-m", "bench", "_peak", case.op, *options.argv()]
    words += ["--case", case.key, "--contender", contender.name]
    environment = {**os.environ, **_ALLOCATOR}
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S,
            check=False,
        )  # fmt: skip
        answer = json.loads(done.stdout.splitlines()[-1])
        return (float(answer[0]), float(answer[1])) if answer else None
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None


def report(case: Case, contender: Contender, products: bool = True) -> None:
    """The child's side: print the peak as JSON, or null where the mark cannot be reset."""
    libraries = [] if products else [_without_products()]
    print(json.dumps(_cpu(case, contender)))
    libraries.clear()


def _without_products() -> torch.library.Library:
    """Replace torch's CPU matrix products, eager and compiled, by zeros of the same size while the result lives.

    What a step allocates does not depend on what its products hold, and they are nearly all of its time:
    minutes in bfloat16 on a CPU without instructions for it. The scratch memory of a product itself is left out.
    """

    def result(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # Not torch.zeros: its pages are not there before somebody writes to them.
        return torch.empty(*a.shape[:-1], b.shape[-1], dtype=a.dtype, device=a.device).zero_()

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        library.impl("mm", result, "CPU")
        library.impl("bmm", result, "CPU")
        library.impl("mm.out", lambda a, b, *, out: out.zero_(), "CPU")
        library.impl("bmm.out", lambda a, b, *, out: out.zero_(), "CPU")
        library.impl("addmm", lambda c, a, b, *, beta=1, alpha=1: result(a, b), "CPU")
        library.impl("addmm.out", lambda c, a, b, *, beta=1, alpha=1, out: out.zero_(), "CPU")
    return library


def _cpu(case: Case, contender: Contender) -> Peak | None:
    if case.threads:
        torch.set_num_threads(case.threads)
    inputs = case.make_inputs(0)
    step(contender, inputs, case.mode)  # loads libraries, compiles
    _forget()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the resident size
    except (OSError, AttributeError):
        return None
    before = _status_mb("VmRSS")
    results = step(contender, inputs, case.mode)
    above = _status_mb("VmHWM") - before
    return above, above - sum(t.nbytes for t in results) / 1e6


def _forget() -> None:
    """Free the buffer that hotloop keeps between steps, so that the step that is measured pays for it."""
    kept = sys.modules.get("hotloop.front.buffers")
    if kept is not None:
        kept.workspace.take(0)


def _cuda(case: Case, contender: Contender) -> Peak:
    inputs = case.make_inputs(0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    step(contender, inputs, case.mode)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    results = step(contender, inputs, case.mode)
    torch.cuda.synchronize()
    above = (torch.cuda.max_memory_allocated() - before) / 1e6
    return above, above - sum(t.nbytes for t in results) / 1e6


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return float(line.split()[1]) * 1024 / 1e6
    raise OSError(f"no {name} in /proc/self/status")
