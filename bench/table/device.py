# SPDX-License-Identifier: Apache-2.0
"""Lookup in tables on a CUDA device, three quarters and wholly full.

Tables that evict, so that the load is what the case says: one that does not doubles as soon as a
single bucket of 128 is full, which at three quarters a few of 16384 are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .._case import Bench, Case, Contender, Cost, Inputs, Verdict
from .._options import Options
from ..contenders import ours
from . import _inputs
from .lookup import Sorted

FIND, FIND_OR_INSERT = "device_find", "device_find_or_insert"

_SLOTS, _QUERIES, _DIM = 2**21, 2**20, 64
_LOADS = (0.75, 1.0)
_LOAD_OFF = 0.02


def _stored(slots: int, load: float, dim: int) -> _inputs.World:
    """Keys and rows; more keys than slots where all slots are to be full, of which those stay that can."""
    n = round(load * slots * (1.0 if load < 1 else 1.5))
    return _inputs.world(n, slots, dim, "device")


def _filled(function: ours.Function, x: Inputs) -> object:
    def build(stored: _inputs.World) -> object:
        table = function(
            stored.values.shape[1],
            capacity=stored.slots,
            max_capacity=stored.slots,
            evict_strategy="lru",
            device="cuda",
        )
        chunk = max(stored.slots // 16, 1)  # the rows of one call are equally old
        for keys, values in zip(stored.keys.split(chunk), stored.values.split(chunk)):
            table.insert_or_assign(keys.cuda(), values.cuda())
        return table

    return _inputs.built(x, "ours", build)


def _case(op: str, slots: int, queries: int, dim: int, load: float) -> Case:
    def make_inputs(seed: int) -> Inputs:
        stored = _stored(slots, load, dim)
        # The last that were inserted are the last to leave: half a table's worth of them.
        generator = torch.Generator().manual_seed(seed)
        n = len(stored.keys)
        index = n - 1 - torch.randint(min(n, slots // 2), (queries,), generator=generator)
        tensors = {
            "world": stored,
            "built": stored.built,
            "ids": stored.keys[index].cuda(),
            "wanted": stored.values[index].cuda(),
        }
        return Inputs(tensors, ())

    def forward(function: ours.Function, x: Inputs) -> tuple[torch.Tensor, ...]:
        table = _filled(function, x)
        verb = getattr(table, op.removeprefix("device_"))
        found: tuple[torch.Tensor, ...] = verb(x["ids"])
        return found

    def plain(x: Inputs) -> tuple[torch.Tensor, ...]:
        def build(world: _inputs.World) -> Sorted:
            there = _inputs.World(world.keys.cuda(), world.values.cuda(), world.slots, world.absent)
            return Sorted(there)

        return _inputs.built(x, "torch", build).find(x["ids"])

    def judge(contender: Contender, x: Inputs) -> Verdict:
        values, found = contender.forward(x)
        missing = 1.0 - float(found.double().mean())
        off = float((values - x["wanted"])[found].abs().max())
        if missing > 0.01 or off:
            return Verdict([off, missing], f"misses {missing:.1%} of the keys, values off by {off}")
        table = x["built"].get("ours")
        if contender.role == "ours" and abs(table.load_factor - load) > _LOAD_OFF:
            return Verdict([off, missing], f"is {table.load_factor:.2f} full, expected {load:.2f}")
        return Verdict([off, missing])

    # A key, a line of digests, a sector of keys, the row read and written, and whether it was found.
    cost = Cost("bytes", "q*(8+128+32+2*4*d+1)", {"q": queries, "d": dim})
    return Case(
        op=f"table.{op}",
        label=f"{load:.2f} full",
        shape=(slots, queries, dim),
        device="cuda",
        make_inputs=make_inputs,
        contenders=(
            *ours.contenders("hotloop.table", "Table", ("cuda",), forward),
            Contender("torch", "plain", plain),
        ),
        cost=cost,
        roof=lambda: _roof(queries, slots, dim),
        judge=judge,
    )


def _roof(queries: int, slots: int, dim: int) -> Callable[[], object]:
    rows = torch.ones(slots, dim, device="cuda")
    index = torch.randint(slots, (queries,), device="cuda")
    out = torch.empty(queries, dim, device="cuda")
    return lambda: torch.index_select(rows, 0, index, out=out)


def _cases(op: str, options: Options) -> list[Case]:
    if options.device != "cuda":
        return []
    if options.quick:
        return [_case(op, 2**11, 300, 16, load) for load in _LOADS]
    return [_case(op, _SLOTS, _QUERIES, _DIM, load) for load in _LOADS]


BENCHES = (
    Bench(f"table.{FIND}", "rows by key on a CUDA device", lambda options: _cases(FIND, options)),
    Bench(
        f"table.{FIND_OR_INSERT}",
        "rows by key on a CUDA device, in training",
        lambda options: _cases(FIND_OR_INSERT, options),
    ),
)
