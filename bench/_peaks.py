# SPDX-License-Identifier: Apache-2.0
"""``python -m bench memory OP``: peak memory alone. It takes one step per contender and needs no quiet machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import _memory
from ._case import Case, Missing, resolve
from ._options import Options
from ._report import plain_table, shape
from ._rows import about

PeakRow = dict[str, Any]

FIELDS = (
    "op", "impl", "role", "mode", "label", "shape", "dtype", "peak_mb", "peak_beyond_gradients_mb",
    "products", "device", "threads", "versions", "commit", "time", "command",
)  # fmt: skip
_COLUMNS = ("op", "case", "shape", "dtype", "contender", "peak", "beyond gradients")


def measure(case: Case, options: Options) -> tuple[list[PeakRow], dict[str, str]]:
    """A row per contender, and why there is none of the others."""
    rows: list[PeakRow] = []
    without: dict[str, str] = {}
    for entry in case.contenders:
        ours = entry.name.startswith("hotloop")
        if not (ours or options.wants(entry.name)):
            continue
        contender = resolve(entry)
        if isinstance(contender, Missing):
            without[contender.name] = contender.reason
        elif not contender.checked:
            continue
        elif contender.elsewhere:
            without[contender.name] = "works in another process"
        else:
            peak = _memory.peak(case, contender, options)
            if peak is None:
                without[contender.name] = "its step failed, or the peak cannot be read here"
            else:
                row = about(case, contender.name, contender.role)
                row |= {"peak_mb": peak[0], "peak_beyond_gradients_mb": peak[1]}
                rows.append(row | {"products": options.products})
    return rows, without


def write(rows: Sequence[PeakRow], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in FIELDS}) + "\n")


def read(path: Path) -> list[PeakRow]:
    """Rows of a file; of rows of the same contender and case the last one counts."""
    found: dict[tuple[Any, ...], PeakRow] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        case = tuple(row["shape"] if name == "shape" else row[name] for name in _CASE)
        found[(str(case), row["impl"])] = row
    return list(found.values())


_CASE = ("op", "mode", "label", "shape", "dtype", "device")


def text(rows: Sequence[PeakRow]) -> str:
    lines = [
        {
            "op": f"{row['op']} {row['mode']}",
            "case": row["label"],
            "shape": shape(row),
            "dtype": row["dtype"],
            "contender": row["impl"],
            "peak": f"{row['peak_mb']:.1f} MB",
            "beyond gradients": f"{row['peak_beyond_gradients_mb']:.1f} MB",
        }
        for row in rows
    ]
    return "\n".join(plain_table(_COLUMNS, lines))
