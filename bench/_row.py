# SPDX-License-Identifier: Apache-2.0
"""The one row format: JSON lines, one per contender and case; table and plots come from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# In the order in which they are written.
_FIELDS: dict[str, tuple[type, ...]] = {
    "op": (str,),
    "impl": (str,),
    "role": (str,),
    "mode": (str,),
    "label": (str,),
    "shape": (list,),
    "dtype": (str,),
    "median_us": (float,),
    "p20_us": (float,),
    "p80_us": (float,),
    "rounds": (int,),
    "order_seed": (int, type(None)),
    "timer": (str,),
    "bytes": (str, type(None)),
    "flops": (str, type(None)),
    "dims": (dict,),
    "gb_per_s": (float, type(None)),
    "tflop_per_s": (float, type(None)),
    "roof_share": (float, type(None)),
    "peak_mb": (float, type(None)),
    "peak_beyond_gradients_mb": (float, type(None)),
    "errors": (list,),
    "ratios": (dict,),
    "targets": (list,),
    "quick": (bool,),
    "device": (str,),
    "threads": (int,),
    "simd": (dict,),
    "versions": (dict,),
    "commit": (str,),
    "time": (str,),
    "command": (str,),
}
FIELDS = tuple(_FIELDS)

_KEY = ("op", "impl", "mode", "label", "shape", "dtype", "device", "threads")


def key(row: Row) -> tuple[Any, ...]:
    """What makes two rows the same measurement."""
    return tuple(tuple(row[name]) if isinstance(row[name], list) else row[name] for name in _KEY)


def case_key(row: Row) -> tuple[Any, ...]:
    """What the contenders of one case share."""
    return tuple(x for name, x in zip(_KEY, key(row)) if name != "impl")


def problems(row: Row) -> list[str]:
    """What is wrong with a row; empty if it is well formed."""
    found = [f"{name}: missing" for name in _FIELDS if name not in row]
    found += [f"{name}: unknown field" for name in row if name not in _FIELDS]
    for name, types in _FIELDS.items():
        value = row.get(name)
        if name in row and (
            not isinstance(value, types) or (isinstance(value, bool) and bool not in types)
        ):
            found.append(
                f"{name}: expected {' or '.join(t.__name__ for t in types)}, got {value!r}"
            )
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"{name}: expected a finite number, got {value!r}")
    if not found:
        if not 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]:
            found.append("p20_us, median_us, p80_us: expected 0 < p20 <= median <= p80")
        if (row["bytes"] is None) == (row["flops"] is None):
            found.append("bytes, flops: expected exactly one of them")
    return found


def write(row: Row, path: Path) -> None:
    """Append one row and hand it over at once, so that an interrupt loses nothing."""
    wrong = problems(row)
    if wrong:
        raise ValueError(f"[bench] row of {row.get('op')} {row.get('impl')}: {'; '.join(wrong)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: row[name] for name in FIELDS}) + "\n")


def parse(text: str, source: str = "rows") -> list[Row]:
    """Rows of a JSON-lines text; of rows with the same key the last one counts."""
    rows: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(text.splitlines()):
                break  # cut off while being written
            raise ValueError(f"[bench] {source}, line {number}: not JSON ({error}).") from error
        wrong = problems(row) if isinstance(row, dict) else ["not an object"]
        if wrong:
            raise ValueError(f"[bench] {source}, line {number}: {'; '.join(wrong)}.")
        rows.pop(key(row), None)
        rows[key(row)] = row
    return list(rows.values())


def read(path: Path) -> list[Row]:
    return parse(path.read_text(encoding="utf-8"), str(path))


def by_case(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(case_key(row), []).append(row)
    return cases
