"""What the losses of this room share in front of the engine: checks and rows that need a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..front import at_run_time, check, environment, native, plain
from ._pairs import Row


def policy_pair(op: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor | None]:
    """The two inputs nearly every loss is differentiated by."""
    check.tensor(op, "policy_rejected_logps", rejected)
    return {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected}


def ref_pair(op: str, chosen: Row, rejected: Row) -> dict[str, Row]:
    return required(op, ref_chosen_logps=chosen, ref_rejected_logps=rejected)


def required(op: str, **rows: Row) -> dict[str, Row]:
    """Constants that must not be left out. A plain number stands for every row."""
    for name, value in rows.items():
        if not isinstance(value, (int, float)):
            check.tensor(op, name, value)
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
        return exact(check.float_like(op, name, value))
    return max(1.0, check.number(op, name, value, at_least=0))


# What the compiled checks of rows read: 0.5 us for 8 rows, where a comparison and a reduction of torch take 5.
_NATIVE = (torch.float32, torch.float64)
# Up to here a list of Python numbers is the cheapest look at a tensor of any dtype.
_SHORT = 64


def _seen(value: Tensor) -> bool:
    """Whether values may be looked at: on a GPU that would wait for the device, so it is left to HOTLOOP_CHECK."""
    if not (value.is_cpu or environment.checks_on()):
        return False
    return not torch._C._are_functorch_transforms_active()


@at_run_time.look("marks")
def marks(op: str, name: str, value: Tensor) -> Tensor:
    """True and False, or 1 and 0, in any dtype. -1 for a bad answer would be read as a number."""
    value = check.tensor(op, name, value)
    if value.dtype is torch.bool:
        return value
    if torch.compiler.is_compiling():
        return at_run_time.checked("marks", op, name, value)
    if not _seen(value):
        return value
    if value.dtype in _NATIVE and value.is_cpu and value.ndim == 1:
        if native.core.pointwise.are_marks(value):
            return value
    plain.check(op, name, value)
    if value.numel() <= _SHORT:
        wrong = [x for x in value.reshape(-1).tolist() if x not in (0, 1)]
    else:
        wrong = value[(value != 0) & (value != 1)][:1].tolist()
    if wrong:
        raise ValueError(
            f"[{op}] {name}: expected True and False, or 1 and 0, got {wrong[0]}. "
            f"Pass {name} > 0 where the marks are 1 and -1."
        )
    return value


def probability(op: str, name: str, value: Row, *, below: float | None = None) -> Row:
    """A number from 0 to 1, or from 0 to less than ``below``, or a tensor of such."""
    if isinstance(value, Tensor):
        if torch.compiler.is_compiling():
            value = check.tensor(op, name, value)
            numbers = () if below is None else (below,)
            return exact(at_run_time.checked("probability", op, name, value, (), numbers))
        if value.dtype is torch.bool or not _seen(value):
            return exact(check.tensor(op, name, value))
        high = 1.0 if below is None else below
        if value.dtype in _NATIVE and value.is_cpu and value.ndim == 1:
            if native.core.pointwise.within(value, high, below is not None):
                return value
        elif value.numel() == 0:
            return exact(check.tensor(op, name, value))
        plain.check(op, name, value)
        _check_range(op, name, value, below, high)
        return exact(value)
    if below is not None:
        return check.number(op, name, value, at_least=0, below=below)
    return check.number(op, name, value, at_least=0, at_most=1)


@at_run_time.look("probability")
def _look_at_probability(op: str, name: str, value: Tensor, below: float | None = None) -> None:
    probability(op, name, value, below=below)


def _check_range(op: str, name: str, value: Tensor, below: float | None, high: float) -> None:
    least, largest = (float(v) for v in torch.aminmax(value.detach().double()))  # NaN if any is
    if least >= 0 and (largest <= high if below is None else largest < high):
        return
    top = f"<= {high:g}" if below is None else f"< {high:g}"
    got = largest if least >= 0 else least
    raise ValueError(f"[{op}] {name}: expected numbers >= 0 and {top}, got {got:g}.")


def label_after(op: str, smoothing: Row) -> Row:
    """The label 1 - label_smoothing of a logistic head."""
    return 1.0 - probability(op, "label_smoothing", smoothing)


def check_rows(op: str, rows: Mapping[str, Tensor], ndim: int | None = 1) -> None:
    """Check float tensors that the front door computes with itself: one shape, one device."""
    names = list(rows)
    first = check.float_tensor(op, names[0], rows[names[0]], ndim=ndim)
    for name in names[1:]:
        value = check.float_tensor(op, name, rows[name])
        if value.shape != first.shape:
            raise ValueError(
                f"[{op}] {name}: expected shape {tuple(first.shape)} like {names[0]}, "
                f"got {tuple(value.shape)}. Pass one value for each."
            )
        check.same_place(op, name, value, names[0], first)


def per_row(op: str, name: str, value: Tensor | None, like: str, first: Tensor) -> Tensor | None:
    """A row of values; a scalar, such as a loss averaged over the batch, stands for every row."""
    if value is None:
        return None
    check.float_tensor(op, name, value)
    if value.ndim > 0:
        return value
    return value.expand(check.float_tensor(op, like, first, ndim=1).shape[0])


def add_term(
    op: str, loss: Tensor, name: str, term: Tensor, like: str, first: Tensor, reduction: str
) -> Tensor:
    """Add ``term``, reduced like the loss. Only a mean may be over a number of rows of its own."""
    check.same_place(op, name, term, like, first)
    if term.numel() == 0 and first.numel() != 0:
        raise ValueError(
            f"[{op}] {name}: expected at least one row beside {like}, got none. A mean over nothing is NaN."
        )
    if reduction == "mean":
        return loss + term.mean()
    if term.shape != first.shape:
        raise ValueError(
            f"[{op}] {name}: expected shape {tuple(first.shape)} like {like} for reduction="
            f"{reduction!r}, got {tuple(term.shape)}. Use reduction='mean' for other counts."
        )
    return loss + (term.sum() if reduction == "sum" else term)
