# SPDX-License-Identifier: Apache-2.0
"""Errors that every pointwise loss raises, over the cases of all rooms, and those that its declaration brings."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from hotloop import vocabulary
from hotloop.core import pointwise
from hotloop.front.declare import OPS, Declared
from hotloop.front.ranges import Number
from pointwise_cases import CASES, Case

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def arguments(case: Case) -> dict[str, Any]:
    grad, const = case.inputs(4)
    return {**grad, **const, **case.kwargs}


@by_case
def test_an_integer_tensor_in_place_of_each_log_probability(case: Case) -> None:
    for name in case.grad:
        call = arguments(case)
        call[name] = call[name].long()
        with pytest.raises(TypeError, match=rf"\[{case.op}\] .*{name}: expected dtype float32"):
            case.fn(**call)


@by_case
def test_a_list_in_place_of_each_tensor(case: Case) -> None:
    for name in (*case.grad, *case.const):
        call = arguments(case)
        call[name] = call[name].tolist()
        with pytest.raises((TypeError, ValueError), match=rf"\[{case.op}\] .*{name}: expected"):
            case.fn(**call)


@by_case
def test_one_row_too_few_in_each_tensor(case: Case) -> None:
    free = {"kto-rows": ("policy_kl_logps",), "vpo-calibration": ("policy_calibration_logps",)}
    first = next(iter(case.grad))
    for name in (*case.grad, *case.const):
        if name == first or name in free.get(case.id, ()):
            continue
        call = arguments(case)
        call[name] = call[name][:-1]
        if case.id in ("npo-retain", "hypo-single") and name != "sequence_lengths":
            call["reduction"] = "none"
        with pytest.raises(ValueError, match=rf"\[{case.op}\] .*expected .*, got .*\. [A-Z]"):
            case.fn(**call)


@by_case
def test_another_device_for_each_tensor(case: Case) -> None:
    for name in (*case.grad, *case.const):
        call = arguments(case)
        call[name] = call[name].to("meta")
        with pytest.raises(ValueError, match=rf"\[{case.op}\] .*expected device (cpu|meta) like"):
            case.fn(**call)


@by_case
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_sparse_or_complex_tensor_in_place_of_each_tensor(case: Case, impl: str) -> None:
    """Every implementation names the op and the argument; the imaginary part of a constant was dropped."""
    for name in (*case.grad, *case.const):
        for other in (torch.Tensor.to_sparse, lambda x: x + 1j):
            call = arguments(case)
            call[name] = other(call[name].float())
            text = rf"\[{case.op}\] (.*\W)?{name}\W.*expected .*, got "
            with pytest.raises(TypeError, match=text):
                case.fn(**call, impl=impl)


@by_case
def test_reduction_and_impl(case: Case) -> None:
    with pytest.raises(ValueError, match="reduction: expected one of none, mean, sum, got 'max'"):
        case.fn(**arguments(case), reduction="max")
    with pytest.raises(ValueError, match=r"impl: expected one of auto, .*, got 'gpu'"):
        case.fn(**arguments(case), impl="gpu")


@by_case
def test_checks_find_nan_when_they_are_on(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call = arguments(case)
    name = next(iter(case.grad))
    call[name].view(-1)[1] = float("nan")
    assert bool(case.fn(**call).isnan().any())
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    with pytest.raises(ValueError, match=r"expected finite values, got nan at .* Unset HOTLOOP_C"):
        case.fn(**call)


# -- what a declaration brings ---------------------------------------------------------------------------


def declared_and_case() -> list[Any]:
    """Every declared op that has cases, with the first of them."""
    first = {f"{case.room}.{case.op}": case for case in reversed(CASES) if callable(case.fn)}
    return [pytest.param(OPS[name], case, id=name) for name, case in sorted(first.items())]


by_declaration = pytest.mark.parametrize(("op", "case"), declared_and_case())


def test_every_declared_loss_has_a_case() -> None:
    rooms = {case.room for case in CASES}
    declared = {name for name, op in OPS.items() if op.room in rooms}
    assert {f"{case.room}.{case.op}" for case in CASES} == declared


@by_declaration
def test_values_outside_a_range_are_refused_with_the_range(op: Declared, case: Case) -> None:
    for name, range_ in op.ranges.items():
        partners = {partner for group in op.together if name in group for partner in group}
        call = {**dict.fromkeys(partners, torch.ones(4)), **arguments(case)}
        for value, error in range_.wrong():
            with pytest.raises(error, match=rf"\[{op.name}\] {name}: expected "):
                case.fn(**{**call, name: value})


@by_declaration
def test_a_choice_lists_what_is_accepted(op: Declared, case: Case) -> None:
    for name, allowed in op.choices.items():
        text = rf"\[{op.name}\] {name}: expected one of {', '.join(allowed)}, got 'other'\."
        with pytest.raises(ValueError, match=text):
            case.fn(**{**arguments(case), name: "other"})


@by_declaration
def test_one_of_two_that_belong_together(op: Declared, case: Case) -> None:
    for group in op.together:
        for missing in group:
            call = {**arguments(case), **dict.fromkeys(group, torch.ones(4)), missing: None}
            others = "|".join(name for name in group if name != missing)
            text = rf"\[{op.name}\] {missing}: expected a value beside ({others}), got None\. Pass both"
            with pytest.raises(ValueError, match=text):
                case.fn(**call)


INTERVAL = re.compile(r"in ([(\[])([-\d.]+), ([-\d.]+)([)\]])")


def said(entry: str) -> dict[str, float]:
    """The bounds that the text of an argument states: ``> 0``, ``>= 0``, ``in (0, 1]``."""
    bounds: dict[str, float] = {}
    for sign, key in ((">=", "at_least"), (">", "above"), ("<=", "at_most"), ("<", "below")):
        if found := re.search(rf"(?<![<>=]){re.escape(sign)} ([-\d.]*\d)", entry):
            bounds[key] = float(found[1])
    if found := INTERVAL.search(entry):
        bounds["above" if found[1] == "(" else "at_least"] = float(found[2])
        bounds["below" if found[4] == ")" else "at_most"] = float(found[3])
    return bounds


@by_declaration
def test_the_docstring_states_the_range(op: Declared, case: Case) -> None:
    """Two writings of one range, by hand: the declaration and the text that users read."""
    _, sections = vocabulary.split(inspect.getdoc(op.function) or "")
    entries = vocabulary.entries(sections["Args"])
    for name, range_ in op.ranges.items():
        if isinstance(range_, Number):
            declared = {
                key: getattr(range_, key)
                for key in ("above", "at_least", "below", "at_most")
                if getattr(range_, key) is not None
            }
            assert said(" ".join(entries[name].split())) == declared, (op.name, name)


@by_declaration
def test_the_docstring_is_whole(op: Declared, case: Case) -> None:
    _, sections = vocabulary.split(inspect.getdoc(op.function) or "")
    assert list(vocabulary.entries(sections["Args"])) == list(
        inspect.signature(op.function).parameters
    )
    for section in ("Returns", "Raises", "Examples", "Reference"):
        assert sections[section].strip(), section


def test_a_head_that_is_not_compiled_is_named() -> None:
    rows = torch.zeros(2)
    with pytest.raises(
        NotImplementedError, match=r"got 'reward\.none'\. Add it to Heads in csrc/reward/heads\.hpp"
    ):
        pointwise.run("op", "reward.none", {"a": rows}, {}, (), "mean", "cpu", lambda a: a)
