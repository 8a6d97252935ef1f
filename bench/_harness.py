# SPDX-License-Identifier: Apache-2.0
"""Run one case: check, warm up, time in turns, measure memory, write rows."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from . import _memory, _row
from ._case import Case, Contender, Entry, Inputs, Missing, resolve, step
from ._check import CheckFailed, check, first_line
from ._options import Options
from ._rows import ROOF, case_rows
from ._timing import Call, Sampler, cpu_samplers, cuda_samplers, warm_up
from .progress import Progress

_LEAST_ROUNDS, _MOST_ROUNDS, _QUICK_ROUNDS = 7, 201, 3
_WARM_UP_S, _QUICK_WARM_UP_S = 0.5, 0.02

# torch 2.13, bfloat16: code generated under ATEN_CPU_CAPABILITY=avx2 ends in a segmentation fault.
_NO_COMPILE = "torch.compile is left out below the native instruction set: its code crashes there"


@dataclass
class Outcome:
    """What a case came to: rows, or reasons why there are none."""

    case: str
    rows: list[_row.Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Contenders that cannot run here."""
    failed: dict[str, str] = field(default_factory=dict)
    """Contenders that raised or disagree."""


def run_case(case: Case, options: Options, out: Path | None) -> Outcome:
    """Measure one case and append its rows to ``out``.

    Raises:
        CheckFailed: contenders disagree. Nothing was timed and no row was written.
        KeyboardInterrupt: passed on after the rounds finished so far were written.
    """
    outcome = Outcome(case.key)
    entries = [resolve(e) for e in case.contenders if options.wants(e.name) or _always(e)]
    outcome.skipped = {c.name: c.reason for c in entries if isinstance(c, Missing)}
    present = [c for c in entries if isinstance(c, Contender)]
    if options.simd != "native":
        outcome.skipped |= {c.name: _NO_COMPILE for c in present if c.compiles}
        present = [c for c in present if not c.compiles]
    if not any(c.role == "ours" for c in present):
        return outcome
    with _threads(case), Progress(quiet=options.quiet) as progress:
        torch.compiler.reset()  # shapes of earlier cases must not make this one dynamic
        progress.stage(f"{case.key}: inputs and check")
        inputs = [case.make_inputs(seed) for seed in range(case.sets)]
        timed, errors = _checked(case, present, inputs[0], options, outcome)
        if not any(c.role == "ours" for c in timed):
            return outcome
        samplers = _prepare(case, timed, inputs, options, outcome, progress)
        timers = {name: sampler.timer for name, sampler in samplers.items()}
        samples: dict[str, list[float]] = {name: [] for name in samplers}
        peaks: dict[str, _memory.Peak | None] = {}
        try:
            _measure(samplers, samples, options, progress, case.key)
            samplers.clear()  # and with them the input sets
            inputs.clear()
            if options.measures_memory:
                measured = [c for c in timed if c.checked and not c.elsewhere]
                for contender in (c for c in measured if c.name in samples):
                    progress.stage(f"{case.key}: memory of {contender.name}")
                    peaks[contender.name] = _memory.peak(case, contender, options)
        finally:
            outcome.rows = case_rows(case, timed, samples, timers, errors, peaks, options)
            if out is not None:
                for row in outcome.rows:
                    _row.write(row, out)
    return outcome


def _always(entry: Entry) -> bool:
    """Ours is measured and plain torch checked, whatever rivals are wanted."""
    if isinstance(entry, Contender):
        return entry.role in ("ours", "plain")
    return entry.name.startswith("hotloop")


def _checked(
    case: Case, present: list[Contender], inputs: Inputs, options: Options, outcome: Outcome
) -> tuple[list[Contender], dict[str, list[float]]]:
    """The contenders to time: those wanted that ran and agree."""
    checked = check(case, present, inputs, options.judge)
    outcome.failed.update(checked.broken)
    ours = {c.name for c in present if c.role == "ours"}
    if checked.disagree and (not options.keep_going or ours & set(checked.disagree)):
        raise CheckFailed("; ".join(checked.disagree.values()))
    outcome.failed.update(checked.disagree)
    timed = [
        c for c in present
        if c.name not in outcome.failed and (c.role == "ours" or options.wants(c.name))
    ]  # fmt: skip
    return timed, checked.errors


def _prepare(
    case: Case,
    timed: list[Contender],
    inputs: list[Inputs],
    options: Options,
    outcome: Outcome,
    progress: Progress,
) -> dict[str, Sampler]:
    """Warm up every contender by time, and build its clock."""
    calls: dict[str, Call] = {c.name: _call(c, inputs, case.mode) for c in timed}
    if case.roof is not None:
        buffers = [case.roof() for _ in range(case.sets)]
        calls[ROOF] = lambda i: buffers[i]()
    synchronise = torch.cuda.synchronize if case.device == "cuda" else (lambda: None)
    seconds = _QUICK_WARM_UP_S if options.quick else _WARM_UP_S
    per_step: dict[str, float] = {}
    for name, call in calls.items():
        progress.stage(f"{case.key}: warm-up of {name}")
        try:
            per_step[name] = warm_up(call, case.sets, seconds, synchronise)
        except Exception as error:  # a rival that breaks on one input set must not end the run
            outcome.failed[name] = first_line(error)
    calls = {name: call for name, call in calls.items() if name in per_step}
    build = cuda_samplers if case.device == "cuda" else cpu_samplers
    return build(per_step, calls, case.sets)


def _call(contender: Contender, inputs: list[Inputs], mode: str) -> Call:
    return lambda i: step(contender, inputs[i], mode)


def _measure(
    samplers: dict[str, Sampler],
    samples: dict[str, list[float]],
    options: Options,
    progress: Progress,
    title: str,
) -> None:
    """Rounds in which every contender has one turn, in an order drawn anew for each.

    Who follows a contender that frees large buffers pays for the pages: in a fixed order, or one that only
    rotates, that would always be the same one.
    """
    least = _QUICK_ROUNDS if options.quick else _LEAST_ROUNDS
    names, order = list(samplers), random.Random(options.order_seed)
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    begin, next_step = time.perf_counter(), 1
    progress.stage(title, total=None if options.quick else options.seconds)
    try:
        for round_ in range(_MOST_ROUNDS):
            spent = time.perf_counter() - begin
            if round_ >= least and (options.quick or spent > options.seconds):
                break
            if round_ >= next_step:
                progress.step(spent, f"{round_} rounds")
                next_step *= 2
            order.shuffle(names)
            turn = {name: samplers[name].sample(round_) for name in names}
            for name, seconds in turn.items():  # whole rounds only
                samples[name].append(seconds)
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _threads(case: Case) -> Iterator[None]:
    """Threads of the case, and for one thread one core."""
    before = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        if case.threads:
            torch.set_num_threads(case.threads)
            if cores and case.threads == 1:
                os.sched_setaffinity(0, {max(cores)})
        yield
    finally:
        torch.set_num_threads(before)
        if cores:
            os.sched_setaffinity(0, cores)
