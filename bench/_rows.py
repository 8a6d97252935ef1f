# SPDX-License-Identifier: Apache-2.0
"""From samples to rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from . import _machine, _row
from ._case import Case, Contender
from ._memory import Peak
from ._options import Options
from ._timing import Spread

ROOF = "roof"


def about(case: Case, name: str, role: str) -> _row.Row:
    """Which contender of which case was measured, where, when and by which command."""
    return {
        "op": case.op,
        "impl": name,
        "role": role,
        "mode": case.mode,
        "label": case.label,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "device": _machine.device_name(case.device),
        "threads": case.threads or torch.get_num_threads(),
        "versions": _machine.versions(),
        "commit": _machine.commit(),
        "time": _machine.now(),
        "command": _machine.command(),
    }


def case_rows(
    case: Case,
    timed: Sequence[Contender],
    samples: Mapping[str, Sequence[float]],
    timers: Mapping[str, str],
    errors: Mapping[str, Sequence[float]],
    peaks: Mapping[str, Peak | None],
    options: Options,
) -> list[_row.Row]:
    """One row per contender with at least one whole round, the roof included."""
    spreads = {name: Spread.of(rounds) for name, rounds in samples.items() if rounds}
    roof_amount = case.cost.amount if case.roof_amount is None else case.roof_amount
    roof_rate = roof_amount / spreads[ROOF].median if ROOF in spreads else None
    roles = {c.name: c.role for c in timed} | {ROOF: "roof"}
    rows: list[_row.Row] = []
    for name, spread in spreads.items():
        amount = roof_amount if name == ROOF else case.cost.amount
        rate = amount / spread.median
        peak = peaks.get(name)
        flops = case.cost.unit == "flops"
        ratios = _ratios(name, samples) if roles[name] == "ours" else {}
        rows.append(
            {
                **about(case, name, roles[name]),
                "median_us": spread.median * 1e6,
                "p20_us": spread.p20 * 1e6,
                "p80_us": spread.p80 * 1e6,
                "rounds": len(samples[name]),
                "order_seed": options.order_seed,
                "timer": timers.get(name, "wall"),
                "bytes": None if flops else case.cost.formula,
                "flops": case.cost.formula if flops else None,
                "dims": dict(case.cost.dims),
                "gb_per_s": None if flops else rate / 1e9,
                "tflop_per_s": rate / 1e12 if flops else None,
                "roof_share": None if roof_rate is None else rate / roof_rate,
                "peak_mb": None if peak is None else peak[0],
                "peak_beyond_gradients_mb": None if peak is None else peak[1],
                "errors": list(errors.get(name, ())),
                "ratios": ratios,
                "targets": _targets(case, name, ratios, peaks, options) if ratios else [],
                "quick": options.quick,
                "simd": _machine.simd(),
            }
        )
    return rows


def _ratios(ours: str, samples: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Ours over each other contender: median, p20, p80 of the ratios of single rounds."""
    found = {}
    for name, rounds in samples.items():
        if name in (ours, ROOF) or not rounds:
            continue
        spread = Spread.of([a / b for a, b in zip(samples[ours], rounds)])
        found[name] = [spread.median, spread.p20, spread.p80]
    return found


def _targets(
    case: Case,
    ours: str,
    ratios: Mapping[str, Sequence[float]],
    peaks: Mapping[str, Peak | None],
    options: Options,
) -> list[dict[str, object]]:
    """What was asked for and what was reached; a quick run reaches nothing."""
    found: list[dict[str, object]] = []
    for target in case.targets:
        reached: float | None = None
        if target.what == "time" and target.rival in ratios:
            reached = ratios[target.rival][0]
        own, rival = peaks.get(ours), peaks.get(target.rival)
        if target.what == "memory" and own is not None and rival is not None:
            reached = own[0] / max(rival[0], 1e-9)
        found.append(
            {
                "id": target.id,
                "rival": target.rival,
                "what": target.what,
                "target": target.ratio,
                "ratio": reached,
                "met": None if reached is None or options.quick else reached <= target.ratio,
            }
        )
    return found
