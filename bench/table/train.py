# SPDX-License-Identifier: Apache-2.0
"""A training step of one table: pooled rows, their gradient, and the update of the rows in place.

Our ids are keys of 64 bits, those of torch and FBGEMM are row numbers of a static table: they do
no lookup. Ours has a second turn at the row numbers, as keys.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Bench, Case, Contender, Cost, Entry, Inputs, Target, Verdict, on_cpu
from .._check import relative_error
from .._options import Options
from ..contenders import fbgemm, ours, torchrec
from . import _inputs
from ._inputs import World

STEP, FORWARD = "embedding_bag_step", "embedding_bag_forward"
Rule = Literal["rowwise_adagrad", "adam"]

_LR, _EPS = 0.05, 1e-8
_OURS = {"rowwise_adagrad": "RowwiseAdagrad", "adam": "Adam"}
# As _check: twice the error of plain torch, or a few roundings where that is more.
_FLOOR, _TIMES = 1e-5, 2.0
_JUDGED_STEPS = 3
"""The value of the last shows what the updates before it did."""


class Plain:
    """Plain torch: gradients of repeated rows merged, then the rule on the rows that have one."""

    def __init__(self, values: Tensor, rule: Rule) -> None:
        self.weight = values.clone().requires_grad_()
        self._sums = torch.zeros(len(values), dtype=values.dtype)
        self._adam = torch.optim.SparseAdam([self.weight], lr=_LR, eps=_EPS)
        self._rule = rule

    def step(self, dense: Tensor, offsets: Tensor, upstream: Tensor) -> Tensor:
        pooled = F.embedding_bag(dense, self.weight, offsets, mode="sum", sparse=True)
        pooled.backward(upstream.to(pooled.dtype))
        if self._rule == "adam":
            self._adam.step()
        else:
            self._adagrad()
        self.weight.grad = None
        return pooled.detach()

    @torch.no_grad()
    def _adagrad(self) -> None:
        assert self.weight.grad is not None
        merged = self.weight.grad.coalesce()
        rows, gradient = merged.indices()[0], merged.values()
        sums = self._sums[rows] + gradient.square().mean(-1)
        self._sums[rows] = sums
        self.weight.index_add_(0, rows, gradient * (-_LR / (sums.sqrt() + _EPS)).unsqueeze(-1))


def _plain(rule: Rule) -> Contender:
    def forward(x: Inputs) -> Tensor:
        plain = _inputs.built(x, "plain", lambda w: Plain(w.values, rule))
        return plain.step(x["dense"], x["offsets"], x["upstream"])

    return Contender("torch", "plain", forward)


def _bag(function: ours.Function, stored: World, keys: Tensor, rule: Rule) -> Any:
    # torch.optim.SparseAdam adds eps where TensorFlow does.
    mode = {"eps_mode": "tensorflow"} if rule == "adam" else {}
    optimizer = getattr(importlib.import_module("hotloop.table"), _OURS[rule])(
        lr=_LR, eps=_EPS, **mode
    )
    dim = stored.values.shape[1]
    bag = function(dim, mode="sum", capacity=len(stored.keys), optimizer=optimizer)
    bag.table.insert_or_assign(keys, stored.values)
    return bag


def _ours(rule: Rule, ids: str) -> list[Entry]:
    """``ids``: "ids" are hashed, "dense" are row numbers, taken as keys."""

    def forward(function: ours.Function, x: Inputs) -> Tensor:
        def build(stored: World) -> Any:
            rows = torch.arange(len(stored.keys))
            return _bag(function, stored, stored.keys if ids == "ids" else rows, rule)

        bag = _inputs.built(x, f"ours {ids}", build)
        pooled: Tensor = bag(x[ids], x["offsets"])
        pooled.backward(x["upstream"])
        return pooled.detach()

    return list(ours.contenders("hotloop.table", "HashEmbeddingBag", ("cpu",), forward))


def _dense_turn(rule: Rule) -> list[Entry]:
    """Ours on row numbers, as a rival of our own turn on keys."""
    found: list[Entry] = []
    for entry in _ours(rule, "dense"):
        if isinstance(entry, Contender):
            entry = Contender("hotloop on row numbers", "rival", entry.forward)
        found.append(entry)
    return found


def _judge_step(rule: Rule) -> Callable[[Contender, Inputs], Verdict]:
    """The value after some steps on the same bags, against plain torch in float64."""

    def judge(contender: Contender, x: Inputs) -> Verdict:
        x = _inputs.fresh(x)
        for _ in range(_JUDGED_STEPS):
            found = contender.forward(x)
        values = x["world"].values
        truth, same = (_plain_value(values.to(d), rule, x) for d in (torch.float64, torch.float32))
        error = relative_error(found, truth)
        allowed = _TIMES * max(relative_error(same, truth), _FLOOR / 2)
        moved = relative_error(contender.forward(_inputs.fresh(x)), truth)
        if error > allowed or not moved > 10 * allowed:
            text = f"is off by {error:.1e} after {_JUDGED_STEPS} steps, allowed {allowed:.1e}"
            return Verdict([error], text)
        return Verdict([error])

    return judge


def _plain_value(values: Tensor, rule: Rule, x: Inputs) -> Tensor:
    plain = Plain(values, rule)
    for _ in range(_JUDGED_STEPS):
        found = plain.step(x["dense"], x["offsets"], x["upstream"])
    return found


def _make_inputs(
    rows: int, batch: int, length: int, dim: int, law: str, case: str
) -> Callable[[int], Inputs]:
    slots = round(rows / 0.8)

    def make(seed: int) -> Inputs:
        return _inputs.bags(seed, _inputs.world(rows, slots, dim, case), batch, length, law)

    return make


def _touched(rows: int, count: int, law: str) -> int:
    """Distinct rows among so many draws, on average."""
    if law == "uniform":
        return round(rows * -math.expm1(count * math.log1p(-1 / rows)))
    p = torch.arange(1, rows + 1, dtype=torch.float64).pow_(-_inputs.ZIPF)
    return round(float(-torch.expm1(count * torch.log1p(-p / p.sum())).sum()))


def _step_case(
    rule: Rule,
    law: str,
    size: tuple[int, int, int, int],
    targets: tuple[Target, ...] = (),
) -> Case:
    rows, batch, length, dim = size
    rivals: list[Entry] = []
    if rule == "rowwise_adagrad":
        rivals = [fbgemm.rowwise_adagrad_step(_LR, _EPS)]
    # Rows are read for every id, pooled and handed down; each row touched is read and written with
    # its state (a number per row, or two per element).
    state = 1 if rule == "rowwise_adagrad" else 2 * dim
    cost = Cost(
        "bytes",
        "4*(b*l*d + 2*b*d + 2*u*(d + s))",
        {"b": batch, "l": length, "d": dim, "u": _touched(rows, batch * length, law), "s": state},
    )
    return Case(
        op=f"table.{STEP}",
        mode="step",
        label=f"{rule.replace('_', ' ')}, {law} ids",
        shape=size,
        make_inputs=_make_inputs(rows, batch, length, dim, law, f"{rule} {law}"),
        contenders=(*_ours(rule, "ids"), _plain(rule), *rivals, *_dense_turn(rule)),
        cost=cost,
        roof=_inputs.gather_roof(int(cost.amount / 4 / dim), 4 * rows * dim, dim),
        targets=targets,
        threads=2,
        judge=_judge_step(rule),
    )


@on_cpu
def step_cases(options: Options) -> list[Case]:
    rules: tuple[Rule, ...] = ("rowwise_adagrad", "adam")
    if options.quick:
        size = (1000, 32, 4, 16)
        return [_step_case(rule, law, size) for rule in rules for law in ("uniform", "zipf")]
    targets = {
        "rowwise_adagrad": (Target("C4.3", fbgemm.NAME, 0.60),),
        "adam": (Target("C4.3", "torch", 0.30),),
    }
    sizes = [(1_000_000, 8192, 8, 64)]
    if options.sweep:
        sizes += [(1_000_000, 512, 8, 64), (1_000_000, 8192, 32, 64), (1_000_000, 8192, 8, 128)]
    return [
        _step_case(rule, law, size, targets[rule] if size is sizes[0] else ())
        for size in sizes
        for rule in rules
        for law in ("uniform", "zipf")
    ]


def _forward_case(
    law: str, size: tuple[int, int, int, int], targets: tuple[Target, ...] = ()
) -> Case:
    rows, batch, length, dim = size

    def forward(function: ours.Function, x: Inputs) -> Tensor:
        bag = _inputs.built(
            x, "ours", lambda w: _bag(function, w, w.keys, "rowwise_adagrad").train()
        )
        pooled: Tensor = bag(x["ids"], x["offsets"])
        return pooled.detach()

    def plain(x: Inputs) -> Tensor:
        keys, order = _inputs.built(x, "torch", lambda w: w.keys.sort())
        at = order[torch.searchsorted(keys, x["ids"])]
        return F.embedding_bag(at, x["world"].values, x["offsets"], mode="sum")

    def judge(contender: Contender, x: Inputs) -> Verdict:
        truth = F.embedding_bag(x["dense"], x["world"].values.double(), x["offsets"], mode="sum")
        error = relative_error(contender.forward(x), truth)
        return Verdict([error], "" if error <= _FLOOR else f"is off by {error:.1e}")

    # A key, a line of the table and a row for every id; pooled rows.
    cost = Cost("bytes", "b*l*(8+64+4*d) + 4*b*d", {"b": batch, "l": length, "d": dim})
    return Case(
        op=f"table.{FORWARD}",
        mode="step",
        label=f"training, {law} ids, all stored",
        shape=size,
        make_inputs=_make_inputs(rows, batch, length, dim, law, f"forward {law}"),
        contenders=(
            *ours.contenders("hotloop.table", "HashEmbeddingBag", ("cpu",), forward),
            Contender("torch", "plain", plain),
            *torchrec.train_forward(),
        ),
        cost=cost,
        roof=_inputs.gather_roof(batch * length, 4 * rows * dim, dim),
        targets=targets,
        threads=2,
        judge=judge,
    )


@on_cpu
def forward_cases(options: Options) -> list[Case]:
    if options.quick:
        return [_forward_case("zipf", (1000, 32, 4, 16))]
    targets = (Target("C4.3", torchrec.NAME, 0.25),)
    return [_forward_case(law, (1_000_000, 8192, 8, 64), targets) for law in ("uniform", "zipf")]


BENCHES = (
    Bench(f"table.{STEP}", "pooled rows, gradient and update of the rows", step_cases),
    Bench(f"table.{FORWARD}", "pooled rows of ids, as in training", forward_cases),
)
