# SPDX-License-Identifier: Apache-2.0
"""How a ``Table`` calls its compiled half: keys, moments, rules and errors made ready once for all verbs."""

from __future__ import annotations

import contextlib
import inspect
import secrets
import time as _time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.rules import RowOptimizer
from ..front import arrays, check, environment, native
from . import _convert, _device, _keys
from .filters import CountFilter, ProbabilisticFilter
from .initializers import Constant, Initializer, Normal, Uniform, check_range
from .results import TableFullError

DTYPES = ("float32", "float16", "bfloat16", "int8")
EVICT_STRATEGIES = ("none", "lru", "lfu", "epoch_lru", "epoch_lfu", "custom")
_MOST_MARKS = 4096
TRACKED = ("use", "changes")
MAX_LOAD_FACTOR = 0.85
"""Share of the slots that are filled before the index doubles: 15 bytes per row, 1.1 lines per lookup."""
MAX_ROWS = 2**32 - 16
_Use = tuple[Any, int | None, int | None]
"""Scores, epoch and second of a use, as a caller gives them."""


@dataclass
class History:
    """What a table remembers of itself and its source."""

    # Tells its own deltas from those of others.
    writer: str = field(default_factory=lambda: secrets.token_hex(8))
    smaller: bool = False  # it has less room than its source
    left_out: bool = False  # and some of the source's rows found none when it was loaded
    applying: tuple[int, int] | None = None  # the delta whose rows are being written
    # (position, mark of the filter), in order
    seen: list[tuple[int, int]] = field(default_factory=list)
    seen_by: Any = None  # a weak reference to that filter


def check_together(
    op: str, evict_strategy: str, max_capacity: int | None, dtype: str, optimizer: Any
) -> None:
    """Refuse settings that exclude each other."""
    if evict_strategy != "none" and max_capacity is None:
        raise ValueError(
            f"[{op}] max_capacity: expected a bound with evict_strategy {evict_strategy!r}, got None. "
            "A table that grows evicts no row."
        )
    if dtype == "int8" and optimizer is not None:
        raise ValueError(
            f"[{op}] optimizer: expected None with dtype int8, got {optimizer!r}. "
            "Train in float32 and serve table.quantized()."
        )


