# SPDX-License-Identifier: Apache-2.0
"""Checks of what the ops on expert rows and on the residual stream have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..front import arrays, at_run_time, check, environment
from .results import Dispatch, Norm

NORMS = ("layer", "rms")


def matrix(op: str, name: str, value: Any) -> Tensor:
    return check.float_tensor(op, name, value, ndim=2)


def beside(
    op: str, name: str, value: Any, shape: tuple[int, ...], like: str, other: Tensor
) -> Tensor:
    """A float tensor of this shape where ``other`` is, wide if and only if that is."""
    found = check.float_tensor(op, name, value)
    check.same_place(op, name, found, like, other)
    check.shape(op, name, found, shape, "(T, D)", "Pass a row for every token.")
    same_width(op, name, found, like, other)
    return found


def same_width(op: str, name: str, value: Tensor, like: str, other: Tensor) -> None:
    """float64 beside a narrower dtype would be rounded in silence."""
    if (value.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"[{op}] {name}: expected {'float64' if other.dtype == torch.float64 else 'no float64'} beside {like} "
            f"{arrays.dtype(other)}, got {arrays.dtype(value)}. Convert one of them."
        )


def dispatch_of(op: str, dispatch: Any, like: str, other: Tensor) -> Dispatch:
    """A dispatch whose index tensors are int64, flat and where ``other`` is."""
    if not isinstance(dispatch, Dispatch):
        raise TypeError(
            f"[{op}] dispatch: expected a Dispatch, got {type(dispatch).__name__}. "
            "Pass routing.dispatch, or what hotloop.moe.dispatch returns."
        )
    for name in ("slot_of_row", "row_of_slot"):
        value = getattr(dispatch, name)
        check.array(op, f"dispatch.{name}", value, ("int64",), 1)
        check.same_place(op, f"dispatch.{name}", value, like, other)
    return dispatch


def slots_per_token(op: str, dispatch: Dispatch, tokens: int) -> int:
    """k, of T * k slots."""
    slots = dispatch.row_of_slot.shape[0]
    k = slots // max(tokens, 1)
    if slots != tokens * k:
        raise ValueError(
            f"[{op}] dispatch.row_of_slot: expected shape (T * k,) with T = {tokens}, got ({slots},). "
            "Pass the dispatch of these tokens."
        )
    return k


def weighted(op: str, rows: Tensor, name: str, weights: Any, dispatch: Any) -> Dispatch:
    """Check weights (T, k) and the dispatch of expert rows (R, D)."""
    check.float_tensor(op, "topk_weights", weights, ndim=2)
    check.same_place(op, "topk_weights", weights, name, rows)
    found = dispatch_of(op, dispatch, name, rows)
    t, k = weights.shape
    if k == 0:
        raise ValueError(
            f"[{op}] topk_weights: expected shape (T, k) with k >= 1, got {tuple(weights.shape)}."
        )
    for part, wanted, why in (
        ("row_of_slot", t * k, "(T * k,) like topk_weights"),
        ("slot_of_row", rows.shape[0], f"(R,) like {name}"),
    ):
        hint = "Pass the dispatch that these rows were permuted by."
        check.shape(op, f"dispatch.{part}", getattr(found, part), (wanted,), why, hint)
    return found


def norm_of(op: str, norm: Any, post_norm: Any, like: str, other: Tensor) -> bool:
    """Check the norm of rows like ``other``; return ``post_norm``."""
    post_norm = check.flag(op, "post_norm", post_norm)
    if norm is None:
        if post_norm:
            raise ValueError(
                f"[{op}] post_norm: expected False without a norm, got True. Pass norm=Norm(...)."
            )
        return post_norm
    if not isinstance(norm, Norm):
        raise TypeError(
            f"[{op}] norm: expected a Norm, got {type(norm).__name__}. "
            'Pass Norm("layer", layer_norm.weight, layer_norm.bias, layer_norm.eps), or Norm("rms", ...).'
        )
    check.choice(op, "norm.kind", norm.kind, NORMS)
    check.number(op, "norm.eps", norm.eps, at_least=0)
    for name in ("weight", "bias"):
        value = getattr(norm, name)
        if value is not None:
            check.float_tensor(op, f"norm.{name}", value)
            check.same_place(op, f"norm.{name}", value, like, other)
            check.shape(op, f"norm.{name}", value, (other.shape[1],), f"like the columns of {like}")
    return post_norm


def looked_at(op: str, dispatch: Dispatch) -> Dispatch:
    """The dispatch, whose numbers are looked at on the CPU, when a compiled graph runs too; on a GPU if asked for."""
    rows, slots = dispatch.slot_of_row, dispatch.row_of_slot
    if arrays.compiling():
        both = torch.cat((rows, slots))
        count = rows.shape[0]
        both = at_run_time.checked("dispatch", op, "dispatch", both, (count,))
        return dispatch._replace(slot_of_row=both[:count], row_of_slot=both[count:])
    if rows.is_cpu or environment.checks_on():
        look_at_dispatch(op, rows, slots)
    return dispatch


@at_run_time.look("dispatch")
def _look(op: str, name: str, both: Tensor, count: int) -> None:
    look_at_dispatch(op, both[:count], both[count:])


def look_at_dispatch(op: str, slot_of_row: Tensor, row_of_slot: Tensor) -> None:
    """Raise unless the two are inverse to each other, but for -1."""
    pairs = (("slot_of_row", slot_of_row, row_of_slot), ("row_of_slot", row_of_slot, slot_of_row))
    hint = "Make it by hotloop.moe.dispatch."
    for name, found, other in pairs:
        outside = (found < -1) | (found >= other.shape[0])
        check.refuse(op, f"dispatch.{name}", found, outside, f"-1 to {other.shape[0] - 1}", hint)
    for (name, found, other), back in zip(pairs, ("row_of_slot", "slot_of_row")):
        if other.shape[0] == 0:
            continue
        each = torch.arange(found.shape[0], device=found.device)
        astray = (found >= 0) & (other[found.clamp(min=0)] != each)
        check.refuse(op, f"dispatch.{name}", found, astray, f"the inverse of {back}", hint)
