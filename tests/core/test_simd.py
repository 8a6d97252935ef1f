# SPDX-License-Identifier: Apache-2.0
"""Instruction sets: the forced one is the one that runs, and all of them agree."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
from fixtures import LEVELS
from hotloop.core.pointwise_loop import handles
from processes import python

V = 1031  # a chunk of 1024 columns and a tail that is no multiple of a vector
PLAIN = (1.0, 0.0, 1.0)
CAPPED = (1.3, 5.0, 0.7)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def map_all(native: ModuleType, dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    x = normal(200 * n).to(dtype).float().abs() + 1e-3
    out = []
    for name in native.map_names():
        y = torch.empty_like(x)
        native.map(
            name,
            x.clamp(max=1) if "exp2" in name else x if name == "log" else -x.clamp(max=0.99),
            y,
        )
        out.append(y)
    return out


def pointwise(native: ModuleType, dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    rows = 67 * n
    inputs = [normal(rows, seed=k, dtype=dtype) for k in range(4)]
    loss, grads = torch.empty(rows), [torch.empty(rows) for _ in range(2)]
    total = native.pointwise.run(
        handles("cpu")["preference.dpo"], rows, inputs, [0.1], loss, grads, 1.0, True, False
    )
    return [loss, *grads, torch.tensor([total])]


def row_statistics(native: ModuleType, dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    out = []
    for logit in (PLAIN, CAPPED):
        sums = torch.zeros(6, n)
        sums[0] = -torch.inf
        largest = torch.zeros(n, dtype=torch.int64)
        labels = torch.arange(n)
        native.logprob.row_statistics(
            normal(n, V, dtype=dtype), normal(V, seed=1), labels, 0, logit, True, sums, largest
        )
        out += [sums, largest]
    return out


def row_gradient(native: ModuleType, dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    out = []
    for logit in (PLAIN, CAPPED):
        tile = normal(n, V, dtype=dtype)
        coefficients = normal(6, n, seed=2)
        coefficients[0] += 8
        native.logprob.row_gradient(
            tile, normal(V, seed=1), torch.arange(n), 0, logit, coefficients
        )
        out.append(tile)
    return out


def divergence(native: ModuleType, dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    student, teacher = normal(n, V, dtype=dtype), normal(n, V, seed=3, dtype=dtype)
    sums = torch.zeros(8, n)
    sums[0] = sums[3] = -torch.inf
    empty = (None, None, PLAIN, PLAIN, 0.3)
    native.logprob.divergence("statistics", student, teacher, *empty, sums, None, None)
    coefficients = normal(7, n, seed=4).abs()
    coefficients[0], coefficients[1] = sums[0] + sums[1].log(), sums[3] + sums[4].log()
    mixture = torch.zeros(2, n)
    native.logprob.divergence("mixture", student, teacher, *empty, None, coefficients, mixture)
    native.logprob.divergence("gradient", student, teacher, *empty, None, coefficients, mixture)
    return [sums, mixture, student]


def log_cosh(native: ModuleType, dtype: torch.dtype, n: int) -> list[torch.Tensor]:
    student, sums = normal(n, V, dtype=dtype), torch.zeros(n)
    teacher = normal(n, V, seed=3, dtype=dtype)
    native.logprob.log_cosh(student, teacher, None, None, PLAIN, CAPPED, sums, torch.ones(n))
    return [sums, student]


KERNELS: dict[str, Callable[[ModuleType, torch.dtype, int], list[torch.Tensor]]] = {
    f.__name__: f for f in (map_all, pointwise, row_statistics, row_gradient, divergence, log_cosh)
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_levels_agree_and_the_forced_one_runs(
    kernel: str, dtype: torch.dtype, native: ModuleType
) -> None:
    found = {}
    for level in LEVELS:
        native.force_simd_level(level)
        assert native.simd_level() == level
        other = next((x for x in LEVELS if x != level), level)
        native.force_simd_level(other)
        native.map("exp", np.zeros(1), np.zeros(1))
        native.force_simd_level(level)
        found[level] = KERNELS[kernel](native, dtype, 5)
        assert native.last_simd_level() == level
    # Other orders of summation and fused multiply-adds: a few units in the last place of the largest terms.
    tolerance = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for level in LEVELS[1:]:
        for a, b in zip(found[LEVELS[0]], found[level]):
            scale = float(b.double().abs().max())
            torch.testing.assert_close(
                a.double(), b.double(), rtol=tolerance, atol=tolerance * scale
            )


def test_the_widest_runnable_level_is_the_default(native: ModuleType) -> None:
    assert native.simd_level() == os.environ.get("HOTLOOP_SIMD", LEVELS[-1])
    native.force_simd_level("baseline")
    native.force_simd_level("auto")
    assert native.simd_level() == os.environ.get("HOTLOOP_SIMD", LEVELS[-1])


def test_unknown_level(native: ModuleType) -> None:
    with pytest.raises(
        ValueError, match=r"\[simd\] level: expected auto, baseline, avx2 or avx512, got sse9"
    ):
        native.force_simd_level("sse9")
    assert native.simd_level() in LEVELS


@pytest.mark.parametrize("level", [*LEVELS, "auto", "sse9"])
def test_environment_variable(level: str) -> None:
    code = (
        "import numpy as np\nfrom hotloop import core\nfrom hotloop.front import native as _native\n"
        "core.elementary('exp', np.zeros(1, np.float32))\nprint(_native.core.last_simd_level())"
    )
    result = python("-c", code, HOTLOOP_SIMD=level)
    if level == "sse9":
        assert result.returncode != 0
        assert "[simd] level: expected auto, baseline, avx2 or avx512, got sse9" in result.stderr
    else:
        assert result.stdout.strip() == (LEVELS[-1] if level == "auto" else level), result.stderr
