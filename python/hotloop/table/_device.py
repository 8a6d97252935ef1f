# SPDX-License-Identifier: Apache-2.0
"""The table in the memory of a CUDA device, with the methods of ``_core.table.Table``.

Arrays come as the front door exports them. Work runs on the stream that ``on`` was given last: the current stream of
the library that the keys of a call belong to.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

from ..front import arrays
from ..front import native as _native


def index_of(op: str, device: Any) -> int | None:
    """The index of a CUDA device, or None for the CPU."""
    text = "cpu" if device is None else str(device)
    kind, _, number = text.partition(":")
    if kind == "cpu" and number in ("", "0"):
        return None
    if kind != "cuda" or not (number == "" or (number.isascii() and number.isdigit())):
        raise ValueError(
            f'[{op}] device: expected "cpu", "cuda" or "cuda:<index>", got {device!r}.'
        )
    if number:
        return int(number)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.current_device())
    return 0


def made(op: str, settings: dict[str, Any], index: int) -> DeviceTable:
    """A table on that device; says what is missing where there is none."""
    if settings["dtype"] == "int8":
        raise NotImplementedError(
            f"[{op}] dtype: expected float32, float16 or bfloat16 on cuda:{index}, got int8. "
            "Serve int8 rows from a table on the CPU."
        )
    module = _native.cuda
    if module is None:
        raise NotImplementedError(
            f"[{op}] device: expected a build with hotloop._cuda for cuda:{index}, got one without. "
            "Rebuild with -C cmake.define.HOTLOOP_CUDA=ON; `python -m hotloop info` shows what was loaded."
        )
    count = module.device_count()
    if index >= count:
        raise RuntimeError(
            f"[{op}] device: expected one of {count} CUDA device(s), got cuda:{index}."
        )
    return DeviceTable(module, settings, index)


def on(native: Any, like: Any) -> None:
    """Let a table on a device run on the current stream of ``like``'s library; nothing on the CPU."""
    if isinstance(native, DeviceTable):
        native.use(_native.stream_of(like)[1])


def _counter(name: str) -> Any:
    """A property that is that of the compiled table."""
    return property(
        lambda self: int(getattr(self._table, name)),
        lambda self, value: setattr(self._table, name, value),
    )


class DeviceTable:
    """What a ``Table`` has in the place of ``_core.table.Table``."""

    def __init__(self, module: ModuleType, settings: dict[str, Any], index: int) -> None:
        self.index = index
        self.full = module.table.TableFull
        self._refuses = settings["max_rows"] is not None and settings["strategy"] == "none"
        self._table = module.table.Table(settings, index, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._table, name)

    tick, generation = _counter("tick"), _counter("generation")

    def upsert(
        self, n: int, keys: Any, values: Any, moment: Any, admission: Any, *rest: Any
    ) -> int:
        """How many rows had to leave, which ``evicted`` gives out if they were kept."""
        ask = _asked(admission)
        counts = self._refuses and admission is not None and len(admission) == 2
        before = _sightings(admission[0]) if counts else None
        try:
            return int(self._table.upsert(n, keys, values, moment, ask, *rest))
        except self.full:  # a batch that did not fit has not been seen
            if before is not None:
                admission[0].load(*before)
            raise

    def find(self, n: int, keys: Any, values: Any, found: Any, scale: float) -> None:
        self._table.find(n, keys, values, found, None)

    def contains(self, n: int, keys: Any, found: Any, scores: Any) -> None:
        self._table.find(n, keys, None, found, scores)

    def find_or_insert(
        self, n: int, keys: Any, values: Any, found: Any, scale: float, moment: Any, admission: Any
    ) -> None:
        """Keys are bags of one, whose rows `upsert` names."""
        rows = arrays.empty(keys, (n,), "int32")
        alone = (n, keys, n, None, None, "sum", scale)
        self.pool_or_insert(alone, moment, admission, rows, found, values, None, None)

    def pool_or_insert(
        self, bags: tuple[Any, ...], moment: Any, admission: Any, rows: Any, found: Any, *outs: Any
    ) -> None:
        """In two passes: unknown keys go through sorts of the whole batch in any case."""
        self.upsert(bags[0], bags[1], None, moment, admission, False, rows, found)
        self._table.pool(bags, rows, *outs)

    def import_rows(self, n: int, columns: tuple[Any, ...], beyond: bool = False) -> None:
        """``beyond`` the bound only without an eviction strategy: a full bucket evicts whatever the bound is."""
        self._table.import_rows(n, columns, beyond)

    def trim(self) -> int:
        """Nothing is above the bound of a table that evicts by the bucket; of another nothing was taken beyond it."""
        return 0

    def erase(self, n: int, keys: Any, found: Any) -> None:
        """Keys on the device, or in NumPy arrays."""
        if isinstance(keys, np.ndarray):
            self._table.erase_host(n, keys, found)
        else:
            self._table.erase(n, keys, found)


def _sightings(counter: Any) -> tuple[Any, ...]:
    splits = len(counter.save(None)[3])
    cells = np.empty((splits, counter.cells_per_split, 2), np.uint8)
    return counter.save(cells), cells


def _asked(admission: Any) -> Any:
    """The filter as a function: it lives on the host."""
    if admission is None:
        return None
    core = _native.core

    def ask(keys: bytes, counts: bytes) -> bytes:
        k = np.frombuffer(keys, np.int64)
        c = np.frombuffer(counts, np.uint32).astype(np.int64)
        admitted = np.empty(len(k), bool)
        if len(admission) == 2:
            admission[0].admits(len(k), k, c, admission[1], admitted)
        else:
            seed, step, threshold, equal = admission
            core.table.probabilistic(len(k), seed, k, step, c, threshold, equal, admitted)
        return admitted.tobytes()

    return ask


def evicted(native: DeviceTable, m: int, keys: Any, dim: int, dtype: str) -> tuple[Any, Any, Any]:
    """(keys, values, scores) of the rows that had to leave, in the kind of ``keys``."""
    gone, scores = arrays.empty(keys, (m,), "int64"), arrays.empty(keys, (m,), "int64")
    values = arrays.empty(keys, (m, dim), dtype)
    if m:
        native.evicted(gone, values, scores)
    return gone, values.float() if dtype == "bfloat16" else values, scores
