# SPDX-License-Identifier: Apache-2.0
"""Every array argument of every op: what is not plain memory gives the right result or a TypeError, never a wrong one.

Ops come from the catalogue and calls from their docstrings (docstring_calls.py), so a new op is here by itself.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

import docstring_calls
import hostile_arrays
import numpy as np
import pytest
import torch
import torch.distributed as dist
from hotloop import catalog

# The hostile arrays themselves are what torch and NumPy warn of.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
]
OPS = {op.full_name: op for op in catalog() if not op.is_class}
# Front doors name the argument; where a view of one is refused behind them, the compiled loop names it.
HOUSE_FORM = re.compile(r"\[[\w.]+\] [\w.\[\]' ]+: expected .+, got .+", re.DOTALL)

# What is written in place must be the caller's own memory; and what starts inside an element is no array for C++.
REFUSED_TO_WRITE = re.compile(r"expected an? (writable|contiguous|aligned) array, got")


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """A group of one, for the DTensors."""
    mine = not dist.is_initialized()
    if mine:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if mine:
        dist.destroy_process_group()


def as_torch(_: Any, x: Any) -> torch.Tensor:
    return torch.from_numpy(x.copy()) if isinstance(x, np.ndarray) else x.detach().clone()


def as_numpy(_: Any, x: Any) -> np.ndarray:
    return x.copy() if isinstance(x, np.ndarray) else x.detach().numpy().copy()


def outcome(op: Any, arguments: dict[str, Any]) -> list[Any]:
    """Every array that the call gives back or wrote to, as plain tensors."""
    result = op.load()(**arguments)
    found = [x for _, x in docstring_calls.leaves((result,))]
    found += [x for _, x in docstring_calls.leaves(arguments)]
    return [plain(x) for x in found]


def plain(x: Any) -> torch.Tensor:
    """What an array holds, by torch's own means."""
    if isinstance(x, np.ndarray):
        return torch.as_tensor(x.copy())
    if torch._is_functional_tensor(x):
        torch._sync(x)
        x = torch._from_functional_tensor(x)
    x = x.detach().as_subclass(torch.Tensor)
    return torch.zeros(x.shape, dtype=x.dtype) if x._is_zerotensor() else x.resolve_neg().clone()


def same(got: list[Any], wanted: list[Any]) -> bool:
    return len(got) == len(wanted) and all(
        g.shape == w.shape and torch.allclose(g.double(), w.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
        for g, w in zip(got, wanted)
    )  # fmt: skip


def fresh(arguments: dict[str, Any], convert: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """The arguments once more: arrays copied, state (filters, generators) too."""
    plain = {
        name: copy.deepcopy(x) if hasattr(x, "load_state_dict") else x
        for name, x in arguments.items()
    }
    made: dict[str, Any] = docstring_calls.mapped(plain, convert)
    return made


def replacing(
    path: Any, convert: Callable[[Any, Any], Any], make: Callable[[Any], Any]
) -> Callable[[Any, Any], Any]:
    return lambda at, x: make(convert(at, x)) if at == path else convert(at, x)


def flat(value: Any) -> Iterator[Any]:
    """Everything inside arguments, arrays or not."""
    parts: Any = ()
    if isinstance(value, dict):
        parts = value.values()
    elif isinstance(value, (list, tuple)):
        parts = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, f.name) for f in dataclasses.fields(value)]
    yield value
    for x in parts:
        yield from flat(x)


def sweep(
    op: Any,
    convert: Callable[[Any, Any], Any],
    kinds: dict[str, Callable[[Any], Any]],
    must_be_right: bool,
) -> list[str]:
    """Replace each array in turn by each kind; a line for every wrong result, other error, or silent acceptance."""
    wrong = []
    for arguments in docstring_calls.calls(op):
        wanted = outcome(op, fresh(arguments, convert))
        for path, _ in docstring_calls.leaves(arguments):
            for kind, make in kinds.items():
                call = fresh(arguments, replacing(path, convert, make))
                if any(x is hostile_arrays.NONE for x in flat(call)):
                    continue
                where = f"{op.full_name} {path} {kind}"
                try:
                    got = outcome(op, call)
                except Exception as error:
                    if isinstance(error, ValueError) and REFUSED_TO_WRITE.search(str(error)):
                        continue
                    fits = HOUSE_FORM.match(str(error)) is not None
                    if must_be_right or not isinstance(error, TypeError) or not fits:
                        wrong.append(f"{where}: {type(error).__name__}: {str(error)[:200]}")
                else:
                    if not same(got, wanted):
                        wrong.append(f"{where}: {got} instead of {wanted}")
    return wrong


@pytest.mark.parametrize("name", OPS)
def test_views_and_plain_subclasses_are_read_right(name: str) -> None:
    assert sweep(OPS[name], as_torch, hostile_arrays.RIGHT, True) == []


@pytest.mark.parametrize("name", OPS)
def test_what_is_not_plain_memory_is_right_or_refused(name: str) -> None:
    assert sweep(OPS[name], as_torch, hostile_arrays.REFUSED, False) == []


TAKE_NUMPY = [name for name, op in OPS.items() if op.room in ("core", "decode", "table")]


@pytest.mark.parametrize("name", TAKE_NUMPY)
def test_strided_numpy_arrays_are_read_right(name: str) -> None:
    if not takes_numpy(OPS[name]):
        pytest.skip("takes torch tensors only")
    assert sweep(OPS[name], as_numpy, hostile_arrays.NUMPY_RIGHT, True) == []


@pytest.mark.parametrize("name", TAKE_NUMPY)
def test_numpy_arrays_of_another_meaning_are_right_or_refused(name: str) -> None:
    if not takes_numpy(OPS[name]):
        pytest.skip("takes torch tensors only")
    assert sweep(OPS[name], as_numpy, hostile_arrays.NUMPY_REFUSED, False) == []


def takes_numpy(op: Any) -> bool:
    return not op.gradient or op.room == "core"


def test_a_freed_storage_is_named() -> None:
    """FSDP frees the storage of its parameters between steps; torch.func has no part in it."""
    freed = torch.zeros(2, 4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(
        TypeError,
        match=r"\[sample\] law: expected a tensor in memory, got one whose storage was freed",
    ):
        OPS["decode.sample"].load()(freed, seed=0)
