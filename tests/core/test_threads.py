# SPDX-License-Identifier: Apache-2.0
"""Threads: one OpenMP runtime, torch's number of threads, and results that do not depend on it."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import with_threads
from hotloop import core
from processes import printed
from test_simd import KERNELS


@pytest.mark.parametrize("count", [1, 2])
def test_torch_says_how_many(count: int, native: ModuleType) -> None:
    torch.set_num_threads(count)
    assert native.max_threads() == count


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_and_two_threads_give_the_same_bits(kernel: str, native: ModuleType) -> None:
    """301 rows, 20,167 pairs and 60,200 numbers: enough for a second thread, with tails."""
    one, two = (
        with_threads(k, lambda: KERNELS[kernel](native, torch.float32, 301)) for k in (1, 2)
    )
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_philox_with_two_threads() -> None:
    one, two = (with_threads(k, lambda: core.philox(1, 9001)) for k in (1, 2))
    assert np.array_equal(one, two)


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
