# SPDX-License-Identifier: Apache-2.0
"""What the catalogue says compiles does: whole, static and dynamic, numbers at their defaults and said out loud.

The operators that stand in the graphs are those that torch's own opcheck takes for right.
"""

from __future__ import annotations

import shutil
from typing import Any

import hotloop
import pointwise_cases
import pytest
import torch
from catalog_cases import Arguments, Call, calls, calls_of
from processes import printed
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


def assert_compiles(op: Any, call: Call, dynamic: bool, backend: str = "aot_eager") -> None:
    torch.compiler.reset()
    compiled = torch.compile(call.function, fullgraph=True, backend=backend, dynamic=dynamic)
    rounds: list[tuple[int, Arguments]] = [(4, {}), (6 if dynamic else 0, {})]
    if dynamic:  # as arguments, numbers are symbols too
        rounds.append((6, call.numbers(6)))
    for n, numbers in rounds:
        found, expected = (
            step(run, op, {**call.arguments(n), **numbers}) for run in (compiled, call.function)
        )
        none = n == 0  # whose mean is NaN
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6, equal_nan=none)


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
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)


FIRST_CALL = """
import hotloop, sys, torch
from torch.utils.checkpoint import checkpoint
rows, labels = torch.randn(4, 8, requires_grad=True), torch.tensor([0, 7, -100, 3])
column = rows[:, 0].detach()
run = {
    "token_logprob": lambda x: hotloop.logprob.token_logprob(x, labels).logps,
    "bt_reward_loss": lambda x: hotloop.reward.bt_reward_loss(x[:, 0], column, margin=labels > 0),
    "segment_sum": lambda x: hotloop.core.segment_sum(x, torch.tensor([0, 1, 4])),
}[sys.argv[1]]
again = lambda x: checkpoint(run, x, use_reentrant=False)
torch.compile(again, fullgraph=True, backend="aot_eager")(rows).sum().backward()
print(bool(rows.grad.abs().sum() > 0))
"""


@pytest.mark.parametrize("op", ["token_logprob", "bt_reward_loss", "segment_sum"])
def test_the_first_call_of_a_process_compiles_inside_a_checkpoint(op: str) -> None:
    """What a call writes down once, an eager call before it has written in the tests above."""
    assert printed(FIRST_CALL, op) == "True\n"


@pytest.mark.slow
@pytest.mark.parametrize(("op", "call"), OTHERS, ids=[call.id for _, call in OTHERS])
def test_every_other_way_through_a_front_door_compiles(op: Any, call: Call) -> None:
    assert_compiles(op, call, dynamic=True)


INDUCTOR = {
    "preference": ("dpo", "kto-rows", "rpo_sft-average"),
    "logprob": ("linear_logprob",),
    "core": ("segment_sum", "segment_max", "segment_logsumexp"),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", [f"{room}.{id}" for room, ids in INDUCTOR.items() for id in ids])
def test_inductor_equals_eager(name: str) -> None:
    op, call = next((op, call) for op, call in FOUND if f"{op.room}.{call.id}" == name)
    assert_compiles(op, call, False, "inductor")


# -- the registered operators --------------------------------------------------------------------------------


class Noted(torch.fx.Interpreter):
    """Runs a graph and notes the operators of ours in it, with what they are called with."""

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__(graph)
        self.calls: list[tuple[Any, Any, Any]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if str(target).startswith("hotloop."):
            operator = getattr(target, "default", target)
            self.calls.append((operator, *pytree.tree_map(detached, (args, kwargs))))
        return super().call_function(target, args, kwargs)


def detached(x: Any) -> Any:
    """A leaf with the same values, but for NaN, which opcheck takes for unequal."""
    if not isinstance(x, Tensor):
        return x
    kept = x.detach().clone(memory_format=torch.contiguous_format)
    if x.is_floating_point():
        kept[kept.isnan()] = 0.0
    return kept.requires_grad_(x.requires_grad)


def operators(function: Any, arguments: Arguments) -> list[tuple[Any, Any, Any]]:
    """The operators that a compiled call runs, each with its arguments."""
    noted: list[Noted] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        noted.append(Noted(graph))
        return noted[-1].run

    torch.compiler.reset()
    torch.compile(function, fullgraph=True, backend=backend)(**arguments)
    return [call for graph in noted for call in graph.calls]


def wide(x: Any) -> Any:
    floating = isinstance(x, Tensor) and x.is_floating_point()
    return x.detach().double().requires_grad_(x.requires_grad) if floating else x


# A few losses stand for all of the pointwise loop: to their one operator a head is a string.
LOSSES = {case.op for case in pointwise_cases.CASES} - {
    "dpo_loss",
    "srpo_loss",
    "orpo_loss",
    "npo_loss",
}
CHECKED = [(op, call) for op, call in FIRST if op.name not in LOSSES]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("op", "call"), CHECKED, ids=[op.full_name for op, _ in CHECKED])
def test_opcheck(op: Any, call: Call) -> None:
    """With a few rows; in float64 with none, or one where the mean of none is NaN."""
    for n, convert in ((5, detached), (int("loss" in op.name), wide)):
        found = operators(call.function, call.arguments(n))
        assert found or op.impls == ("reference",)
        for operator, args, kwargs in found:
            args, kwargs = pytree.tree_map(convert, (args, kwargs))
            torch.library.opcheck(operator, args, kwargs)
