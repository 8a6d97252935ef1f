"""What the losses of this room share in front of the engine: checks and rows that need a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .. import _check
from ._pairs import Row


def policy_pair(op: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor | None]:
    """The two inputs nearly every loss is differentiated by."""
    _check.tensor(op, "policy_rejected_logps", rejected)
    return {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected}


def ref_pair(op: str, chosen: Row, rejected: Row) -> dict[str, Row]:
    return required(op, ref_chosen_logps=chosen, ref_rejected_logps=rejected)


def required(op: str, **rows: Row) -> dict[str, Row]:
    """Constants that must not be left out. A plain number stands for every row."""
    for name, value in rows.items():
        if not isinstance(value, (int, float)):
            _check.tensor(op, name, value)
    return rows


def together(op: str, **values: object) -> bool:
    """Return whether the values are given; raise if only some of them are."""
    missing = [name for name, value in values.items() if value is None]
    if missing and len(missing) < len(values):
        given = next(name for name, value in values.items() if value is not None)
        raise ValueError(
            f"[{op}] {missing[0]}: expected a value beside {given}, got None. Pass both or neither."
        )
    return not missing


def exact(value: Tensor) -> Tensor:
    """Return ``value`` in float32 or better: nothing in front of the head rounds to half."""
    return value if value.dtype == torch.float64 else value.float()


def lengths(op: str, name: str, value: Row | None) -> Row:
    """Token counts as a constant of the row, in a dtype that holds them; None is 1. Heads take at least 1."""
    if value is None:
        return 1.0
    if isinstance(value, Tensor):
        return exact(value)
    return max(1.0, _check.number(op, name, value, at_least=0))


def probability(
    op: str, name: str, value: Row, *, below: float | None = None, at_most: float | None = 1.0
) -> Row:
    """A number in range, or a tensor taken as it is (its range would cost a pass over the rows)."""
    if isinstance(value, Tensor):
        return exact(value)
    if below is not None:
        return _check.number(op, name, value, at_least=0, below=below)
    return _check.number(op, name, value, at_least=0, at_most=at_most)


def label_after(op: str, smoothing: Row) -> Row:
    """The label 1 - label_smoothing of a logistic head."""
    return 1.0 - probability(op, "label_smoothing", smoothing)


def check_rows(op: str, rows: Mapping[str, Tensor], ndim: int | None = 1) -> None:
    """Check float tensors that the front door computes with itself: one shape, one device."""
    names = list(rows)
    first = _check.float_tensor(op, names[0], rows[names[0]], ndim=ndim)
    for name in names[1:]:
        value = _check.float_tensor(op, name, rows[name])
        if value.shape != first.shape:
            raise ValueError(
                f"[{op}] {name}: expected shape {tuple(first.shape)} like {names[0]}, "
                f"got {tuple(value.shape)}. Pass one value for each."
            )
        _check.same_device(op, name, value, names[0], first)


def per_row(op: str, name: str, value: Tensor | None, like: str, first: Tensor) -> Tensor | None:
    """A row of values; a scalar, such as a loss averaged over the batch, stands for every row."""
    if value is None:
        return None
    _check.float_tensor(op, name, value)
    if value.ndim > 0:
        return value
    return value.expand(_check.float_tensor(op, like, first, ndim=1).shape[0])


def add_term(
    op: str, loss: Tensor, name: str, term: Tensor, like: str, first: Tensor, reduction: str
) -> Tensor:
    """Add ``term``, reduced like the loss. Only a mean may be over a number of rows of its own."""
    _check.same_device(op, name, term, like, first)
    if reduction == "mean":
        return loss + term.mean()
    if term.shape != first.shape:
        raise ValueError(
            f"[{op}] {name}: expected shape {tuple(first.shape)} like {like} for reduction="
            f"{reduction!r}, got {tuple(term.shape)}. Use reduction='mean' for other counts."
        )
    return loss + (term.sum() if reduction == "sum" else term)
