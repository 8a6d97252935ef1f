# SPDX-License-Identifier: Apache-2.0
"""Every GPU kernel once, at small sizes, against the reference: ``python -m bench._smoke ROOM``.

Exits 1 at the first wrong or failing kernel's end of the list, having named all of them. One process per room:
the Triton kernels of a head then compile while the others run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

from . import _registry
from ._case import Case, Contender, Missing, resolve
from ._check import check
from ._options import Options
from .core import pointwise


def cases(room: str | None, device: str, rows: Sequence[int] = (4099,)) -> Iterator[Case]:
    """Small cases of the benches of a room, or of all, and each pointwise loss at these numbers of rows."""
    for bench in _registry.benches(room):
        yield from bench.cases(Options(device=device, quick=True))
    for row in pointwise.rows():
        if room in (None, row.room):
            yield from (pointwise.case(row, n, device) for n in rows)


def wrong(case: Case) -> str:
    """What is wrong with ours, or ""."""
    entries = [resolve(e) for e in case.contenders if e.name.startswith(("hotloop ", "torch"))]
    missing = [e for e in entries if isinstance(e, Missing) and e.name.startswith("hotloop")]
    if missing:
        return missing[0].reason
    wanted = [e for e in entries if isinstance(e, Contender) and e.role in ("ours", "plain")]
    ours = [c.name for c in wanted if c.role == "ours"]
    if not ours:
        return "ours is not there"
    found = check(replace(case, contenders=wanted), wanted, case.make_inputs(0))
    problems = {**found.broken, **found.disagree}
    return "; ".join(f"{name}: {problems[name]}" for name in ours if name in problems)


def main(rooms: Sequence[str], device: str = "cuda") -> int:
    bad = count = 0
    for room in rooms:
        for case in cases(room, device):
            count += 1
            try:
                problem = wrong(case)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                bad += 1
                print(f"WRONG {case.key}: {problem}", flush=True)
    print(f"{', '.join(rooms)}: {count - bad} of {count} cases right")
    return 1 if bad or not count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
