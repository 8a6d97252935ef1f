# SPDX-License-Identifier: Apache-2.0
"""Lookup and insertion of pairs, and the gather of rows, in tables that are about 0.85 full.

The peak memory of an insertion is the table it leaves: less key and value, over the keys, it is
what a row costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .._case import Bench, Case, Contender, Cost, Entry, Inputs, Target, Verdict, on_cpu
from .._options import Options
from ..contenders import hash_maps, ours, tfra, torchrec
from . import _inputs
from ._inputs import World

FIND, INSERT, GATHER = "find", "insert_or_assign", "gather"

# 2^24 slots at 0.85 are 14.3 million keys. Both rivals round slots up to a power of two: for 16
# million keys libcuckoo would run at 0.95 and absl at 0.48.
_SLOTS, _LOAD = 2**24, 0.85
_LOAD_OFF = 0.1
"""A table whose load is further off than this is not what the case says."""
_QUERIES = 2**20
_PAIR = 2
"""float32 values that make the 8 bytes of libcuckoo's value."""
_ROWS, _ROW_SLOTS, _DIM = 800_000, 2**20, 64
_SAMPLE = 2**16


class Store(Protocol):
    def find(self, keys: Tensor) -> Any: ...


class Sorted:
    """Plain torch: sorted keys, found by bisection."""

    def __init__(self, stored: World) -> None:
        self._keys, order = stored.keys.sort()
        self._values = stored.values[order]

    def find(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        at = torch.searchsorted(self._keys, keys).clamp_(max=len(self._keys) - 1)
        found = self._keys[at] == keys
        # Indexing by a tensor is several times slower than this for rows.
        return self._values.index_select(0, at), found

    @property
    def size(self) -> int:
        return len(self._keys)


def filled(function: ours.Function, stored: World) -> Any:
    table = function(stored.values.shape[1], capacity=len(stored.keys))
    table.insert_or_assign(stored.keys, stored.values)
    return table


def _find_filled(function: ours.Function, x: Inputs) -> tuple[Tensor, ...]:
    table = _inputs.built(x, "ours", lambda stored: filled(function, stored))
    found: tuple[Tensor, ...] = table.find(x["ids"])
    return found


def _pairs(name: str) -> Callable[[World], hash_maps.Pairs]:
    def build(stored: World) -> hash_maps.Pairs:
        pairs = hash_maps.Pairs(name, stored.slots)
        pairs.insert_or_assign(stored.keys, stored.values)
        return pairs

    return build


def _rows(name: str) -> Callable[[World], hash_maps.Rows]:
    return lambda stored: hash_maps.Rows(name, stored.slots, stored.keys, stored.values)


def _finds(name: str, role: Any, build: Callable[[World], Store]) -> Contender:
    def forward(x: Inputs) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = _inputs.built(x, name, build).find(x["ids"])
        return found

    return Contender(name, role, forward)


def _rival_finds(name: str, build: Callable[[World], Store]) -> Entry:
    return hash_maps.contender(name, lambda: _finds(name, "rival", build))


def _judge_find(expected_load: float | None) -> Callable[[Contender, Inputs], Verdict]:
    def judge(contender: Contender, x: Inputs) -> Verdict:
        values, found = contender.forward(x)
        verdict = _compared(values, found, x)
        store = x["built"].get("ours" if contender.role == "ours" else contender.name)
        return verdict if verdict.complaint else _loaded(verdict, store, expected_load)

    return judge


def _compared(values: Tensor, found: Tensor, x: Inputs) -> Verdict:
    index = x["index"]
    stored = index >= 0
    wrong = float((found.bool() != stored).double().mean())
    wanted = x["world"].values[index[stored]]
    off = float((values[stored] - wanted).abs().max()) if len(wanted) else 0.0
    errors = [off, wrong]
    if wrong or off:
        return Verdict(errors, f"finds {wrong:.1%} of the keys wrongly, values off by {off:.1e}")
    return Verdict(errors)


def _loaded(verdict: Verdict, store: Any, expected: float | None) -> Verdict:
    load = getattr(store, "load_factor", None)
    if expected is None or load is None or abs(load - expected) <= _LOAD_OFF:
        return verdict
    return Verdict(verdict.errors, f"is {load:.2f} full, expected about {expected:.2f}")


def _find_case(
    slots: int,
    queries: int,
    threads: int,
    load: float = _LOAD,
    hits: float = 1.0,
    targets: tuple[Target, ...] = (),
) -> Case:
    n = round(load * slots)

    def make_inputs(seed: int) -> Inputs:
        return _inputs.lookups(seed, _inputs.world(n, slots, _PAIR), queries, hits)

    # A key, a line of the table, a value and whether it was found.
    cost = Cost("bytes", "q*(8+64+4*d+1)", {"q": queries, "d": _PAIR})
    return Case(
        op=f"table.{FIND}",
        label=f"{load:.2f} full, {hits:.0%} stored, {_threads(threads)}",
        shape=(n, queries),
        make_inputs=make_inputs,
        contenders=(
            *ours.contenders("hotloop.table", "Table", ("cpu",), _find_filled),
            _finds("torch", "plain", Sorted),
            *(
                _rival_finds(name, _pairs(name))
                for name in (hash_maps.CUCKOO, hash_maps.ABSL, hash_maps.ABSL_AHEAD)
            ),
        ),
        cost=cost,
        # As many random lines out of as many bytes as key and value take.
        roof=_inputs.line_roof(queries, slots * (8 + 4 * _PAIR)),
        targets=targets,
        threads=threads,
        judge=_judge_find(load),
    )


def _threads(threads: int) -> str:
    return f"{threads} thread{'' if threads == 1 else 's'}"


@on_cpu
def find_cases(options: Options) -> list[Case]:
    if options.quick:
        return [_find_case(2**12, 1000, threads, hits=0.75) for threads in (1, 2)]
    found = [
        _find_case(_SLOTS, _QUERIES, 2, targets=(Target("C4.1", hash_maps.CUCKOO, 1 / 6),)),
        _find_case(_SLOTS, _QUERIES, 1, targets=(Target("C4.1", hash_maps.ABSL, 1 / 1.5),)),
    ]
    if options.sweep:
        found += [_find_case(_SLOTS, _QUERIES, 2, hits=hits) for hits in (0.5, 0.0)]
        found += [_find_case(2**bits, _QUERIES, 2) for bits in (16, 20, 22)]
        found += [_find_case(_SLOTS, _QUERIES, 2, load) for load in (0.5, 0.7)]
    return found


def _insert_case(
    slots: int, threads: int, load: float = _LOAD, targets: tuple[Target, ...] = ()
) -> Case:
    """Every step builds an empty table of so many slots, fills it and drops it."""
    n = round(load * slots)

    def make_inputs(seed: int) -> Inputs:
        return _inputs.lookups(seed, _inputs.world(n, slots, _PAIR), min(n, _SAMPLE), 1.0)

    def judge(contender: Contender, x: Inputs) -> Verdict:
        store = contender.forward(x)
        verdict = _compared(*store.find(x["ids"]), x)
        if store.size != n:
            return Verdict([math.inf], f"holds {store.size} keys, expected {n}")
        return verdict if verdict.complaint else _loaded(verdict, store, load)

    def rival(name: str) -> Entry:
        build = _pairs(name)
        return hash_maps.contender(
            name, lambda: Contender(name, "rival", lambda x: build(x["world"]))
        )

    # absl takes one writer.
    names = [hash_maps.CUCKOO, *((hash_maps.ABSL, hash_maps.ABSL_AHEAD) if threads == 1 else ())]
    # Key and value are read, a line of the table is read and written.
    cost = Cost("bytes", "n*(8+4*d+2*64)", {"n": n, "d": _PAIR})
    return Case(
        op=f"table.{INSERT}",
        label=f"until {load:.2f} full, {_threads(threads)}",
        shape=(n,),
        make_inputs=make_inputs,
        contenders=(
            *ours.contenders(
                "hotloop.table", "Table", ("cpu",), lambda f, x: filled(f, x["world"])
            ),
            Contender("torch", "plain", lambda x: Sorted(x["world"])),
            *map(rival, names),
        ),
        cost=cost,
        targets=targets,
        sets=1,
        threads=threads,
        judge=judge,
    )


@on_cpu
def insert_cases(options: Options) -> list[Case]:
    if options.quick:
        return [_insert_case(2**12, threads) for threads in (1, 2)]
    found = [
        _insert_case(_SLOTS, 2, targets=(Target("C4.1", hash_maps.CUCKOO, 1 / 4),)),
        _insert_case(_SLOTS, 1, targets=(Target("C4.1", hash_maps.ABSL, 1 / 1.5),)),
    ]
    if options.sweep:
        found += [_insert_case(2**bits, 2) for bits in (16, 20, 22)]
    return found


def _gather_case(
    rows: int, slots: int, queries: int, targets: tuple[Target, ...] = (), dim: int = _DIM
) -> Case:
    def make_inputs(seed: int) -> Inputs:
        return _inputs.lookups(seed, _inputs.world(rows, slots, dim), queries, 1.0)

    def judge(contender: Contender, x: Inputs) -> Verdict:
        found = contender.forward(x)
        if isinstance(found, tuple):
            return _compared(found[0], found[1], x)
        return _compared(found, torch.ones(len(found), dtype=torch.bool), x)

    # A key and a line of the table, and the row read and written.
    cost = Cost("bytes", "q*(8+64+2*4*d)", {"q": queries, "d": dim})
    return Case(
        op=f"table.{GATHER}",
        label="every id stored",
        shape=(rows, queries, dim),
        make_inputs=make_inputs,
        contenders=(
            *ours.contenders("hotloop.table", "Table", ("cpu",), _find_filled),
            _finds("torch", "plain", Sorted),
            *(_rival_finds(name, _rows(name)) for name in (hash_maps.CUCKOO, hash_maps.ABSL_AHEAD)),
            tfra.lookup(),
            torchrec.lookup(),
            Contender(
                "rows without keys",
                "floor",
                lambda x: x["world"].values.index_select(0, x["index"]),
            ),
        ),
        cost=cost,
        roof=_inputs.gather_roof(queries, 4 * rows * dim, dim),
        targets=targets,
        sets=5,
        threads=2,
        judge=judge,
    )


@on_cpu
def gather_cases(options: Options) -> list[Case]:
    if options.quick:
        return [_gather_case(1000, 2**11, 300, dim=16)]
    targets = (
        Target("C4.2", hash_maps.CUCKOO, 0.25),
        Target("C4.2", tfra.NAME, 0.25),
        Target("C4.2", torchrec.NAME, 0.5),
    )
    found = [_gather_case(_ROWS, _ROW_SLOTS, 65_536, targets)]
    if options.sweep:
        found += [_gather_case(_ROWS, _ROW_SLOTS, queries) for queries in (1024, 8192)]
        found += [_gather_case(_ROWS, _ROW_SLOTS, 65_536, dim=dim) for dim in (16, 128)]
    return found


BENCHES = (
    Bench(f"table.{FIND}", "values of 8 bytes by key", find_cases),
    Bench(f"table.{INSERT}", "a table filled from empty", insert_cases),
    Bench(f"table.{GATHER}", "rows by key", gather_cases),
)
