"""Threads: one OpenMP runtime, torch's number of threads, and results that do not depend on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import with_threads
from hotloop import core
from hotloop.core.pointwise_loop import handles
from processes import printed


@pytest.mark.parametrize("count", [1, 2])
def test_torch_says_how_many(count: int, native: ModuleType) -> None:
    torch.set_num_threads(count)
    assert native.max_threads() == count


def statistics(native: ModuleType) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    tile = 3 * torch.randn(301, 513, generator=g)
    sums = torch.zeros(6, 301)
    sums[0] = -torch.inf
    labels = torch.arange(301)
    native.logprob.row_statistics(tile, None, labels, 0, (1.0, 0.0, 1.0), True, sums, None)
    return sums


def gradient(native: ModuleType) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    tile = 3 * torch.randn(301, 513, generator=g)
    native.logprob.row_gradient(
        tile, None, torch.arange(301), 0, (1.0, 0.0, 1.0), torch.randn(6, 301, generator=g) + 9
    )
    return tile


def divergence(native: ModuleType) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 301, 513, generator=g)
    sums = torch.zeros(8, 301)
    sums[0] = sums[3] = -torch.inf
    plain = (1.0, 0.0, 1.0)
    native.logprob.divergence(
        "statistics", student, teacher, None, None, plain, plain, 0.5, sums, None, None
    )
    return sums


def pairs(native: ModuleType) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    n = 20_011
    inputs = list(torch.randn(4, n, generator=g))
    out = torch.empty(3, n)
    total = native.pointwise.run(
        handles("cpu")["preference.dpo"],
        n,
        inputs,
        [0.1],
        out[0],
        [out[1], out[2]],
        1.0,
        True,
        False,
    )
    return torch.cat((out.flatten().double(), torch.tensor([total])))


@pytest.mark.parametrize("call", [statistics, gradient, divergence, pairs])
def test_one_and_two_threads_give_the_same_bits(
    call: Callable[[ModuleType], torch.Tensor], native: ModuleType
) -> None:
    one, two = (with_threads(k, lambda: call(native)) for k in (1, 2))
    assert torch.equal(one, two)


def test_philox_and_map_with_two_threads() -> None:
    x = np.linspace(-5, 5, 40_000, dtype=np.float32)
    torch.set_num_threads(1)
    one = core.elementary("exp", x), core.philox(1, 9001)
    torch.set_num_threads(2)
    two = core.elementary("exp", x), core.philox(1, 9001)
    assert all(np.array_equal(a, b) for a, b in zip(one, two))


MAPPED = """
from hotloop.front import native as _native
import numpy as np
x = np.zeros(100_000, np.float32)
_native.core.map("exp", x, x)
torch.randn(1000, 1000).exp().sum()
names = set()
for line in open("/proc/self/maps"):
    path = line.split()[-1]
    stem = path.rsplit("/", 1)[-1]
    if stem.startswith(("libgomp", "libiomp", "libomp")):
        names.add(path)
print(sorted(names))
torch.set_num_threads(1)
assert _native.core.max_threads() == 1
torch.set_num_threads(2)
assert _native.core.max_threads() == 2
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize(
    "imports",
    [
        "import torch, hotloop",
        "import hotloop; hotloop.core.philox(0, 1); import torch",
        "import hotloop.logprob, torch",
    ],
    ids=["torch first", "hotloop first", "a room first"],
)
def test_one_openmp_runtime_in_the_process(imports: str) -> None:
    assert len(eval(printed(imports + MAPPED))) == 1


def test_exceptions_leave_the_loop(native: ModuleType) -> None:
    """What a thread throws reaches the caller, and the next call works."""
    with pytest.raises(ValueError, match="float32 or float64"):
        native.map("exp", np.zeros(50_000, np.int32), np.zeros(50_000, np.int32))
    native.map("exp", np.zeros(50_000), np.zeros(50_000))
