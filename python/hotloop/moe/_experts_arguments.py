# SPDX-License-Identifier: Apache-2.0
"""Checks of the ops on the products of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..front import arrays, check
from ..reference.moe.experts import GATED, PLAIN, Activation
from .results import Dispatch

KINDS = (*GATED, *PLAIN)


def activation_of(op: str, activation: Any) -> Activation:
    """The activation with its numbers checked; a string is its kind."""
    if isinstance(activation, str):
        check.choice(op, "activation", activation, KINDS)
        return Activation(activation)
    check.instance(op, "activation", activation, str, Activation)
    kind, interleaved, limit, alpha, shift = activation
    check.choice(op, "activation.kind", kind, KINDS)
    interleaved = check.flag(op, "activation.interleaved", interleaved)
    if limit is not None:
        limit = check.number(op, "activation.limit", limit, above=0)
    alpha = check.number(op, "activation.alpha", alpha, above=0)
    shift = check.number(op, "activation.shift", shift)
    if kind not in ("swiglu", "silu") and alpha != 1:
        raise ValueError(
            f"[{op}] activation.alpha: expected 1 for {kind!r}, got {alpha:g}. "
            "Only swiglu and silu have a sigmoid to scale."
        )
    if kind in PLAIN and (interleaved or limit is not None or shift):
        raise ValueError(
            f"[{op}] activation: expected no interleaved, limit or shift for {kind!r}, which has no gate, got "
            f"{(interleaved, limit, shift)}. Leave them out."
        )
    return Activation(kind, interleaved, limit, alpha, shift)


def weights(op: str, name: str, value: Any, x: Tensor, why: str = "x") -> Tensor:
    """A tensor (E, ..., ...) of the dtype and in the place of x."""
    found = check.float_tensor(op, name, value, 3)
    beside(op, name, found, x, why)
    return found


def beside(op: str, name: str, value: Tensor, x: Tensor, like: str = "x") -> None:
    check.same_place(op, name, value, like, x)
    if value.dtype != x.dtype:
        raise TypeError(
            f"[{op}] {name}: expected dtype {arrays.dtype(x)} like {like}, got {arrays.dtype(value)}. "
            "Convert one of them."
        )


def bias_of(op: str, name: str, value: Any, shape: tuple[int, int], x: Tensor) -> None:
    if value is not None:
        beside(op, name, check.float_tensor(op, name, value), x)
        check.shape(op, name, value, shape, "(experts, outputs)")


def offsets_of(op: str, name: str, value: Any, experts: int, x: Tensor) -> None:
    check.alike(op, name, value, ("int64",), (experts + 1,), "x", x)


def dispatch_of(op: str, value: Any, experts: int, x: Tensor) -> Dispatch:
    """A dispatch over these experts whose four tensors are int64 and where x is."""
    if not isinstance(value, Dispatch):
        raise TypeError(
            f"[{op}] dispatch: expected a Dispatch, got {type(value).__name__}. "
            "Pass routing.dispatch, or what hotloop.moe.dispatch returns."
        )
    for name, tensor in zip(value._fields, value):
        check.array(op, f"dispatch.{name}", tensor, ("int64",), 1)
        check.same_place(op, f"dispatch.{name}", tensor, "x", x)
    for name, wanted in (("expert_offsets", experts + 1), ("expert_counts", experts)):
        check.shape(
            op,
            f"dispatch.{name}",
            getattr(value, name),
            (wanted,),
            f"for {experts} experts",
            "Pass the dispatch made for these experts.",
        )
    return value


def choices(op: str, dispatch: Dispatch, tokens: int) -> int:
    """k, where the dispatch has T * k slots."""
    slots = dispatch.row_of_slot.shape[0]
    k = slots // max(tokens, 1)
    if slots != k * tokens:
        raise ValueError(
            f"[{op}] dispatch.row_of_slot: expected shape (T * k,) with T = {tokens}, the rows of x, got ({slots},). "
            "Pass the dispatch of these tokens."
        )
    return k


def look_at(op: str, dispatch: Dispatch, rows: int) -> None:
    """Raise unless offsets rise, counts fit between them, and rows and slots are each other's inverse."""
    slot_of_row, row_of_slot, offsets, counts = dispatch
    hint = "Make it by hotloop.moe.dispatch."
    name = "dispatch.expert_offsets"
    look_at_offsets(op, name, offsets, rows)
    outside = (counts < 0) | (counts > offsets.diff())
    check.refuse(op, "dispatch.expert_counts", counts, outside, "0 to the rows of the expert", hint)
    each = torch.arange(rows, device=offsets.device)
    owner = torch.searchsorted(offsets, each, right=True) - 1
    inside = (owner >= 0) & (owner < counts.shape[0])
    owner = owner.clamp(0, max(0, counts.shape[0] - 1))
    if counts.shape[0]:
        inside &= each < offsets[owner] + counts[owner]
    wrong = (
        (slot_of_row < -1) | (slot_of_row >= row_of_slot.shape[0]) | (inside != (slot_of_row >= 0))
    )
    wanted = f"0 to {row_of_slot.shape[0] - 1} where an expert has a slot and -1 elsewhere"
    check.refuse(op, "dispatch.slot_of_row", slot_of_row, wrong, wanted, hint)
    inverse = torch.full_like(row_of_slot, -1)
    inverse[slot_of_row[inside]] = each[inside]
    wanted = "the inverse of slot_of_row"
    check.refuse(op, "dispatch.row_of_slot", row_of_slot, inverse != row_of_slot, wanted, hint)


def look_at_offsets(op: str, name: str, offsets: Tensor, rows: int) -> None:
    rise = bool((offsets.diff() >= 0).all())
    if not rise or int(offsets[0]) < 0 or int(offsets[-1]) > rows:
        raise ValueError(
            f"[{op}] {name}: expected offsets that rise within 0 to {rows}, the number of rows, got {offsets.tolist()}."
        )
