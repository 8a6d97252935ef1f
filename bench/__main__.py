# SPDX-License-Identifier: Apache-2.0
"""``python -m bench list | run OP | memory OP | compare A B | report FILE | plot FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import _options

_PLOT_NEEDS = "pip install matplotlib"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Benches of hotloop against the public rivals."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser
    add("list", help="list the benches")
    run = add("run", help="measure an op, a room, a glob or 'all'; several with commas")
    run.add_argument("op")
    memory = add("memory", help="peak memory of one step of every contender; nothing is timed")
    memory.add_argument("op")
    compare = add("compare", help="fail if our rows in B are slower than in A")
    compare.add_argument("a", type=Path, metavar="A", help="rows measured before")
    compare.add_argument("b", type=Path, metavar="B", nargs="?", help="rows measured after")
    compare.add_argument("--base", metavar="REF", help="read A as committed at this git ref")
    compare.add_argument(
        "--tolerance", type=float, default=None, help="growth taken as noise (0.1)"
    )
    compare.add_argument("--common", action="store_true", help="ignore rows that B lacks")
    report = add("report", help="print the table of a file of rows")
    report.add_argument("file", type=Path)
    plot = add("plot", help="draw a file of rows: PNG and CSV beside it")
    plot.add_argument("file", type=Path)
    peak = add("_peak")
    peak.add_argument("op")
    peak.add_argument("--case", required=True)
    peak.add_argument("--contender", required=True)
    for command in commands.choices.values():
        _options.add_flags(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parsed = _parser().parse_args(argv)
    options = _options.from_arguments(parsed)
    _options.pin(options)
    try:
        if parsed.command == "list":
            return _list()
        if parsed.command == "run":
            return _run(parsed.op, options, parsed.out)
        if parsed.command == "memory":
            return _memory(parsed.op, options, parsed.out)
        if parsed.command == "compare":
            return _compare(parsed)
        if parsed.command == "report":
            return _report(parsed.file)
        if parsed.command == "plot":
            return _plot(parsed.file)
        return _peak(parsed, options)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the rows measured so far are written", file=sys.stderr)
        return 130


def _list() -> int:
    from ._registry import benches

    found = benches()
    width = max(len(bench.op) for bench in found)
    for bench in found:
        print(f"{bench.op:{width}s}  {bench.summary}")
    return 0


def _run(op: str, options: _options.Options, out: Path) -> int:
    from . import _report
    from ._check import CheckFailed
    from ._harness import run_case
    from ._registry import select

    chosen = select(op)
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ValueError(
                "[bench] --device: expected a CUDA device, found none. Use --device cpu."
            )
    rows, bad, notes = [], False, []
    for bench in chosen:
        for case in bench.cases(options):
            if options.dtype not in (None, case.dtype):
                continue
            try:
                outcome = run_case(case, options, out)
            except CheckFailed as error:
                bad = True
                notes.append(f"{case.key}: NO NUMBER, results disagree: {error}")
                continue
            rows += outcome.rows
            notes += [f"{case.key}: skipped {n}: {why}" for n, why in outcome.skipped.items()]
            notes += [f"{case.key}: FAILED {n}: {why}" for n, why in outcome.failed.items()]
            bad = bad or bool(outcome.failed)
    if rows:
        _report.show(rows)
        print(f"\nrows in {out}")
    for note in notes:
        print(note)
    return 1 if bad else 0


def _memory(op: str, options: _options.Options, out: Path) -> int:
    from . import _peaks
    from ._registry import select

    out = out if out != _options.DEFAULT_OUT else _options.DEFAULT_MEMORY_OUT
    rows, notes = [], []
    for case in (case for bench in select(op) for case in bench.cases(options)):
        if options.dtype not in (None, case.dtype):
            continue
        found, without = _peaks.measure(case, options)
        _peaks.write(found, out)
        rows += found
        notes += [f"{case.key}: without {name}: {why}" for name, why in without.items()]
    print(_peaks.text(rows))
    print("\n".join([f"\nrows in {out}", *notes]))
    return 0 if any(row["role"] == "ours" for row in rows) else 1


def _compare(parsed: argparse.Namespace) -> int:
    from . import _compare, _row

    if parsed.b is None and parsed.base is None:
        raise ValueError(
            "[bench] compare: expected two files, or one and --base REF, got one file."
        )
    after = _row.read(parsed.a if parsed.b is None else parsed.b)
    before = _compare.read_at(parsed.a, parsed.base) if parsed.base else _row.read(parsed.a)
    tolerance = _compare.DEFAULT_TOLERANCE if parsed.tolerance is None else parsed.tolerance
    if not tolerance > 0:
        raise ValueError(f"[bench] --tolerance: expected a number > 0, got {tolerance}.")
    findings = _compare.gate(before, after, tolerance, parsed.common)
    print("\n".join(_compare.notes(before, after)))
    if not findings:
        print("no row of ours in common: nothing was compared")
        return 2
    print("\n".join(_compare.table(findings)))
    bad = sum(finding.bad for finding in findings)
    print(f"{bad} of {len(findings)} rows fail (tolerance {tolerance:.0%})")
    return 1 if bad else 0


def _report(file: Path) -> int:
    from . import _report, _row

    _report.show(_row.read(file))
    return 0


def _plot(file: Path) -> int:
    from . import _plot, _row

    try:
        paths = _plot.figures(_row.read(file), file.parent, file.stem)
    except ImportError as error:
        print(f"[bench] plot: {error}. Install it: {_PLOT_NEEDS}.", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


def _peak(parsed: argparse.Namespace, options: _options.Options) -> int:
    from . import _memory
    from ._case import Contender, resolve
    from ._registry import select

    for bench in select(parsed.op):
        for case in bench.cases(options):
            names = [entry.name for entry in case.contenders]
            if case.key != parsed.case or parsed.contender not in names:
                continue
            contender = resolve(case.contenders[names.index(parsed.contender)])
            if isinstance(contender, Contender):
                _memory.report(case, contender, options.products)
                return 0
    raise ValueError(f"[bench] _peak: no contender {parsed.contender!r} in case {parsed.case!r}.")


if __name__ == "__main__":
    sys.exit(main())
