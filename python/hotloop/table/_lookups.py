# SPDX-License-Identifier: Apache-2.0
"""The lookups of ``HashEmbedding`` and ``HashEmbeddingBag`` and their gradients: as registered operators, which
name a table by a number, and as the eager route without the dispatcher.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from ..core.rules import RowOptimizer
from . import _convert, _kept, _moves
from .table import Table

Looked = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_TABLES: weakref.WeakValueDictionary[int, Held] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count()
_CALLS = itertools.count()


class Held:
    """What a registered operator names by a number: a table, and what backward does with it."""

    def __init__(self, table: Table, mode: str) -> None:
        self.table = table
        self.mode = mode
        self.fused = True
        self.time: int | None = None
        self.epoch: int | None = None
        self.pending: list[tuple[tuple[Any, ...], Any]] = []  # gradients, and the factor of each
        # Settings that take the place of the table's optimizer: a parameter group of TableOptimizer.
        self.group: dict[str, Any] | None = None
        # Autograd only calls backward for what a tensor with a gradient went into. Where gradients are kept, the
        # anchor's own .grad is a number they are multiplied by, infinite where one of them is not finite: GradScaler
        # unscales and checks it as it does the gradient of any parameter.
        self.anchor = torch.zeros((), dtype=torch.float32, device=table.device, requires_grad=True)
        self.number = next(_NUMBERS)
        _TABLES[self.number] = self

    def rule(self, op: str, optimizer: RowOptimizer | None = None) -> dict[str, Any]:
        """The settings of the next move, as the compiled half takes them."""
        made = self.table.optimizer
        if optimizer is None and self.group is not None and made is not None:
            names = [field.name for field in dataclasses.fields(made)]  # type: ignore[arg-type]
            given = {name: self.group[name] for name in names}
            optimizer = type(made)(
                **{n: x.item() if isinstance(x, Tensor) else x for n, x in given.items()}
            )
        return self.table._rule(op, optimizer)

    def take(self, saved: tuple[Any, ...]) -> None:
        """Move the rows by a gradient, or keep it for ``step``."""
        if self.fused:
            apply(self, self.rule("HashEmbedding.backward"), saved, counts=False, mode=self.mode)
            return
        sound = True
        if self.pending:
            sound = self._fold()
        self.pending.append((saved, 1.0))
        grad = saved[0]
        one = torch.ones((), dtype=torch.float32, device=self.anchor.device)
        if on_cpu := grad.device.type == "cpu":
            sound = sound and _convert.largest(grad) < float("inf")
        self.anchor.grad = one if sound else one / 0
        if not on_cpu:  # without waiting for the device
            self.anchor.grad = torch.where(torch.isfinite(grad).all(), self.anchor.grad, one / 0)

    def _factor(self) -> Any:
        """What the kept gradients are still to be multiplied by."""
        number = self.anchor.grad
        if number is None or number.device.type != "cpu":
            return 1.0 if number is None else number
        return number.item() if torch.isfinite(number) else 1.0

    def _fold(self) -> bool:
        """Give every kept gradient its factor, so that a new one may have another; False if one was not finite."""
        number, factor = self.anchor.grad, self._factor()
        if isinstance(factor, Tensor) or factor != 1.0:
            self.pending = [(saved, f * factor) for saved, f in self.pending]
        return number is None or number.device.type != "cpu" or bool(torch.isfinite(number))

    def scaled(self) -> list[tuple[Any, ...]]:
        """The kept gradients with their factors."""
        now = self._factor()
        out = []
        for saved, factor in self.pending:
            whole = factor * now
            plain = not isinstance(whole, Tensor) and whole == 1.0
            out.append(saved if plain else (saved[0] * whole, *saved[1:]))
        return out

    def scale(self, factor: Tensor) -> None:
        if self.anchor.grad is not None:
            self.anchor.grad = self.anchor.grad * factor.to(self.anchor.device)

    def drop(self) -> None:
        self.pending = []
        self.anchor.grad = None

    def __getstate__(self) -> dict[str, Any]:
        if self.pending:  # they name rows by where these lie
            raise ValueError(
                f"[HashEmbedding] copy: expected no gradients kept for step(), got those of {len(self.pending)} "
                "lookup(s). Call step() or zero_grad() first."
            )
        return {
            "table": self.table,
            "mode": self.mode,
            "fused": self.fused,
            "time": self.time,
            "epoch": self.epoch,
            "learns": self.anchor.requires_grad,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["table"], state["mode"])  # type: ignore[misc]
        self.fused, self.time = state["fused"], state["time"]
        self.epoch = state.get("epoch")
        self.anchor.requires_grad_(state.get("learns", True))


def _of(number: int) -> Held:
    held = _TABLES.get(number)
    if held is None:
        raise RuntimeError(
            f"[hotloop::table_lookup] number: expected that of a module of this process, got {number}. Programs that "
            "hold one run only where they were made, while the module lives."
        )
    return held


def forward(
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    number: int,
    insert: bool,
    keep: bool,
) -> Looked:
    """(pooled, row of each id, ids with a row per bag, where each maximum came from, the rows themselves).

    The rows (n, dim) are kept where the gradient of the weights will need them: until then they may move.
    """
    held = _of(number)
    table = held.table
    n = ids.numel()
    bags = n if offsets is None else offsets.numel() - 1
    op = "HashEmbedding"
    if table.device != "cpu":
        table._enter(op, ids)
    dtype = torch.float32 if table.dtype == "int8" else getattr(torch, table.dtype)
    at = ids.device
    out = torch.empty(bags, table.dim, dtype=dtype, device=at)
    sizes = torch.empty(bags, dtype=torch.int64, device=at)
    largest = torch.empty(
        bags if held.mode == "max" else 0, table.dim, dtype=torch.int64, device=at
    )
    outs = (out, sizes, largest if held.mode == "max" else None)
    given = _bags(held, ids, offsets, weights)
    rows = torch.empty(n if insert else 0, dtype=torch.int32, device=at)
    # The first time of a lookup that is recomputed made the rows, was a use, and asked for admission.
    if insert and _moves.recomputes():
        table._native.locate(n, ids, rows)
        table._native.pool(given, rows, *outs)
    elif insert:
        moment = table._moment(op, ids, None, held.epoch, held.time)
        with table._room(op):
            table._native.pool_or_insert(
                given, moment, table._admits(), rows, _convert.flags(ids)[1], *outs
            )
    else:
        table._native.pool(given, None, *outs)
    if keep and n:
        kept = table._empty_rows(ids)
        alone = (n, ids, n, None, None, "sum", table._scale)
        table._native.pool(alone, rows if insert else None, kept, None, None)
    else:
        kept = torch.empty(0, table.dim, dtype=dtype, device=at)
    return out, rows, sizes, largest, kept


def _bags(
    held: Held, ids: Tensor, offsets: Tensor | None, weights: Tensor | None
) -> tuple[Any, ...]:
    return (
        ids.numel(),
        ids,
        ids.numel() if offsets is None else offsets.numel() - 1,
        offsets,
        weights,
        held.mode,
        held.table._scale,
    )


def _backward(
    grad: Tensor, lookup: tuple[Any, ...], number: int, of_weights: bool, of_rows: bool
) -> Tensor:
    """Return the gradient of the weights; that of the rows goes to the table, or waits for ``step``."""
    held = _of(number)
    grad = grad.float().contiguous()
    saved, kept = lookup[:-1], lookup[-1]
    ids, offsets, weights, rows, _, _ = saved
    if held.table.device != "cpu":
        held.table._enter("HashEmbedding.backward", ids)
    n = ids.numel()
    size = n if of_weights else 0
    grad_weights = torch.empty(size, dtype=torch.float32, device=ids.device)
    if of_weights and n:
        bags = _bags(held, ids, offsets, weights)
        held.table._native.weight_gradient(bags, kept, grad, grad_weights)
    if of_rows and n and rows.numel() == n:  # what has no elements has no address either
        saved = (grad, *saved)
        if held.fused:
            check("HashEmbedding.backward", held.mode, saved)
        _moves.after_backward(held.take, saved)
    return grad_weights


def by_table(helds: list[Held]) -> list[list[Held]]:
    """Modules over one table together."""
    tables: dict[int, list[Held]] = {}
    for held in helds:
        tables.setdefault(id(held.table), []).append(held)
    return list(tables.values())


def step(op: str, helds: list[Held], optimizer: RowOptimizer | None, summed: bool) -> int:
    """Apply what modules keep: all of it is checked before any row moves. ``summed``: one move per row of a table."""
    moves: list[tuple[Held, str, dict[str, Any], tuple[Any, ...]]] = []
    for same in by_table(helds):
        ruled = [(held, held.rule(op, optimizer)) for held in same]
        ready = [(held, rule) for held, rule in ruled if held.pending]
        if summed and len(ready) > 1:
            held, rule = ready[0]
            other = next((r for _, r in ready if r != rule), None)
            if other is not None:
                name = next(n for n in rule if rule[n] != other[n])
                raise ValueError(
                    f"[{op}] {name}: expected one for all modules over one table, whose gradients are summed, got "
                    f"{rule[name]} and {other[name]}. Set that of all their groups, or take summed=False."
                )
            moves.append((held, "sum", rule, _kept.across([h for h, _ in ready])))
            continue
        for held, rule in ready:
            entries = held.scaled()
            for saved in [_kept.joined(entries)] if summed else entries:
                moves.append((held, held.mode, rule, saved))
    for _, mode, _, saved in moves:
        check(op, mode, saved)
    for held in helds:
        held.drop()
    return sum(apply(held, rule, saved, mode=mode) for held, mode, rule, saved in moves)


def _bags_of(mode: str, saved: tuple[Any, ...]) -> tuple[Any, ...]:
    _, _, offsets, weights, _, sizes, largest = saved
    return offsets, weights, sizes, largest if mode == "max" else None


def check(op: str, mode: str, saved: tuple[Any, ...]) -> None:
    """Refuse gradients that would leave rows which are not finite."""
    _convert.check_gradients(op, saved[0], saved[1], mode, _bags_of(mode, saved))


def apply(
    held: Held, rule: dict[str, Any], saved: tuple[Any, ...], counts: bool = True, *, mode: str
) -> int:
    grad, ids, rows, bags = saved[0], saved[1], saved[4], _bags_of(mode, saved)
    if held.table.device != "cpu":
        held.table._enter("HashEmbedding.backward", ids)
    return held.table._update(rule, ids, rows, grad, held.time, mode, bags, counts)


@torch.library.custom_op("hotloop::table_lookup", mutates_args=())
def lookup_op(
    anchor: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    number: int,
    insert: bool,
    keep: bool,
) -> Looked:
    return forward(ids, offsets, weights, number, insert, keep)


@lookup_op.register_fake
def _(anchor: Tensor, ids: Tensor, offsets: Tensor | None, *rest: Any) -> Looked:
    _, number, insert, keep = rest
    held = _of(number)
    table = held.table
    bags = ids.shape[0] if offsets is None else offsets.shape[0] - 1
    dtype = torch.float32 if table.dtype == "int8" else getattr(torch, table.dtype)
    return (
        ids.new_empty((bags, table.dim), dtype=dtype),
        ids.new_empty((ids.shape[0] if insert else 0,), dtype=torch.int32),
        ids.new_empty((bags,), dtype=torch.int64),
        ids.new_empty((bags if held.mode == "max" else 0, table.dim), dtype=torch.int64),
        ids.new_empty((ids.shape[0] if keep else 0, table.dim), dtype=dtype),
    )


# The gradient of the anchor is what keeps the operator in a compiled graph: a pure function without a used result
# would be dropped. ``call`` differs for every lookup: equal calls of pure functions would be made once.
@torch.library.custom_op("hotloop::table_update", mutates_args=())
def _update_op(
    grad: Tensor,
    anchor: Tensor,
    ids: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    rows: Tensor,
    sizes: Tensor,
    largest: Tensor,
    kept: Tensor,
    number: int,
    call: int,
    of_weights: bool,
) -> tuple[Tensor, Tensor]:
    lookup = (ids, offsets, weights, rows, sizes, largest, kept)
    return torch.zeros_like(anchor), _backward(grad, lookup, number, of_weights, True)


@_update_op.register_fake
def _(grad: Tensor, anchor: Tensor, ids: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    n = ids.shape[0] if rest[-1] else 0
    return torch.empty_like(anchor), ids.new_empty((n,), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    anchor, ids, offsets, weights, ctx.number, _, _ = inputs
    ctx.call = next(_CALLS)
    ctx.save_for_backward(anchor, ids, offsets, weights, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "[HashEmbedding.backward] create_graph: expected False, got True: a lookup has no second derivative. "
            "Take the rows of this term from table.find(ids).values.requires_grad_() and add up by torch."
        )


def _op_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    _refuse_second_derivative()
    saved = ctx.saved_tensors  # once: a checkpoint unpacks each of them once
    of_weights = saved[3] is not None and ctx.needs_input_grad[3]
    grad_anchor, grad_weights = _update_op(grad, *saved, ctx.number, ctx.call, of_weights)
    return grad_anchor, None, None, grad_weights if of_weights else None, None, None, None


lookup_op.register_autograd(_op_backward, setup_context=_setup)


class Direct(torch.autograd.Function):
    """The eager route: the same without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, anchor: Any, *args: Any) -> Any:
        ids, offsets, weights, ctx.number, _, _ = args
        out, *saved = forward(*args)
        ctx.save_for_backward(ids, offsets, weights, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        _refuse_second_derivative()
        saved = ctx.saved_tensors  # once: a checkpoint unpacks each of them once
        of_weights = saved[2] is not None and ctx.needs_input_grad[3]
        # Not where only gradients of others were asked for, by torch.autograd.grad or backward(inputs=...).
        end = ctx.next_functions[0][0]
        of_rows = end is not None and torch._C._will_engine_execute_node(end)
        grad_weights = _backward(grad, saved, ctx.number, of_weights, of_rows)
        return None, None, None, grad_weights if of_weights else None, None, None, None
