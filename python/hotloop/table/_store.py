"""How a ``Table`` calls its compiled half: keys, moments, rules and errors made ready once for all verbs."""

from __future__ import annotations

import contextlib
import time as _time
from collections.abc import Iterator
from typing import Any

from ..core.rules import RowOptimizer
from ..front import arrays, check, environment, native
from . import _convert, _device, _keys
from .filters import CountFilter, ProbabilisticFilter
from .results import TableFullError

DTYPES = ("float32", "float16", "bfloat16", "int8")
EVICT_STRATEGIES = ("none", "lru", "lfu", "epoch_lru", "epoch_lfu", "custom")
TRACKED = ("use", "changes")
MAX_LOAD_FACTOR = 0.85
"""Share of the slots that are filled before the index doubles: 15 bytes per row, 1.1 lines per lookup."""
MAX_ROWS = 2**32 - 16


def of_kind(op: str, name: str, value: Any, *types: type) -> None:
    """Refuse what is neither None nor of these types."""
    if value is not None and not isinstance(value, types):
        wanted = ", ".join(t.__name__ for t in types)
        raise TypeError(f"[{op}] {name}: expected {wanted} or None, got {type(value).__name__}.")


class Store:
    """What the verbs of a table share. ``Table`` sets these in its constructor."""

    dim: int
    dtype: str
    device: str
    evict_strategy: str
    max_capacity: int | None
    admission: CountFilter | ProbabilisticFilter | None
    optimizer: RowOptimizer | None
    initializer: Any
    track: tuple[str, ...]
    value_range: float
    hash_seed: int
    table_id: str
    size: Any
    state_width: Any
    position: Any
    _native: Any
    _epoch: int
    _step: int
    _shard: tuple[int, int] | None
    _position: int
    _own_mark: bool
    _published: dict[str, tuple[int, int]]
    _history: Any

    def _keys(self, op: str, keys: Any) -> Any:
        environment.log_call(op, rows=getattr(keys, "shape", None))
        keys = _keys.keys(op, keys, 1)
        at = arrays.device(keys)
        if at != self.device:
            if self.device == "cpu":
                raise NotImplementedError(
                    f"[{op}] keys: expected an array on the CPU, got {at}. Move it with .cpu()."
                )
            raise ValueError(
                f"[{op}] keys: expected an array on {self.device} like the table, got {at}. Move it first."
            )
        if at != "cpu":
            self._enter(op, keys)
        return keys

    def _enter(self, op: str, like: Any) -> None:
        """Calls that follow run on the current stream of ``like``'s library: a table on a device."""
        if self.dtype == "bfloat16" and arrays.kind(like) == "cupy":
            raise NotImplementedError(
                f"[{op}] keys: expected a torch tensor with a table of bfloat16, got a CuPy array, which has no "
                "such type."
            )
        _device.on(self._native, like)

    @property
    def _full(self) -> type[Exception]:
        full: type[Exception] = (
            native.core.table.TableFull if self.device == "cpu" else self._native.full
        )
        return full

    def _tracks(self, op: str, what: str) -> None:
        if what not in self.track:
            raise ValueError(
                f"[{op}] track: expected a table made with track={what!r}, got {self.track!r}."
            )

    def _adds(self, op: str) -> None:
        if self.dtype == "int8":
            raise ValueError(
                f"[{op}] values: expected a table of floats to add to, got dtype int8."
            )

    def _rule(self, op: str, optimizer: RowOptimizer | None) -> dict[str, Any]:
        of_kind(op, "optimizer", optimizer, RowOptimizer)
        chosen = self.optimizer if optimizer is None else optimizer
        if self.optimizer is None or chosen is None:
            raise ValueError(
                f"[{op}] optimizer: expected a table made with one, got None. Pass Table(..., optimizer=...)."
            )
        # Two rules may keep as many numbers per row and mean something else by them.
        layouts = chosen.state_layout(self.dim), self.optimizer.state_layout(self.dim)
        if type(chosen) is not type(self.optimizer) or layouts[0] != layouts[1]:
            raise ValueError(
                f"[{op}] optimizer: expected the state of {type(self.optimizer).__name__}, got {chosen!r}. "
                "Pass the table's own rule with other numbers."
            )
        return chosen._rule()

    def _moment(
        self, op: str, keys: Any, scores: Any, epoch: int | None, time: int | None
    ) -> tuple[Any, int, int]:
        if scores is None and self.evict_strategy == "custom" and op != "Table.update":
            raise ValueError(
                f"[{op}] scores: expected one per key with evict_strategy 'custom', got None."
            )
        scores = None if scores is None else _convert.scores(op, scores, keys)
        if epoch is not None:
            self._epoch = check.integer(op, "epoch", epoch, at_least=0, at_most=2**32 - 1)
        if time is None:
            time = int(_time.time()) if "use" in self.track else 0
        time = check.integer(op, "time", time, at_least=0, at_most=2**32 - 1)
        return scores, self._epoch, time

    def _admits(self) -> Any:
        """The filter that unknown keys must pass, as the compiled half takes it."""
        if isinstance(self.admission, CountFilter):
            return (self.admission._native, self.admission.threshold)
        if isinstance(self.admission, ProbabilisticFilter):
            self._step += 1
            chance = self.admission
            return (chance.seed, self._step, chance.threshold, chance.equal)
        return None

    @contextlib.contextmanager
    def _room(self, op: str) -> Iterator[None]:
        try:
            yield
        except self._full:
            raise TableFullError(
                f"[{op}] keys: expected room for the unknown keys of this batch, got {self.size} rows of "
                f"{self.max_capacity} in use. Raise max_capacity or choose an evict_strategy."
            ) from None

    def _upsert(
        self,
        op: str,
        keys: Any,
        values: Any,
        scores: Any,
        epoch: int | None,
        time: int | None,
        ask: bool,
        keep: bool,
    ) -> tuple[Any, Any, Any]:
        n = int(keys.shape[0])
        if values is not None:
            values = _convert.stored(op, values, keys, self)
        moment = self._moment(op, keys, scores, epoch, time)
        rows, (found, bits) = arrays.empty(keys, (n,), "int32"), _convert.flags(keys)
        admits = self._admits() if ask else None
        with self._room(op):
            evicted = self._native.upsert(n, keys, values, moment, admits, keep, rows, bits)
        return rows, found, evicted

    def contains(self, keys: Any) -> Any:
        """Return which keys are there, (n,) bool."""
        keys = self._keys("Table.contains", keys)
        found, bits = _convert.flags(keys)
        self._native.contains(int(keys.shape[0]), keys, bits, None)
        return found

    def _assign(
        self,
        op: str,
        keys: Any,
        values: Any,
        scores: Any,
        epoch: int | None,
        time: int | None,
        add: bool,
    ) -> Any:
        keys = self._keys(op, keys)
        values = _convert.stored(op, values, keys, self)
        moment = self._moment(op, keys, scores, epoch, time)
        found, bits = _convert.flags(keys)
        self._native.assign(int(keys.shape[0]), keys, values, moment, add, bits)
        return found

    def _empty_rows(self, keys: Any) -> Any:
        """Room for the values of keys: as they are stored, or float32 where the caller's library has no such type."""
        dtype = self.dtype if _convert.readable(keys, self.dtype) else "float32"
        return arrays.empty(keys, (int(keys.shape[0]), self.dim), dtype)

    @property
    def _scale(self) -> float:
        return self.value_range / 128 if self.dtype == "int8" else 1.0

    def _update(
        self,
        rule: dict[str, Any],
        keys: Any,
        offsets: Any,
        weights: Any,
        mode: str,
        rows: Any,
        grads: Any,
        sizes: Any,
        largest: Any,
        time: int | None,
        counts: bool = True,
    ) -> int:
        """How many gradients found no row; on a device 0 without ``counts``, which would wait for it."""
        if time is None:
            time = int(_time.time()) if "use" in self.track else 0
        n = int(keys.shape[0])
        count = n if offsets is None else int(offsets.shape[0]) - 1
        bags = (n, keys, count, offsets, weights, mode, 1.0)
        seed = getattr(self.initializer, "seed", 0)
        args = (rule, bags, rows, grads, sizes, largest, time, seed)
        if self.device != "cpu":
            args += (counts,)  # type: ignore[assignment]
        return int(self._native.update(*args))
