# SPDX-License-Identifier: Apache-2.0
"""Checks of what the ops on expert rows and on the residual stream have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..front import arrays, at_run_time, check, environment
from .results import Dispatch, Norm

NORMS = ("layer", "rms")
NARROW = (torch.float32, torch.bfloat16, torch.float16)
WIDE = (torch.float64,)
FLOATS = (*NARROW, *WIDE)
INDICES = (torch.int64,)
_PLAIN = (Tensor, torch.nn.Parameter)


def fits(
    value: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | int, other: Any
) -> bool:
    """Whether a value is a plain tensor of one of these dtypes, of this shape or rank, where ``other`` is.

    Nearly every argument is, and is found so in a tenth of the time that the checks below need to say what is wrong.
    """
    return (
        type(value) in _PLAIN
        and not value.is_nested  # asked first: one that is has no shape
        and value.dtype in dtypes
        and (value.ndim == shape if isinstance(shape, int) else value.shape == shape)
        and value.device == other.device
        and value.layout is torch.strided
    )


def alike(other: Tensor) -> tuple[torch.dtype, ...]:
    """Dtypes that need no narrowing beside ``other``."""
    return WIDE if other.dtype is torch.float64 else NARROW


def matrix(op: str, name: str, value: Any) -> Tensor:
    if fits(value, FLOATS, 2, value):
        found: Tensor = value
        return found
    return check.float_tensor(op, name, value, ndim=2)


def beside(
    op: str, name: str, value: Any, shape: tuple[int, ...], like: str, other: Tensor
) -> Tensor:
    """A float tensor of this shape where ``other`` is, wide if and only if that is."""
    if fits(value, alike(other), shape, other):
        fitting: Tensor = value
        return fitting
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
    for name, value in (
        ("slot_of_row", dispatch.slot_of_row),
        ("row_of_slot", dispatch.row_of_slot),
        ("expert_offsets", dispatch.expert_offsets),
        ("expert_counts", dispatch.expert_counts),
    ):
        if not fits(value, INDICES, 1, other):
            named = f"dispatch.{name}"
            check.array(op, named, check.tensor(op, named, value), ("int64",), 1)
            check.same_place(op, f"dispatch.{name}", value, like, other)
        if not value.is_contiguous():
            dispatch = dispatch._replace(**{name: value.contiguous()})
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
    if not fits(weights, FLOATS, 2, rows):
        check.float_tensor(op, "topk_weights", weights, ndim=2)
        check.same_place(op, "topk_weights", weights, name, rows)
    found = dispatch_of(op, dispatch, name, rows)
    t, k = weights.shape
    if k == 0:
        raise ValueError(
            f"[{op}] topk_weights: expected shape (T, k) with k >= 1, got {tuple(weights.shape)}."
        )
    hint = "Pass the dispatch that these rows were permuted by."
    if found.row_of_slot.shape[0] != t * k:
        why = "(T * k,) like topk_weights"
        check.shape(op, "dispatch.row_of_slot", found.row_of_slot, (t * k,), why, hint)
    if found.slot_of_row.shape[0] != rows.shape[0]:
        why = f"(R,) like {name}"
        check.shape(op, "dispatch.slot_of_row", found.slot_of_row, (rows.shape[0],), why, hint)
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
    kind, weight, bias, eps = norm
    check.choice(op, "norm.kind", kind, NORMS)
    if type(eps) is not float or not 0 <= eps <= 1:
        check.number(op, "norm.eps", eps, at_least=0)
    columns = (other.shape[1],)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not fits(value, FLOATS, columns, other):
            check.float_tensor(op, f"norm.{name}", value)
            check.same_place(op, f"norm.{name}", value, like, other)
            check.shape(op, f"norm.{name}", value, columns, f"like the columns of {like}")
    return post_norm


def number(op: str, name: str, value: Any, like: str, other: Tensor) -> float | Tensor:
    """A finite number, or a tensor of one beside ``other``."""
    if type(value) is float and -check.LARGEST <= value <= check.LARGEST:
        return value
    if not isinstance(value, Tensor):
        return check.number(op, name, value)
    check.float_tensor(op, name, value)
    check.same_place(op, name, value, like, other)
    check.shape(op, name, value, (), hint="Pass a number, or a tensor of one number.")
    return value


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
