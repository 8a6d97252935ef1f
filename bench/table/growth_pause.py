# SPDX-License-Identifier: Apache-2.0
"""How long a reader and a writer wait while a table grows under them.

    python -m bench.table.growth_pause                  # 1 million to 16 million rows of 64 numbers, and of 2
    python -m bench.table.growth_pause --rows 20000 --until 320000 --dim 2

No ``Case``: what counts here is the worst call and not the median one, and nobody is compared. A thread reads 1024
stored keys over and over; the main thread inserts new keys, 1024 at a time, as fast as it can. Once into a table that
was made for ``rows`` and doubles its index on the way ("grows"), once into one that had room for all from the start
("has room"). The second is the control: what its calls wait for is the machine, page faults and Python's lock, of which
both runs have their share. Every read is checked to find every key.

``--out`` appends a JSON line per run with the machine and the versions, and every call that was slower than ``--slow``
milliseconds with when it began: a pause of the reader inside one of the writer is growth, another is not.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from hotloop.table import Table

from .. import _machine
from ._inputs import keys_of

BATCH = 1024
PERCENTILES = (50.0, 99.0, 99.9)


@dataclass
class Calls:
    """When each call began and how long it took, in nanoseconds."""

    begun: list[int] = field(default_factory=list)
    took: list[int] = field(default_factory=list)

    def note(self, begin: int) -> None:
        self.took.append(time.perf_counter_ns() - begin)
        self.begun.append(begin)

    def summary(self) -> dict[str, float]:
        ms = np.array(self.took) / 1e6
        found = {f"p{p:g}": float(np.percentile(ms, p)) for p in PERCENTILES}
        return {"calls": len(ms), **found, "max": float(ms.max())}

    def slow(self, start: int, ms: float) -> list[tuple[float, float]]:
        """(begin, duration) in ms of the calls that took longer."""
        pairs = zip(self.begun, self.took)
        return [((begin - start) / 1e6, took / 1e6) for begin, took in pairs if took > ms * 1e6]


@dataclass
class Run:
    """One run: growths as (rows, ms of the call), and the calls of both threads."""

    rows: int
    until: int
    dim: int
    threads: int
    grows: bool
    growths: list[tuple[int, float]]
    read: dict[str, float]
    insert: dict[str, float]
    slow_reads: list[tuple[float, float]]
    slow_inserts: list[tuple[float, float]]


def measure(
    rows: int, until: int, dim: int, *, grows: bool, threads: int = 2, slow_ms: float = 5.0
) -> Run:
    """Fill a table to ``rows``, then insert up to ``until`` while another thread reads."""
    table = Table(dim, capacity=rows if grows else until)
    values = np.ones((BATCH, dim), np.float32)
    keys = keys_of(0, until).numpy()
    for begin in range(0, rows, BATCH):
        part = keys[begin : min(begin + BATCH, rows)]
        table.insert_or_assign(part, values[: len(part)])
    asked = [np.random.default_rng(i).choice(keys[:rows], BATCH) for i in range(64)]
    reads, inserts, growths = Calls(), Calls(), []
    ready, done, wrong = threading.Event(), threading.Event(), []

    def read() -> None:
        torch.set_num_threads(threads)  # of this thread's loops
        i = 0
        while not done.is_set():
            begin = time.perf_counter_ns()
            found = table.find(asked[i % len(asked)])
            reads.note(begin)
            if not found.found.all() or not (found.values[:, 0] == 1).all():
                wrong.append(i)
            i += 1
            if i == len(asked):
                ready.set()

    reader = threading.Thread(target=read)
    own_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    reader.start()
    try:
        ready.wait()
        reads.begun, reads.took = [], []  # warm from here on
        start = time.perf_counter_ns()
        for first in range(rows, until, BATCH):
            part = keys[first : first + BATCH]
            capacity = table.capacity
            begin = time.perf_counter_ns()
            table.insert_or_assign(part, values[: len(part)])
            inserts.note(begin)
            if table.capacity != capacity:
                growths.append((first, inserts.took[-1] / 1e6))
    finally:
        done.set()
        reader.join()
        torch.set_num_threads(own_threads)
    if wrong or len(table) != until:
        raise AssertionError(f"{len(wrong)} reads were wrong, {len(table)} rows of {until}")
    return Run(
        rows,
        until,
        dim,
        threads,
        grows,
        growths,
        reads.summary(),
        inserts.summary(),
        reads.slow(start, slow_ms),
        inserts.slow(start, slow_ms),
    )


def report(run: Run) -> str:
    what = "grows" if run.grows else "has room"
    lines = []
    for name, calls in (("read", run.read), ("insert", run.insert)):
        numbers = "".join(f"{calls[c]:>10.3f}" for c in (*(f"p{p:g}" for p in PERCENTILES), "max"))
        lines.append(f"{run.dim:>4}  {what:<8}  {name:<6} {int(calls['calls']):>9}{numbers}")
    if run.growths:
        text = ", ".join(f"{ms:.0f} ms at {rows / 1e6:.2f}M" for rows, ms in run.growths)
        lines.append(f"      growths: {text}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.table.growth_pause", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows before the clock starts")
    parser.add_argument("--until", type=int, default=16_000_000, help="rows at the end")
    parser.add_argument("--dim", type=int, action="append", help="numbers per row (64 and 2)")
    parser.add_argument("--threads", type=int, default=2, help="of each of the two callers (2)")
    parser.add_argument("--slow", type=float, default=5.0, help="ms from which a call is kept (5)")
    parser.add_argument("--out", type=Path, help="file that JSON lines are appended to")
    given = parser.parse_args(arguments)
    print(
        f"{_machine.device_name('cpu')}; {BATCH} keys per call, {given.threads} thread(s) each; ms"
    )
    heads = "".join(f"{h:>10}" for h in (*(f"p{p:g}" for p in PERCENTILES), "max"))
    print(f"{'dim':>4}  {'table':<8}  {'call':<6} {'calls':>9}{heads}")
    for dim in given.dim or [64, 2]:
        for grows in (True, False):
            run = measure(
                given.rows,
                given.until,
                dim,
                grows=grows,
                threads=given.threads,
                slow_ms=given.slow,
            )
            print(report(run), flush=True)
            if given.out:
                about = {"device": _machine.device_name("cpu"), "versions": _machine.versions()}
                with given.out.open("a") as file:
                    file.write(json.dumps({**asdict(run), **about}) + "\n")


if __name__ == "__main__":
    main()
