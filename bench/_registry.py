"""All benches, by op. Modules are imported when asked for, so that ``list`` needs no rival."""

from __future__ import annotations

import fnmatch
import importlib

from ._case import Bench

_MODULES = (
    "bench.core.segments",
    "bench.logprob.linear_logprob",
    "bench.logprob.linear_cross_entropy",
    "bench.logprob.linear_divergence",
    "bench.preference.linear_preference_loss",
    "bench.preference.pair_losses",
    "bench.decode.speculative",
    "bench.decode.tree",
    "bench.decode.sampling",
    "bench.decode.search",
    "bench.table.lookup",
    "bench.table.train",
    "bench.table.device",
    "bench.table.error_memory",
)


def benches(room: str | None = None) -> list[Bench]:
    found: list[Bench] = []
    for name in _MODULES:
        if room is not None and name.split(".")[1] != room:
            continue
        module = importlib.import_module(name)
        found += module.BENCHES if hasattr(module, "BENCHES") else [module.BENCH]
    return found


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
    return pattern in ("all", bench.op, bench.op.split(".")[0]) or fnmatch.fnmatch(
        bench.op, pattern
    )
