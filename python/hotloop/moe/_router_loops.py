# SPDX-License-Identifier: Apache-2.0
"""The compiled loops of the router on checked arguments."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..front import arrays, check, environment
from ..reference.moe.router import rows_of
from . import _device


class Selection(NamedTuple):
    """Checked options of a router: how experts are scored and chosen."""

    top_k: int
    scoring: Literal["softmax", "sigmoid"]
    order: Literal["softmax_then_topk", "topk_then_softmax"]
    renormalize: bool
    n_group: int
    topk_group: int
    group_score: Literal["top2", "max"]
    routed_scale: float

    def packed(self) -> tuple[int, bool, bool, bool, int, int, bool, float]:
        """As the loops take them."""
        late, sigmoid = self.order == "topk_then_softmax", self.scoring == "sigmoid"
        groups = (self.n_group, self.topk_group, self.group_score == "max")
        return (self.top_k, sigmoid, late, self.renormalize, *groups, self.routed_scale)


def maths(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def route(
    op: str,
    x: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    offsets: Tensor | None,
    selection: Selection,
    ordered: bool,
) -> tuple[Tensor, ...]:
    """Return ids, weights, counts, score sums, log-sum-exp, numbers of tokens, and, if asked for, the order of rows:
    slot_of_row, row_of_slot, expert_offsets. With ``offsets`` counts and sums are those of every sequence."""
    tokens, experts = x.shape
    k, dtype, device = selection.top_k, maths(x), x.device
    sequences = () if offsets is None else (offsets.shape[0] - 1,)
    found = (
        torch.empty((tokens, k), dtype=torch.int64, device=device),
        torch.empty((tokens, k), dtype=dtype, device=device),
        torch.empty((*sequences, experts), dtype=torch.int64, device=device),
        torch.empty((*sequences, experts), dtype=dtype, device=device),
        torch.empty((tokens,), dtype=dtype, device=device),
        torch.empty(sequences, dtype=torch.int64, device=device),
    )
    order: tuple[Tensor, ...] = ()
    if ordered:
        order = tuple(
            torch.empty((n,), dtype=torch.int64, device=device)
            for n in (tokens * k, tokens * k, experts + 1)
        )
    ids, weights, counts, sums, logsumexp, num_tokens = found
    if not x.is_cpu:
        look(op, x, bias, mask)
    loops, place = _device.loops(x)
    bad = loops.route(
        arrays.unit_stride(x),
        selection.packed(),
        bias,
        mask,
        offsets,
        ids,
        weights,
        counts.view(-1, experts),
        sums.view(-1, experts),
        logsumexp,
        num_tokens.view(-1),
        *(order or (None, None, None)),
        *place,
    )
    if x.is_cpu and bad != -1:
        look(op, x, bias, mask)
    return (*found, *order)


def backward(
    x: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    offsets: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    selection: Selection,
    biased: bool,
) -> Tensor:
    """The gradient of the logits from those of weights, score sums and log-sum-exp."""
    experts = x.shape[1]
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weights, sums, logsumexp = (None if g is None else g.contiguous() for g in grads)
    loops, place = _device.loops(x, memory=False)
    loops.route_backward(
        arrays.unit_stride(x),
        selection.packed(),
        biased,
        mask,
        offsets,
        ids,
        weights,
        None if sums is None else sums.view(-1, experts),
        logsumexp,
        result,
        *place,
    )
    return result


def dispatch(
    ids: Tensor, experts: int, capacity: int | None, weights: Tensor | None, align: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slot_of_row, row_of_slot, expert_offsets and expert_counts."""
    slots = ids.numel()
    sizes = (rows_of(slots, experts, align), slots, experts + 1, experts)
    found = tuple(torch.empty((n,), dtype=torch.int64, device=ids.device) for n in sizes)
    slot_of_row, row_of_slot, offsets, counts = found
    flat = ids.contiguous().view(-1)
    best = None if weights is None else weights.detach().contiguous().view(-1)
    limit = -1 if capacity is None else capacity
    if not ids.is_cpu:
        look_at_ids("dispatch", ids, experts, weights)
    loops, place = _device.loops(ids)
    held = loops.dispatch(flat, experts, limit, best, align, *found, *place)
    if ids.is_cpu and not held:
        look_at_ids("dispatch", ids, experts, weights)
    return slot_of_row, row_of_slot, offsets, counts


# -- numbers that are refused ------------------------------------------------------------------------------


def looks(x: Tensor) -> bool:
    """Whether numbers may be looked at: on a GPU that would wait for it."""
    return not torch.compiler.is_compiling() and (x.is_cpu or environment.checks_on())


def look(op: str, x: Tensor, bias: Tensor | None, mask: Tensor | None) -> None:
    """Raise for a row whose softmax is no number, and for a bias that is not finite."""
    if not looks(x):
        return
    if bias is not None:
        check.refuse(op, "bias", bias, ~bias.isfinite(), "finite numbers")
    x = x.detach()
    rows = x.reshape(-1, x.shape[-1])
    bad = rows.isnan() | (rows == torch.inf) | (rows == -torch.inf).all(-1, keepdim=True)
    if mask is not None:
        bad &= mask.bool()[:, None]
    hint = "Correct it first, or leave the token out by token_mask."
    wanted = "numbers below inf, one of each row finite"
    check.refuse(op, "router_logits", x, bad.reshape(x.shape), wanted, hint)


def look_at_ids(op: str, ids: Tensor, experts: int, weights: Tensor | None) -> None:
    """Raise for an id out of range, and for a weight that is NaN."""
    if not looks(ids):
        return
    outside = (ids < -1) | (ids >= experts)
    check.refuse(op, "topk_ids", ids, outside, f"-1 to {experts - 1}", "-1 goes nowhere.")
    if weights is not None:
        check.refuse(op, "topk_weights", weights, weights.isnan(), "numbers")
