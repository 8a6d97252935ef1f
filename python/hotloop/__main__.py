# SPDX-License-Identifier: Apache-2.0
"""The command ``hotloop``, also ``python -m hotloop``: what is installed here, and what there is."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from . import __version__, info
from ._catalog import IMPLS, catalog, of_room, rooms


def _info(given: argparse.Namespace) -> str:
    report = info.collect()
    return json.dumps(report, indent=2) if given.json else info.render(report)


def _catalog(given: argparse.Namespace) -> str:
    ops = of_room(given.room) if given.room else catalog()
    if given.json:
        return json.dumps([op.facts() for op in ops], indent=2)
    lines = [f"{'op or class':40s}" + "".join(f"{impl:15s}" for impl in IMPLS) + "maturity"]
    for op in ops:
        cells = "".join(f"{op.status(impl) or '-':15s}" for impl in IMPLS)
        lines.append(f"{op.full_name:40s}{cells}{op.maturity}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hotloop", description="The hot loops of learning from feedback, fused."
    )
    parser.add_argument("--version", action="version", version=f"hotloop {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    for run, text in (
        (_info, "what is compiled, what runs here, and what is missing"),
        (_catalog, "every public op and class, and what its implementations have been through"),
    ):
        command = commands.add_parser(run.__name__[1:], help=text, description=text)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
        if run is _catalog:
            command.add_argument("--room", choices=rooms(), help="of one room only")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        print(given.run(given), flush=True)
    except (
        BrokenPipeError
    ):  # `hotloop catalog | head` has read enough; what Python still flushes goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
