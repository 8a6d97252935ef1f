# SPDX-License-Identifier: Apache-2.0
"""Laws as the front doors check them and as the compiled loops take them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import numpy as np

from ..front import arrays, check, environment
from ..front.check import LARGEST, choice, number
from ..reference.decode.law import (
    FILTER_ORDERS,
    MAX_VOCABULARY,
    MOST_PROBABILITY,
    Law,
    Logits,
    NoProbability,
    Probs,
    as_law,
)


def check_law(op: str, name: str, value: Any, *ndims: int) -> Law:
    """The law behind an argument, with everything checked that does not need the elements."""
    law = _plain_numbers(as_law(value))
    values = check.array(op, name, law.values, arrays.FLOATS, *ndims)
    if values.shape[-1] < 1 or values.shape[-1] > MAX_VOCABULARY:
        raise ValueError(
            f"[{op}] {name}: expected a vocabulary of 1 to {MAX_VOCABULARY} tokens, got shape {tuple(values.shape)}."
        )
    batch = int(values.shape[0])
    if not _is_bare(law):
        _check_parameters(op, name, law, values, batch)
        k = law.top_k
        if isinstance(k, float) or (isinstance(k, int) and k > MAX_VOCABULARY):
            law = replace(law, top_k=int(min(k, MAX_VOCABULARY)))  # 64 bits hold it then
    if environment.checks_on():
        _check_elements(op, name, law)
    if isinstance(law, Logits) and law.reference is not None and law.mixture in (0.0, 1.0):
        # 0 * -inf is NaN: a model of weight 0 has no say, not even about the tokens it rules out.
        law = replace(law, values=law.reference if law.mixture == 1.0 else values, reference=None)
    return law


def _is_bare(law: Law) -> bool:
    """Whether nothing but the values, and a temperature that is fine, was given: the common case of small calls."""
    for value, default in ((law.top_k, 0), (law.top_p, 1.0), (law.min_p, 0.0)):
        if type(value) is not type(default) or value != default:
            return False
    if law.filter_order != "top_k_first":
        return False
    if not isinstance(law, Logits):
        return True
    t = law.temperature
    if type(t) is not float or not 0.0 <= t < np.inf:
        return False
    return (
        law.reference is None and law.bias_ids is None and law.bias is None and law.mixture == 0.5
    )


def _check_parameters(op: str, name: str, law: Law, values: Any, batch: int) -> None:
    choice(op, f"{name}.filter_order", law.filter_order, FILTER_ORDERS)
    _per_request(op, f"{name}.top_k", law.top_k, batch, at_least=-1, whole=True)
    _per_request(op, f"{name}.top_p", law.top_p, batch, above=0.0, at_most=1.0)
    _per_request(op, f"{name}.min_p", law.min_p, batch, at_least=0.0, at_most=1.0)
    if isinstance(law, Logits):
        _per_request(op, f"{name}.temperature", law.temperature, batch, at_least=0.0)
        number(op, f"{name}.mixture", law.mixture, at_least=0.0, at_most=1.0)
        if law.reference is not None:
            dtypes = (arrays.dtype(values),)
            shape = tuple(values.shape)
            check.alike(op, f"{name}.reference", law.reference, dtypes, shape, name, values)
        if (law.bias_ids is None) != (law.bias is None):
            raise ValueError(
                f"[{op}] {name}.bias: expected bias_ids and bias together, got only one of them."
            )
        if law.bias_ids is not None:
            check.array(op, f"{name}.bias_ids", law.bias_ids, ("int64",), 2)
            like = ((batch, int(law.bias_ids.shape[1])), name, values)
            check.alike(op, f"{name}.bias_ids", law.bias_ids, ("int64",), *like)
            check.alike(op, f"{name}.bias", law.bias, ("float32",), *like)


def _plain_numbers(law: Law) -> Law:
    """NumPy scalars become Python numbers, which is what everything after this looks for."""
    names = ("top_k", "top_p", "min_p", "temperature")
    scalars = {n: getattr(law, n, None) for n in names}
    found = {n: x.item() for n, x in scalars.items() if isinstance(x, np.generic)}
    return replace(law, **found) if found else law


def _per_request(
    op: str, name: str, value: Any, batch: int, *, whole: bool = False, **bounds: Any
) -> None:
    """Check a number, or an array of shape (B,); elements of arrays on a GPU only where checks are on."""
    if type(value) is float and not whole:
        # The defaults, which are always allowed.
        if value == 1.0 or (value == 0.0 and "above" not in bounds):
            return
    elif type(value) is int and value == 0 and whole:
        return
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            x = float(value)
        except OverflowError:  # an int of more than 1024 bits
            x = np.inf if value > 0 else -np.inf
        huge = whole and isinstance(value, int) and x > 0
        if not huge and (not np.isfinite(x) or (whole and int(value) != value)):
            wanted = "an integer" if whole else "a finite number"
            raise ValueError(f"[{op}] {name}: expected {wanted}, got {x!r}.")
        number(op, name, _within(x, bounds), **bounds)
        return
    check.kind(op, name, value)
    if tuple(value.shape) != (batch,):
        raise ValueError(
            f"[{op}] {name}: expected a number or shape ({batch},), got shape {tuple(value.shape)}."
        )
    if whole and arrays.dtype(value) not in arrays.INTEGERS:
        raise TypeError(
            f"[{op}] {name}: expected dtype {', '.join(arrays.INTEGERS)}, got {arrays.dtype(value)}."
        )
    if arrays.device(value) != "cpu" and not environment.checks_on():
        return
    numbers = arrays.to_numpy(value)
    check.refuse(op, name, numbers, ~np.isfinite(numbers), "finite numbers")
    for at, one in enumerate(numbers.tolist()):
        number(op, f"{name}[{at}]", _within(float(one), bounds), **bounds)


def _within(x: float, bounds: dict[str, Any]) -> float:
    """What has no upper bound is a float64 and may exceed float32, which ``number`` refuses."""
    return x if "at_most" in bounds else min(x, LARGEST)


def refuse_probabilities(op: str, **laws: Any) -> NoReturn:
    """Name the first number of the laws that is no probability: a loop has met one."""
    for name, law in laws.items():
        if isinstance(law, Probs):
            x = arrays.to_numpy(law.values)
            bad = ~((x >= 0) & (x <= MOST_PROBABILITY))
            wanted = "probabilities from 0 to 1"
            check.refuse(op, name, x, bad, wanted, "Wrap logits in Logits(...).")
    raise ValueError(
        f"[{op}] {' or '.join(laws)}: expected probabilities from 0 to 1, got another number. "
        "Do not write into the arrays during the call."
    )


@contextmanager
def naming(op: str, **laws: Any) -> Iterator[None]:
    """Around a call of the reference, which does not know what the arguments of the op are called."""
    try:
        yield
    except NoProbability:
        refuse_probabilities(op, **laws)


def _check_elements(op: str, name: str, law: Law) -> None:
    """What HOTLOOP_CHECK=1 looks at: every element of every row."""
    read = {name: law.values}
    if isinstance(law, Logits):
        if law.reference is not None:
            read[f"{name}.reference"] = law.reference
        if law.bias is not None:
            read[f"{name}.bias"] = law.bias
    for label, array in read.items():
        x = arrays.to_numpy(array)
        if x.size == 0:
            continue
        if isinstance(law, Logits):
            bad = np.isnan(x) | (x == np.inf)
            check.refuse(op, label, x, bad, "logits below +inf", check.UNSET)
            if label == name:
                largest = x.max(axis=-1)
                wanted = "a finite logit in every row"
                check.refuse(op, label, largest, largest == -np.inf, wanted, check.UNSET)
        else:
            if not ((x >= 0) & (x <= MOST_PROBABILITY)).all():
                refuse_probabilities(op, **{label: law})
            total = x.sum(axis=-1, dtype=np.float64)
            # A sum of V numbers of half precision is off by this much and still a law.
            slack = 1e-3 if arrays.dtype(array) in ("float32", "float64") else 2e-2
            wrong = np.abs(total - 1.0) > slack
            check.refuse(op, label, total.round(6), wrong, "rows that sum to 1", check.UNSET)
    if isinstance(law, Logits) and law.bias_ids is not None:
        check_ids(op, f"{name}.bias_ids", law.bias_ids, int(law.values.shape[-1]))


def check_ids(op: str, name: str, ids: Any, vocabulary: int) -> None:
    """Where checks are on: token ids from -1 (none) to V - 1."""
    x = arrays.to_numpy(ids)
    bad = (x < -1) | (x >= vocabulary)
    check.refuse(
        op, name, x, bad, f"token ids from 0 to {vocabulary - 1} (-1 for none)", check.UNSET
    )


def packed_number(value: Any, dtype: str) -> Any:
    """A per-request parameter as the compiled loops take it: a number, or a contiguous array of this dtype."""
    if isinstance(value, (int, float)):
        return value
    return arrays.dense(value, dtype)


def pack_draft(law: Law | None) -> tuple[Any, ...] | None:
    return None if law is None else pack(law)


def pack(law: Law) -> tuple[Any, ...]:
    """The law as the compiled loops take it."""
    values = arrays.unit_stride(law.values)
    cuts = (
        packed_number(law.top_k, "int64"),
        packed_number(law.top_p, "float64"),
        packed_number(law.min_p, "float64"),
        law.filter_order == "joint",
    )
    if isinstance(law, Probs):
        return (values, False, 1.0, *cuts, None, 0.0, None, None)
    reference = None if law.reference is None else arrays.unit_stride(law.reference)
    bias_ids = bias = None
    if law.bias_ids is not None and law.bias_ids.shape[1] > 0:
        bias_ids, bias = arrays.dense(law.bias_ids), arrays.dense(law.bias)
    temperature = packed_number(law.temperature, "float64")
    return (values, True, temperature, *cuts, reference, law.mixture, bias_ids, bias)
