# SPDX-License-Identifier: Apache-2.0
"""What the row optimizers share: checks of rows and state, the choice of an implementation, writing in place."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from ...core.rules import RowOptimizer
from ...front import arrays as _arrays
from ...front import check, native
from ...front.check import integer
from ...front.impl import Refuses, everywhere, on_cpu

CPU_DTYPES = ("float32", "float16", "bfloat16")


def _narrow(like: Any) -> str | None:
    return on_cpu(like) or f"dtype float64 (supports {', '.join(CPU_DTYPES)})"


def loops(*floats: str) -> Mapping[str, Refuses]:
    """The compiled loops for CPU arrays, if none of the dtypes is float64; else the reference."""
    return {"cpu": _narrow if "float64" in floats else on_cpu, "reference": everywhere}


def check_rows(op: str, weight: Any, grad: Any) -> None:
    """weight (U, D) to be written, grad (U, D) float32 beside it; float64 only where the weight is."""
    check.array(op, "weight", weight, _arrays.FLOATS, 2)
    check.writable(op, "weight", weight)
    wide = _arrays.dtype(weight) == "float64"
    check.array(op, "grad", grad, ("float32", "float64") if wide else ("float32",), 2)
    check.same_place(op, "grad", grad, "weight", weight)
    hint = "Pass one summed gradient per row."
    check.shape(op, "grad", grad, tuple(weight.shape), "like weight", hint)
    check.finite(op, grad=grad)


def check_state(op: str, name: str, value: Any, weight: Any, *, scalar: bool) -> None:
    """A scalar per row, (U,) or (U, 1), or a vector (U, D), float32; float64 too where the weight is."""
    wide = _arrays.dtype(weight) == "float64"
    check.array(op, name, value, ("float32", "float64") if wide else ("float32",))
    check.same_place(op, name, value, "weight", weight)
    rows, dim = map(int, weight.shape)
    wanted = ((rows,), (rows, 1)) if scalar else ((rows, dim),)
    if tuple(value.shape) not in wanted:
        shapes = " or ".join(map(str, wanted))
        raise ValueError(f"[{op}] {name}: expected shape {shapes}, got {tuple(value.shape)}.")
    check.writable(op, name, value)


def check_seed(op: str, seed: Any) -> None:
    if seed is not None:
        integer(op, "rounding_seed", seed, at_least=0, at_most=2**64 - 1)


def update(
    rule: RowOptimizer,
    weight: Any,
    grad: Any,
    state: dict[str, Any],
    *,
    rows: Any = None,
    distinct: bool = True,
    rounding_seed: int | None = None,
    step: int = 0,
) -> None:
    """Run the compiled loop. ``state`` in the order of ``rule.state_layout``; a step of all rows leaves "step" out."""
    packed = rule._rule()
    packed["stochastic_rounding"] = rounding_seed is not None
    packed["step"] = step
    columns = {name: _arrays.as_column(x) for name, x in state.items()}
    names = list(rule.state_layout(int(weight.shape[1])))
    written = [weight, *columns.values()]
    # A view that is negated lazily is written through a copy, like one whose neighbours lie apart.
    inner = [
        x.resolve_neg() if _arrays.is_torch(x) else x for x in map(_arrays.unit_stride, written)
    ]
    given = dict(zip(columns, inner[1:]))
    native.core.table.update_rows(
        packed,
        inner[0],
        _arrays.unit_stride(grad),
        [given.get(name) for name in names],
        rows,
        distinct,
        int(rounding_seed or 0),
    )
    for x, y in zip(written, inner):
        if y is not x:
            _arrays.assign(x, y)
        elif _arrays.is_torch(x):
            # The loops write past autograd, which must refuse to go back through what was overwritten.
            sys.modules["torch"].autograd.graph.increment_version(x)
