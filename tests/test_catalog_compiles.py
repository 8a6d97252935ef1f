"""What the catalogue says compiles does: whole, static and dynamic, numbers at their defaults and said out loud."""

from __future__ import annotations

from typing import Any

import hotloop
import pytest
import torch
from catalog_cases import Arguments, Call, calls, calls_of
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

FOUND = calls_of(lambda op: op.compiles)
FIRST = [(op, call) for op in hotloop.catalog() if op.compiles for call in calls(op)[:1]]
OTHERS = [pair for pair in FOUND if pair[1].id not in {call.id for _, call in FIRST}]


def test_every_op_that_compiles_has_inputs() -> None:
    functions = [op for op in hotloop.catalog() if op.compiles and not op.is_class]
    assert [op.full_name for op in functions if not calls(op)] == []


def step(run: Any, op: Any, arguments: Arguments) -> list[Tensor]:
    """The results of a call, and the gradient of every leaf of its arguments."""
    torch.manual_seed(0)  # what an op draws without a seed of its own
    out = [x for x in pytree.tree_leaves(run(**arguments)) if isinstance(x, Tensor)]
    leaves = [x for x in pytree.tree_leaves(arguments) if isinstance(x, Tensor) and x.requires_grad]
    through = [x for x in out if x.requires_grad]
    assert bool(through) == (op.gradient and bool(leaves)), "an op with a gradient returned none"
    if not through:
        return out
    total = sum((x * (1 + torch.arange(x.numel(), device=x.device).view(x.shape))).sum() for x in through)  # fmt: skip
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return out + [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found)]


def assert_compiles(op: Any, call: Call, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    rounds = [(4, {}), (6, {})]
    if dynamic:  # as arguments, numbers are symbols too
        rounds.append((6, call.numbers(6)))
    for n, numbers in rounds:
        found, expected = (
            step(run, op, {**call.arguments(n), **numbers}) for run in (compiled, call.function)
        )
        assert len(found) == len(expected)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("op", "call"), FIRST, ids=[op.full_name for op, _ in FIRST])
def test_compiles(op: Any, call: Call, dynamic: bool) -> None:
    assert_compiles(op, call, dynamic)


TRAINED = [(op, call) for op, call in FIRST if op.gradient]


@pytest.mark.parametrize(("op", "call"), TRAINED, ids=[op.full_name for op, _ in TRAINED])
def test_compiles_inside_a_checkpoint(op: Any, call: Call) -> None:
    """torch.compile lets nothing inside torch.utils.checkpoint write to what lies outside."""
    torch.compiler.reset()

    def again(**arguments: Any) -> Any:
        return checkpoint(call.function, use_reentrant=False, **arguments)

    compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
    found, expected = (step(run, op, call.arguments(4)) for run in (compiled, call.function))
    assert len(found) == len(expected)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("op", "call"), OTHERS, ids=[call.id for _, call in OTHERS])
def test_every_other_way_through_a_front_door_compiles(op: Any, call: Call) -> None:
    assert_compiles(op, call, dynamic=True)
