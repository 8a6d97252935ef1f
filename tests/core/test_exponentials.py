# SPDX-License-Identifier: Apache-2.0
"""The exponentials of few operations: stated error bounds, exact ends, and the polynomial's equioscillation."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from hotloop import core
from hotloop.reference import core as reference

UNIT = np.linspace(0.0, 1.0, 1_000_001)
# longdouble has 64 bits of mantissa on x86: its exponential is right to 1e-19, far below what is measured.
wide = pytest.mark.skipif(
    np.finfo(np.longdouble).nmant < 60, reason="long double is no wider than double"
)


def relative_error(y: np.ndarray, x: np.ndarray, base: float = 2.0) -> np.ndarray:
    v = x.astype(np.longdouble)
    true = np.exp2(v) if base == 2.0 else np.exp(v)
    return np.asarray(((y.astype(np.longdouble) - true) / true).astype(np.float64))


def test_exp2_evolved_at_both_ends(level: str) -> None:
    """Exact at 0. At 1 the eighth power takes steps of seven units in the last place, and 2 is not among them."""
    zero, one = core.exp2_evolved(np.array([0.0, 1.0])).tolist()
    assert zero == 1.0
    assert abs(one - 2.0) <= 2.0**-51
    assert core.exp2_evolved(np.array([0.0, 1.0], np.float32)).tolist() == [1.0, 2.0]


@wide
def test_exp2_evolved_on_a_million_points(level: str) -> None:
    assert np.abs(relative_error(core.exp2_evolved(UNIT), UNIT)).max() <= 6e-15


def test_exp2_evolved_against_mpmath() -> None:
    x = np.random.default_rng(0).random(2000)
    with mpmath.workdps(40):
        for v, y in zip(x.tolist(), core.exp2_evolved(x).tolist()):
            assert abs(mpmath.mpf(y) / mpmath.power(2, mpmath.mpf(v)) - 1) <= 6e-15


def test_exp2_evolved_in_float32_is_rounded_once() -> None:
    x = UNIT[::10].astype(np.float32)
    true = np.exp2(x.astype(np.float64))
    assert (
        np.abs(core.exp2_evolved(x) - true) <= 0.5000001 * np.spacing(true.astype(np.float32))
    ).all()


@wide
def test_the_coarse_form(level: str) -> None:
    error = np.abs(relative_error(core.exp2_evolved(UNIT, coarse=True), UNIT)).max()
    assert 8.6e-4 < error <= 8.68e-4


@wide
@pytest.mark.parametrize(("degree", "bound"), [(5, 7.5e-8), (6, 1.9e-9)])
def test_exp2_minimax_equioscillates_within_its_bound(
    degree: int, bound: float, level: str
) -> None:
    """Chebyshev: a best polynomial of degree n has n + 2 extrema of equal size and alternating sign."""
    error = relative_error(core.exp2_minimax(UNIT, degree=degree), UNIT)
    assert np.abs(error).max() <= bound
    signs = np.sign(error[np.abs(error) > 0.9 * np.abs(error).max()])
    assert np.count_nonzero(np.diff(signs)) + 1 == degree + 2


@wide
@pytest.mark.parametrize(("method", "bound"), [("evolved", 1e-14), ("minimax", 8e-8)])
def test_exp_by_exp2(method: str, bound: float, level: str) -> None:
    """The range in which the split of log 2 in two keeps its last bits: |k| * 2.1e-4 * 2^-53 is nothing."""
    x = np.linspace(-87.3, 88.7, 200_001)
    error = np.abs(relative_error(core.exp_by_exp2(x, method=method), x, np.e))
    assert error.max() <= bound + 2.0**-52 * np.abs(x).max()
    near = np.abs(x) < 1
    assert error[near].max() <= bound


def test_exp_by_exp2_in_float32(level: str) -> None:
    x = np.linspace(-87.0, 88.0, 200_001, dtype=np.float32)
    true = np.exp(x.astype(np.float64))
    for method in ("evolved", "minimax"):
        error = np.abs(core.exp_by_exp2(x, method=method) / true - 1)
        assert error.max() <= 2.5e-7, method


def test_exp_by_exp2_clamps_the_minimax_form() -> None:
    low, high = core.exp_by_exp2(np.array([-1000.0, 1000.0]))
    assert low == pytest.approx(np.exp(-87.3), rel=1e-6)
    assert high == pytest.approx(np.exp(88.7), rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_monotone_on_the_grid(dtype: type, level: str) -> None:
    """Steps of 2^-12 are far larger than any error, so order must be kept."""
    x = np.linspace(0, 1, 4097).astype(dtype)
    for y in (
        core.exp2_evolved(x), core.exp2_evolved(x, coarse=True), core.exp2_minimax(x), core.exp2_minimax(x, degree=6)
    ):  # fmt: skip
        assert (np.diff(y) > 0).all()


def test_the_references_are_numpy() -> None:
    assert np.array_equal(reference.exp2_evolved(UNIT[:9]), np.exp2(UNIT[:9]))
    assert np.array_equal(reference.exp2_minimax(UNIT[:9]), np.exp2(UNIT[:9]))
    assert np.array_equal(reference.exp_by_exp2(UNIT[:9]), np.exp(UNIT[:9]))


def test_errors() -> None:
    x = np.zeros(2)
    with pytest.raises(ValueError, match=r"\[exp2_minimax\] degree: expected 5 or 6, got 7"):
        core.exp2_minimax(x, degree=7)
    with pytest.raises(
        ValueError, match=r"\[exp_by_exp2\] method: expected minimax or evolved, got 'taylor'"
    ):
        core.exp_by_exp2(x, method="taylor")
    for name in ("exp2_evolved", "exp2_minimax", "exp_by_exp2"):
        with pytest.raises(
            TypeError, match=rf"\[{name}\] x: expected dtype float32 or float64, got float16"
        ):
            getattr(core, name)(x.astype(np.float16))
