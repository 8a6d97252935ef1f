# SPDX-License-Identifier: Apache-2.0
"""How long a step takes: on the CPU by the wall, on a GPU by events or by graph replay."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[int], object]
"""One step on input set number i."""

# A sample this long keeps the clock's own cost (about 0.1 us) and the loop's below a thousandth.
_LEAST_SAMPLE_S = 2e-3
# Below this, launches from Python take longer than many a kernel: replay a graph instead.
_GRAPH_BELOW_S = 100e-6


@dataclass(frozen=True)
class Spread:
    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        return Spread(percentile(samples, 0.5), percentile(samples, 0.2), percentile(samples, 0.8))


def percentile(samples: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics, as numpy does."""
    ordered = sorted(samples)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Sampler:
    timer: str
    sample: Callable[[int], float]
    """Seconds per step in round r; the input sets rotate with r."""


def warm_up(call: Call, sets: int, seconds: float, synchronise: Callable[[], None]) -> float:
    """Run for ``seconds`` and once per input set at least; return seconds per step at the end."""
    begin = time.perf_counter()
    for i in range(max(2, sets)):
        call(i % sets)
    synchronise()
    last = time.perf_counter()
    steps = 0
    while True:
        call(steps % sets)
        steps += 1
        if steps & (steps - 1) == 0:  # look at the clock after 1, 2, 4, ... steps
            synchronise()
            now = time.perf_counter()
            if now - begin >= seconds:
                return (now - last) / steps
    raise AssertionError


def cpu_samplers(
    per_step: Mapping[str, float], calls: Mapping[str, Call], sets: int
) -> dict[str, Sampler]:
    def sampler(call: Call, inner: int) -> Sampler:
        def sample(round_: int) -> float:
            begin = time.perf_counter_ns()
            for j in range(inner):
                call((round_ + j) % sets)
            return (time.perf_counter_ns() - begin) * 1e-9 / inner

        return Sampler("wall", sample)

    return {
        name: sampler(call, max(1, math.ceil(_LEAST_SAMPLE_S / max(per_step[name], 1e-9))))
        for name, call in calls.items()
    }


def cuda_samplers(
    per_step: Mapping[str, float], calls: Mapping[str, Call], sets: int
) -> dict[str, Sampler]:
    """Graph replay for all if one of them is short and all can be captured, else events."""
    if min(per_step.values()) < _GRAPH_BELOW_S:
        graphs = {name: _capture(call, sets) for name, call in calls.items()}
        if all(graph is not None for graph in graphs.values()):
            return {name: _graph_sampler(g, sets) for name, g in graphs.items() if g is not None}
    flush = _l2_flush()
    return {name: _event_sampler(call, sets, flush) for name, call in calls.items()}


def _event_sampler(call: Call, sets: int, flush: Callable[[], None]) -> Sampler:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(round_: int) -> float:
        flush()
        begin.record()
        call(round_ % sets)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return Sampler("events", sample)


def _graph_sampler(graph: torch.cuda.CUDAGraph, sets: int) -> Sampler:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample(round_: int) -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / sets

    return Sampler("graph", sample)


def _capture(call: Call, sets: int) -> torch.cuda.CUDAGraph | None:
    """A graph of one step on every input set: together the sets are larger than the L2 cache."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for i in range(sets):
                call(i)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(sets):
                call(i)
        graph.replay()
        torch.cuda.synchronize()
    except (
        RuntimeError
    ):  # a step that synchronises or allocates outside the pool cannot be captured
        torch.cuda.synchronize()
        return None
    return graph


def _l2_flush() -> Callable[[], None]:
    size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.empty(max(2 * size, 2**20), dtype=torch.int8, device="cuda")

    def flush() -> None:
        buffer.zero_()

    return flush
