# SPDX-License-Identifier: Apache-2.0
"""All benches, by op, found by file: modules are imported when asked for, so that ``list`` needs no rival."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from ._case import Bench

HERE = Path(__file__).parent


def modules(name: str = "[!_]*") -> Iterator[tuple[str, ModuleType]]:
    """The files ``bench/<room>/<name>.py`` as modules, each with its room; ``name`` is a glob."""
    for path in sorted(HERE.glob(f"*/{name}.py")):
        room = path.parent.name
        if room != "contenders":
            yield room, importlib.import_module(f"{__package__}.{room}.{path.stem}")


def attribute_of_rooms(file: str, name: str) -> Iterator[tuple[str, Any]]:
    """The entries of the tuple ``name`` in ``bench/<room>/<file>.py`` of all rooms, each with its room."""
    for room, module in modules(file):
        for entry in getattr(module, name):
            yield room, entry


def benches(room: str | None = None) -> list[Bench]:
    """What the modules name ``BENCHES``, or return from ``benches()``; room by room."""
    found: list[Bench] = []
    for _, module in modules():
        found += module.benches() if hasattr(module, "benches") else getattr(module, "BENCHES", ())
    found.sort(key=room_of)
    return [bench for bench in found if room in (None, room_of(bench))]


def room_of(bench: Bench) -> str:
    return bench.op.split(".")[0]


def select(pattern: str) -> list[Bench]:
    """Benches whose op is ``pattern``, lies in the room ``pattern``, or matches it as a glob.

    Several patterns are separated by commas; the benches come in their order.

    Raises:
        ValueError: one of them matches nothing.
    """
    everything = benches()
    found: dict[str, Bench] = {}
    for part in pattern.split(","):
        matching = [b for b in everything if _matches(b, part)]
        if not matching:
            pattern, found = part, {}
            break
        found |= {b.op: b for b in matching if b.op not in found}
    if not found:
        raise ValueError(
            f"[bench] op: expected one of {', '.join(b.op for b in everything)}, a room, a glob or "
            f"'all', got {pattern!r}. See `python -m bench list`."
        )
    return list(found.values())


def _matches(bench: Bench, pattern: str) -> bool:
    return pattern in ("all", bench.op, room_of(bench)) or fnmatch.fnmatch(bench.op, pattern)
