# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the elementary functions over the whole float32 range, at every instruction set.

The error is |ours - truth| in units in the last place (ulp) of the truth rounded to float32; below the
smallest normal number one ulp is 2^-149. The bounds are the largest error over all 2^32 bit patterns
(the slow test), rounded up; docs/numerics.md shows both.
"""

from __future__ import annotations

from dataclasses import dataclass

import mpmath
import numpy as np
import pytest
from hotloop import core
from hotloop.reference import core as reference

LEAST_NORMAL = 2.0**-126
EDGE = float(np.log(LEAST_NORMAL))  # -87.34: e^x is below the smallest normal number


@dataclass(frozen=True)
class Row:
    max_ulp: float
    domain: tuple[float, float] = (-np.inf, np.inf)
    flush: float | None = None
    """Below this argument the result is exactly 0 and the error at most the smallest normal number."""


BOUNDS = {
    "exp": Row(1.05),
    "exp_weight": Row(1.05, (-np.inf, 0.0), EDGE),
    "expm1": Row(1.55),
    "log": Row(0.85),
    "log1p": Row(1.45),
    "sigmoid": Row(2.85, flush=EDGE),
    "softplus": Row(3.6, flush=EDGE),
    "tanh": Row(2.55),
    "log1mexp": Row(2.35),
}
# Each with 100000 neighbours on both sides: zero, one, the two branches of log1mexp, overflow, the smallest
# normal and subnormal results, the ends of log's mantissa, and where softplus and tanh become straight.
DENSE = (
    0.0, -0.0, 1.0, -1.0, np.log(2), -np.log(2), 88.7228394, 88.7228318, EDGE, -103.972084, 0.5**0.5, 2**0.5,
    9.01, -9.01, 16.6, -16.6, LEAST_NORMAL, -LEAST_NORMAL, np.inf, -np.inf,
)  # fmt: skip


def test_every_function_has_a_bound() -> None:
    assert set(BOUNDS) == set(core.FUNCTIONS)


def neighbours(value: float, count: int) -> np.ndarray:
    at = int(np.float32(value).view(np.uint32))
    return np.clip(at + np.arange(-count, count), 0, 2**32 - 1).astype(np.uint32)


def sample() -> np.ndarray:
    every = np.arange(0, 2**32, 257 * 3, dtype=np.uint64).astype(np.uint32)
    return np.concatenate([every, *(neighbours(v, 100_000) for v in DENSE)]).view(np.float32)


SAMPLE = sample()


def inside(name: str, x: np.ndarray) -> np.ndarray:
    low, high = BOUNDS[name].domain
    return x if (low, high) == (-np.inf, np.inf) else x[~((x < low) | (x > high))]


def truth(name: str, x: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(reference.elementary(name, x.astype(np.float64)))


def worst_ulp(name: str, x: np.ndarray, true: np.ndarray) -> float:
    """Check special values and flushed results, and return the largest error of the others."""
    with np.errstate(all="ignore"):
        ours, rounded = core.elementary(name, x), true.astype(np.float32)
    assert np.array_equal(np.isnan(ours), np.isnan(rounded))
    infinite = np.isinf(ours) | np.isinf(rounded)
    assert np.array_equal(ours[infinite], rounded[infinite]), x[infinite][:5]
    use = np.isfinite(rounded)
    flush = BOUNDS[name].flush
    if flush is not None:
        assert not ours[x < flush - 1e-4].any()
        assert (np.abs(true[x < flush + 1e-4]) <= 1.001 * LEAST_NORMAL).all()
        use &= x >= flush + 1e-5
    ulp = np.ldexp(1.0, np.maximum(np.frexp(rounded[use])[1], -125) - 24)
    return float((np.abs(ours[use] - true[use]) / ulp).max(initial=0.0))


@pytest.mark.parametrize("name", BOUNDS)
def test_ulp_of_every_771st_number_and_around_the_edges(name: str, native: object) -> None:
    x = inside(name, SAMPLE)
    true = truth(name, x)
    for level, runs in native.simd_levels().items():
        if runs:
            native.force_simd_level(level)
            assert worst_ulp(name, x, true) <= BOUNDS[name].max_ulp, level


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", BOUNDS)
def test_ulp_of_every_float32(name: str, native: object) -> None:
    worst = dict.fromkeys((k for k, runs in native.simd_levels().items() if runs), 0.0)
    step = 1 << 22
    for first in range(0, 2**32, step):
        x = inside(
            name, np.arange(first, first + step, dtype=np.uint64).astype(np.uint32).view(np.float32)
        )
        true = truth(name, x)
        for level in worst:
            native.force_simd_level(level)
            worst[level] = max(worst[level], worst_ulp(name, x, true))
    print(name, {level: round(error, 3) for level, error in worst.items()})
    assert max(worst.values()) <= BOUNDS[name].max_ulp, worst


ZERO, ONE, INF, NAN = 0.0, 1.0, np.inf, np.nan
SPECIAL = {  # x: 0, -0, inf, -inf, NaN, -1, 1e-40 (subnormal)
    "exp": (ONE, ONE, INF, ZERO, NAN, np.exp(-1), ONE),
    "exp_weight": (ONE, ONE, None, ZERO, NAN, np.exp(-1), None),
    "expm1": (ZERO, ZERO, INF, -ONE, NAN, np.expm1(-1), 1e-40),
    "log": (-INF, -INF, INF, NAN, NAN, NAN, np.log(1e-40)),
    "log1p": (ZERO, ZERO, INF, NAN, NAN, -INF, 1e-40),
    "sigmoid": (0.5, 0.5, ONE, ZERO, NAN, 1 / (1 + np.e), 0.5),
    "softplus": (np.log(2), np.log(2), INF, ZERO, NAN, np.log1p(np.exp(-1)), np.log(2)),
    "tanh": (ZERO, -ZERO, ONE, -ONE, NAN, np.tanh(-1), 1e-40),
    "log1mexp": (-INF, -INF, NAN, ZERO, NAN, np.log1p(-np.exp(-1)), NAN),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", BOUNDS)
def test_special_values(name: str, dtype: type, level: str) -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -1.0, 1e-40], dtype)
    found = core.elementary(name, x)
    for value, ours, expected in zip(x, found, SPECIAL[name]):
        if expected is not None:
            expected = value if expected == 1e-40 else expected  # as float32 has it
            np.testing.assert_allclose(ours, expected, rtol=1e-6, err_msg=f"{name}({value})")


def test_tanh_is_odd_to_the_last_bit(level: str) -> None:
    x = np.concatenate(
        [np.array([0.0], np.float32), np.geomspace(1e-30, 20, 4001, dtype=np.float32)]
    )
    y, z = core.elementary("tanh", x), core.elementary("tanh", -x)
    assert np.array_equal(y.view(np.uint32) ^ np.uint32(1 << 31), z.view(np.uint32))


def of_mpmath(name: str, x: float) -> mpmath.mpf:
    v = mpmath.mpf(x)
    forms = {
        "exp": mpmath.exp,
        "exp_weight": mpmath.exp,
        "expm1": mpmath.expm1,
        "log": mpmath.log,
        "log1p": mpmath.log1p,
        "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)),
        "softplus": lambda v: mpmath.log1p(mpmath.exp(v)),
        "tanh": mpmath.tanh,
        "log1mexp": lambda v: mpmath.log1p(-mpmath.exp(v)),
    }
    return forms[name](v)


RANGES = {
    "log": (1e-300, 1e300),
    "log1p": (-0.999, 1e6),
    "log1mexp": (-600.0, -1e-12),
    "exp_weight": (-600.0, 0.0),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_float64_against_mpmath(name: str) -> None:
    """Libm, and what is built on it: a few units of the last place of float64."""
    low, high = RANGES.get(name, (-600.0, 600.0))
    g = np.random.default_rng(0)
    x = np.concatenate(
        [g.uniform(max(low, -30.0), min(high, 30.0), 300), g.uniform(low, high, 300)]
    )
    x = np.concatenate(
        [x, np.array([v for v in (1e-9, -1e-9, 1e-3, -0.69, -0.7) if low <= v <= high])]
    )
    ours = core.elementary(name, x)
    with mpmath.workdps(60):
        for value, y in zip(x.tolist(), ours.tolist()):
            true = of_mpmath(name, value)
            assert abs(mpmath.mpf(y) - true) <= 4 * np.spacing(abs(float(true))), (value, y)


def test_the_reference_is_right_where_the_float32_tests_use_it() -> None:
    """The truth of the ulp tests is float64 NumPy; this compares that with 60 digits."""
    g = np.random.default_rng(1)
    bits = g.integers(0, 2**32, 300, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = np.concatenate([bits, g.uniform(-100, 90, 300).astype(np.float32)])
    with mpmath.workdps(60):
        for name in BOUNDS:
            for value, y in zip(x.tolist(), truth(name, x).tolist()):
                outside = (
                    value != value
                    or (name in ("log",) and value <= 0)
                    or (name == "log1p" and value <= -1)
                )
                if outside or (name == "log1mexp" and value >= 0) or abs(value) > 700:
                    continue
                true = of_mpmath(name, value)
                assert abs(mpmath.mpf(y) - true) <= 4 * np.spacing(abs(float(true))), (name, value)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (7, 5), (16385,)])
def test_shapes(shape: tuple[int, ...]) -> None:
    """(): a scalar. 0: nothing to do. 1. (3, 0, 2): empty in the middle. 16385: one more than a thread's share."""
    x = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    y = core.elementary("exp", x)
    assert y.shape == shape
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, np.exp(x), rtol=2e-7)


def test_strided_and_reversed_arrays() -> None:
    x = np.linspace(-2, 2, 30, dtype=np.float32).reshape(5, 6)
    for view in (x[::2, ::-1], x.T, x[:, 3]):
        np.testing.assert_allclose(core.elementary("exp", view), np.exp(view), rtol=2e-7)


def test_errors_of_elementary() -> None:
    with pytest.raises(ValueError, match=r"\[elementary\] name: expected one of exp, .*got 'sin'"):
        core.elementary("sin", np.zeros(1, np.float32))
    with pytest.raises(
        TypeError, match=r"\[elementary\] x: expected dtype float32 or float64, got int64"
    ):
        core.elementary("exp", np.zeros(1, np.int64))
