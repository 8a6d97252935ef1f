# SPDX-License-Identifier: Apache-2.0
"""The router for torch: autograd in eager mode, the operators ``hotloop::moe_route``, ``moe_route_backward`` and
``moe_dispatch`` under torch.compile.

Backward takes the gradients of weights, score sums and log-sum-exp together, in one pass over the logits. Asked for a
graph (``create_graph=True``), it writes the chosen values in torch ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..front import check
from ..reference.moe import router as plain
from . import _router_loops as loops
from ._router_loops import Selection
from .results import Dispatch

_Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of weights, score sums and log-sum-exp."""


def route(
    op: str,
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    selection: Selection,
    ordered: bool,
) -> tuple[Tensor, ...]:
    """What ``_router_loops.route`` returns, differentiable."""
    if torch.compiler.is_compiling():
        found = torch.ops.hotloop.moe_route(op, x, bias, mask, offsets, *selection, ordered)
        weights, ids, *rest = found
        return (ids, weights, *rest) if ordered else (ids, weights, *rest[:4])
    check.untransformed(op, x)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return loops.route(op, x, bias, mask, offsets, selection, ordered)
    result: tuple[Tensor, ...] = _Route.apply(x, op, bias, mask, offsets, selection, ordered)
    return result


def dispatch(
    ids: Tensor, experts: int, capacity: int | None, weights: Tensor | None, align: int
) -> Dispatch:
    if torch.compiler.is_compiling():
        best = None if weights is None else weights.detach()
        return Dispatch(*torch.ops.hotloop.moe_dispatch(ids, experts, capacity, best, align))
    check.untransformed("dispatch", ids, weights)
    return Dispatch(*loops.dispatch(ids, experts, capacity, weights, align))


def _graph(
    x: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    grads: _Grads,
    selection: Selection,
) -> Tensor:
    """The gradient of the logits in torch ops, to be differentiated again."""
    _, scoring, order, renormalize, *_, scale = selection
    wide, scores, counted = plain.logits_and_scores(x, mask, scoring)
    options = (scoring, order, renormalize, scale)
    weights, shares, z = plain.values(wide, scores, ids.clamp(min=0), counted, *options)
    if offsets is None:
        sums = shares.sum(0)
    else:
        of_token = plain.sequence_of_token(offsets, x.shape[0])
        sums = shares.new_zeros((offsets.shape[0] - 1, x.shape[1])).index_add(0, of_token, shares)
    pairs = [(v, g) for v, g in zip((weights, sums, z), grads) if g is not None]
    (found,) = torch.autograd.grad(
        [v for v, _ in pairs], [x], [g for _, g in pairs], create_graph=True
    )
    return found


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, op: str, *call: Any) -> tuple[Tensor, ...]:
        bias, mask, offsets, selection, ordered = call
        found = loops.route(op, x, bias, mask, offsets, selection, ordered)
        ctx.save_for_backward(x, found[0], mask, offsets)
        ctx.selection, ctx.biased = selection, bias is not None
        ctx.mark_non_differentiable(found[0], found[2], *found[5:])
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, ids, mask, offsets = ctx.saved_tensors
        given = (grads[1], grads[3], grads[4])
        if all(g is None for g in given):
            found = None
        elif torch.is_grad_enabled():
            found = _graph(x, ids, mask, offsets, given, ctx.selection)
        else:
            found = loops.backward(x, ids, mask, offsets, given, ctx.selection, ctx.biased)
        return found, None, None, None, None, None, None


# -- registered forms, for torch.compile ------------------------------------------------------------------


@torch.library.custom_op("hotloop::moe_route", mutates_args=())
def _route_op(
    op: str,
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    top_k: int,
    scoring: str,
    order: str,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    group_score: str,
    routed_scale: float,
    ordered: bool,
) -> list[Tensor]:
    """Nine tensors, weights first, since torch's own check adds all to the first; the last three of no element without
    ``ordered``."""
    options: Any = (
        top_k,
        scoring,
        order,
        renormalize,
        n_group,
        topk_group,
        group_score,
        routed_scale,
    )
    selection = Selection._make(options)
    found = loops.route(op, x, bias, mask, offsets, selection, ordered)
    none = 0 if ordered else 3
    ids, weights, *rest = found
    return [weights, ids, *rest, *(ids.new_empty((0,)) for _ in range(none))]


@_route_op.register_fake
def _(op: str, x: Tensor, bias: Any, mask: Any, offsets: Any, *call: Any) -> list[Tensor]:
    top_k, ordered = call[0], call[-1]
    tokens, experts = x.shape
    sequences = () if offsets is None else (offsets.shape[0] - 1,)
    dtype = loops.maths(x)
    slots = tokens * top_k if ordered else 0
    return [
        x.new_empty((tokens, top_k), dtype=dtype),
        x.new_empty((tokens, top_k), dtype=torch.int64),
        x.new_empty((*sequences, experts), dtype=torch.int64),
        x.new_empty((*sequences, experts), dtype=dtype),
        x.new_empty((tokens,), dtype=dtype),
        x.new_empty(sequences, dtype=torch.int64),
        x.new_empty((slots,), dtype=torch.int64),
        x.new_empty((slots,), dtype=torch.int64),
        x.new_empty((experts + 1 if ordered else 0,), dtype=torch.int64),
    ]


@torch.library.custom_op("hotloop::moe_route_backward", mutates_args=())
def _backward_op(
    x: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    weights: Tensor | None,
    sums: Tensor | None,
    logsumexp: Tensor | None,
    biased: bool,
    top_k: int,
    scoring: str,
    order: str,
    renormalize: bool,
    n_group: int,
    topk_group: int,
    group_score: str,
    routed_scale: float,
) -> Tensor:
    options: Any = (
        top_k,
        scoring,
        order,
        renormalize,
        n_group,
        topk_group,
        group_score,
        routed_scale,
    )
    selection = Selection._make(options)
    return loops.backward(x, ids, mask, offsets, (weights, sums, logsumexp), selection, biased)


@_backward_op.register_fake
def _(x: Tensor, *_rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, x, bias, mask, offsets, *selection, _ordered = inputs
    ctx.save_for_backward(x, output[1], mask, offsets)
    ctx.selection, ctx.biased = tuple(selection), bias is not None


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, ids, mask, offsets = ctx.saved_tensors
    given = (grads[0], grads[3], grads[4])
    if torch.is_grad_enabled():
        found = _graph(x, ids, mask, offsets, given, Selection(*ctx.selection))
    else:
        found = torch.ops.hotloop.moe_route_backward(
            x, ids, mask, offsets, *given, ctx.biased, *ctx.selection
        )
    return (None, found, *(None,) * 12)


_route_op.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("hotloop::moe_dispatch", mutates_args=())
def _dispatch_op(
    ids: Tensor, experts: int, capacity: int | None, weights: Tensor | None, align: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return loops.dispatch(ids, experts, capacity, weights, align)


@_dispatch_op.register_fake
def _(
    ids: Tensor, experts: int, capacity: Any, weights: Any, align: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = ids.numel()
    sizes = (plain.rows_of(slots, experts, align), slots, experts + 1, experts)
    a, b, c, d = (ids.new_empty((n,), dtype=torch.int64) for n in sizes)
    return a, b, c, d
