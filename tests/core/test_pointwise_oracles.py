# SPDX-License-Identifier: Apache-2.0
"""Every pointwise loss against its paper's formula in mpmath at 40 digits, values and gradients.

The gradients are mpmath's numerical derivatives of the formulas that rooms write (``pointwise_oracles``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hotloop
import pytest
import torch
from pointwise_cases import CASES, Case
from pointwise_oracles import Oracle, mean, mp, mpf
from rooms import of_rooms
from torch import Tensor


def of_case(case: Case) -> Oracle:
    """Three rows of a case, with the formula that it brings along."""
    grad, const = (
        {name: x.tolist() for name, x in inputs.items()}
        for inputs in case.inputs(3, torch.float64, seed=5)
    )
    options = {n: mpf(x) if type(x) is float else x for n, x in case.kwargs.items()}

    def formula(v: Any) -> Any:
        rows = (dict(zip(v, row)) for row in zip(*(v[name] for name in (*grad, *const))))
        return mean(case.formula(**row, **options) for row in rows)

    return Oracle(case.op, grad, const, case.kwargs, formula, id=case.id, room=case.room)


ORACLES = [*of_rooms("oracles", "ORACLES"), *(of_case(c) for c in CASES if c.formula is not None)]


def exact(x: Any) -> Any:
    """Nested lists of floats as numbers of 40 digits; marks stay marks."""
    if isinstance(x, list):
        return [exact(y) for y in x]
    return x if isinstance(x, bool) else mpf(x)


def flat(x: Any) -> list[Any]:
    return [z for y in x for z in flat(y)] if isinstance(x, list) else [x]


def put(x: Any, values: list[Any]) -> Any:
    """The same nesting with other numbers, which are taken from the front of ``values``."""
    return [put(y, values) for y in x] if isinstance(x, list) else values.pop(0)


def worked(case: Oracle) -> tuple[Any, dict[str, list[Any]]]:
    """Value and gradients by mpmath."""
    numbers = {name: exact(x) for name, x in {**case.grad, **case.const}.items()}
    numbers |= {f"fixed {name}": numbers[name] for name in case.detached}
    gradients = {}
    for name in case.grad:
        values = flat(numbers[name])

        def moved(x: Any, at: int, name: str = name, values: list[Any] = values) -> Any:
            other = [*values[:at], x, *values[at + 1 :]]
            return case.formula({**numbers, name: put(numbers[name], other)})

        gradients[name] = [
            mp.diff(lambda x, at=at: moved(x, at), value) for at, value in enumerate(values)
        ]
    return case.formula(numbers), gradients


def tensor(x: Any) -> Tensor:
    kind = torch.float64 if isinstance(flat(x)[0], float) else None
    return torch.tensor(x, dtype=kind)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("case", ORACLES, ids=lambda c: f"{c.room}.{c.op}-{c.id}".strip("-"))
def test_value_and_gradients_of_the_paper(case: Oracle, impl: str) -> None:
    function = getattr(getattr(hotloop, case.room), case.op)
    leaves = {name: tensor(x).requires_grad_() for name, x in case.grad.items()}
    const = {name: tensor(x) for name, x in case.const.items()}
    loss = function(**leaves, **const, **case.options, impl=impl)
    value, gradients = worked(case)
    assert float(loss.detach()) == pytest.approx(float(value), rel=1e-12, abs=1e-14)
    found = torch.autograd.grad(loss, list(leaves.values()))
    for (name, wanted), got in zip(gradients.items(), found, strict=True):
        expected = torch.tensor([float(x) for x in wanted], dtype=torch.float64)
        torch.testing.assert_close(
            got.reshape(-1),
            expected,
            rtol=1e-10,
            atol=1e-12,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_a_wrong_sign_is_found_out() -> None:
    """The comparison itself: a value with the answers swapped is not the value."""
    case = next(c for c in ORACLES if c.op == "bt_reward_loss")
    right, _ = worked(case)
    swapped = dict(zip(case.grad, reversed(case.grad.values())))
    wrong, _ = worked(replace(case, grad=swapped))
    assert abs(wrong - right) > 0.05


def test_every_loss_is_here() -> None:
    losses = {f"{case.room}.{case.op}" for case in CASES}
    assert {f"{case.room}.{case.op}" for case in ORACLES} == losses