class Store:
    """A table without its verbs: settings, the compiled half, and what verbs and files share."""

    def __init__(
        self,
        dim: int,
        *,
        capacity: int | None = None,
        max_capacity: int | None = None,
        evict_strategy: str = "none",
        admission: CountFilter | ProbabilisticFilter | None = None,
        dtype: str = "float32",
        optimizer: RowOptimizer | None = None,
        initializer: Initializer | None = None,
        track: Sequence[str] = (),
        device: Any = None,
        hash_seed: int | None = None,
    ) -> None:
        op = "Table"
        self.dim = check.integer(op, "dim", dim, at_least=1, at_most=65536)
        if max_capacity is not None:
            name = "max_capacity"
            max_capacity = check.integer(op, name, max_capacity, at_least=1, at_most=MAX_ROWS)
        self.max_capacity = max_capacity
        most = self.max_capacity or MAX_ROWS
        capacity = min(1024, most) if capacity is None else capacity
        capacity = check.integer(op, "capacity", capacity, at_least=1, at_most=most)
        check.choice(op, "evict_strategy", evict_strategy, EVICT_STRATEGIES)
        check.choice(op, "dtype", dtype, DTYPES)
        track = (track,) if isinstance(track, str) else tuple(track)
        for name in track:
            check.choice(op, "track", name, TRACKED)
        none = type(None)
        check.instance(op, "admission", admission, CountFilter, ProbabilisticFilter, none)
        check.instance(op, "optimizer", optimizer, RowOptimizer, none)
        check.instance(op, "initializer", initializer, Constant, Uniform, Normal, none)
        check_together(op, evict_strategy, max_capacity, dtype, optimizer)
        if hash_seed is None:
            hash_seed = secrets.randbits(64)
        self.hash_seed = check.integer(op, "hash_seed", hash_seed, at_least=0, at_most=2**64 - 1)
        self.evict_strategy = evict_strategy
        self.admission = admission
        self.dtype = dtype
        self.optimizer = optimizer
        self.initializer: Initializer = Uniform() if initializer is None else initializer
        check_range(op, self.initializer, dtype)
        self.track = tuple(name for name in TRACKED if name in track)
        self.value_range = 1.0  # of int8 rows
        self.table_id = uuid.uuid4().hex
        self._epoch = 0
        self._step = 0  # of probabilistic admission
        self._shard: tuple[int, int] | None = None  # the part of a source that a replica holds
        self._position = 0  # of the source, for a replica
        self._own_mark = False  # that position is a snapshot's alone: no delta ends there
        self._published: dict[str, tuple[int, int]] = {}  # by directory: see DeltaLog
        self._history = History()
        kind, first, second, seed = self.initializer._numbers()
        settings = {
            "dim": self.dim,
            "dtype": dtype,
            "rule": None if optimizer is None else optimizer._rule(),
            "strategy": evict_strategy,
            "times": "use" in track,
            "versions": "changes" in track,
            "initializer": kind,
            "first": first,
            "second": second,
            "seed": seed,
            "hash_seed": self.hash_seed,
            "capacity": capacity,
            "max_rows": self.max_capacity,
            "max_load_factor": MAX_LOAD_FACTOR,
        }
        index = _device.index_of(op, device)
        self.device = "cpu" if index is None else f"cuda:{index}"
        self._native: Any = (
            native.core.table.Table(settings)
            if index is None
            else _device.made(op, settings, index)
        )
        if "changes" in track:  # changes of the filter are told from what it holds now
            self._note(0)

    @property
    def size(self) -> int:
        """Rows in the table."""
        return int(self._native.size)

    @property
    def state_width(self) -> int:
        """float32 numbers of optimizer state per row."""
        return int(self._native.state_floats)

    @property
    def position(self) -> int:
        """Where the table stands: the last mark it gave (``mark``, ``delta``, ``save``), or the end of a delta applied.

        A table that was made stands at 0, one that was loaded at the position of its snapshot. A delta that ends here
        or before is not applied again, whether it came from elsewhere or was made by this table.
        """
        return int(self._native.generation) - 1 if "changes" in self.track else self._position

    def _note(self, position: int) -> None:
        """Take a mark of the filter, which changes after it are told by."""
        history, counter = self._history, self.admission
        if not isinstance(counter, CountFilter):
            return
        if history.seen_by is None or history.seen_by() is not counter:
            history.seen, history.seen_by = [], weakref.ref(counter)
        seen = history.seen
        seen.append((position, int(counter._native.mark())))
        if len(seen) > _MOST_MARKS:  # an older mark than asked for only sends more
            seen[1 : _MOST_MARKS // 2] = seen[1 : _MOST_MARKS // 2 : 2]

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

    def _rule(self, op: str, optimizer: RowOptimizer | None) -> dict[str, Any]:
        check.instance(op, "optimizer", optimizer, RowOptimizer, type(None))
        chosen = self.optimizer if optimizer is None else optimizer
        if self.optimizer is None or chosen is None:
            raise ValueError(
                f"[{op}] optimizer: expected a table made with one, got None. Pass Table(..., optimizer=...)."
            )
        if chosen is self.optimizer:
            return chosen._rule()
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
        time = check.integer(op, "time", self._second(time), at_least=0, at_most=2**32 - 1)
        return scores, self._epoch, time

    def _second(self, time: int | None) -> int:
        if time is not None:
            return time
        return int(_time.time()) if "use" in self.track else 0

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
        self, op: str, keys: Any, values: Any, use: _Use, *, ask: bool = False, keep: bool = False
    ) -> tuple[Any, Any]:
        """The rows of keys, and the compiled half's answer: what had to leave, with ``keep``."""
        n = int(keys.shape[0])
        if values is not None:
            values = _convert.stored(op, values, keys, self)
        moment = self._moment(op, keys, *use)
        rows, bits = arrays.empty(keys, (n,), "int32"), _convert.flags(keys)[1]
        admits = self._admits() if ask else None
        with self._room(op):
            evicted = self._native.upsert(n, keys, values, moment, admits, keep, rows, bits)
        return rows, evicted

    def contains(self, keys: Any) -> Any:
        """Return which keys are there, (n,) bool."""
        keys = self._keys("Table.contains", keys)
        found, bits = _convert.flags(keys)
        self._native.contains(int(keys.shape[0]), keys, bits, None)
        return found

    def _assign(self, op: str, keys: Any, values: Any, use: _Use, *, add: bool = False) -> Any:
        keys = self._keys(op, keys)
        values = _convert.stored(op, values, keys, self)
        moment = self._moment(op, keys, *use)
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
        rows: Any,
        grads: Any,
        time: int | None,
        mode: str = "sum",
        bags: tuple[Any, ...] = (None,) * 4,
        counts: bool = True,
    ) -> int:
        """How many gradients found no row; on a device 0 without ``counts``, which would wait for it.

        ``bags``: as in ``_convert.check_gradients``.
        """
        offsets, weights, sizes, largest = bags
        n = int(keys.shape[0])
        count = n if offsets is None else int(offsets.shape[0]) - 1
        given = (n, keys, count, offsets, weights, mode, 1.0)
        seed = getattr(self.initializer, "seed", 0)
        args = (rule, given, rows, grads, sizes, largest, self._second(time), seed)
        if self.device != "cpu":
            args += (counts,)  # type: ignore[assignment]
        return int(self._native.update(*args))


SETTINGS = tuple(name for name in inspect.signature(Store).parameters if name != "capacity")
"""The arguments of a ``Table`` that it keeps, under these names."""
