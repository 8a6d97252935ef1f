# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding as a distribution, int8 rows, and the settings of the rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hotloop import table
from hotloop.front import impl as _impl
from hotloop.front import native
from table_cases import CASES, Case, by_case, inputs
from torch import Tensor

# A row of several groups of 64 draws; 200 rows of it make 60200 draws.
ROWS, DIM = 200, 301
HALVES = (torch.float16, torch.bfloat16)


def rounded(
    x: float, dtype: torch.dtype, seed: int | None, rows: int = ROWS, impl: str = "cpu"
) -> Tensor:
    """x, stored by a step of SGD from 0."""
    w = torch.zeros(rows, DIM, dtype=dtype)
    table.sparse_sgd_update(w, torch.full((rows, DIM), -x), lr=1.0, rounding_seed=seed, impl=impl)
    return w


def deviation(ups: int, n: int, p: float) -> float:
    return (ups - n * p) / math.sqrt(n * p * (1 - p))


# In a binade's middle, next to both its ends, negative, and below the normal numbers of float16.
POINTS = [
    (torch.bfloat16, 1.0, 2.0**-7),
    (torch.bfloat16, -3.0, 2.0**-6),
    (torch.bfloat16, 1.0 - 2.0**-8, 2.0**-8),
    (torch.bfloat16, 2.0**-130, 2.0**-133),
    (torch.float16, 1.0, 2.0**-10),
    (torch.float16, -1000.0, 0.5),
    (torch.float16, 2.0**-14, 2.0**-24),
    (torch.float16, 2.0**-14 - 2.0**-24, 2.0**-24),
    (torch.float16, -3 * 2.0**-24, 2.0**-24),
    (torch.float16, 0.0, 2.0**-24),
]


@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.90625])
@pytest.mark.parametrize(("dtype", "low", "unit"), POINTS, ids=str)
def test_halves_round_up_as_often_as_they_should(
    dtype: torch.dtype, low: float, unit: float, fraction: float
) -> None:
    away = -1.0 if low < 0 else 1.0
    x = low + away * unit * fraction
    assert float(np.float32(x)) == x
    w = rounded(x, dtype, seed=11).double()
    up = w == low + away * unit
    assert bool((up | (w == low)).all())
    # Five standard deviations: one false alarm in 1.7 million.
    assert abs(deviation(int(up.sum()), up.numel(), fraction)) < 5
    # The control: rounding to nearest even, judged the same way.
    nearest = rounded(x, dtype, seed=None).double() == low + away * unit
    assert abs(deviation(int(nearest.sum()), nearest.numel(), fraction)) > 50


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_draws_are_independent_of_their_neighbours(dtype: torch.dtype) -> None:
    unit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    up = (rounded(1.0 + unit / 2, dtype, seed=3) != 1.0).double()
    pairs = {
        "next element": (up[:, 1:], up[:, :-1]),
        "other half of the word": (up[:, 32:64], up[:, :32]),
        "other word of the block": (up[:, 8:], up[:, :-8]),
        "next group": (up[:, 64:], up[:, :-64]),
        "next row": (up[1:], up[:-1]),
    }
    for what, (a, b) in pairs.items():
        together = int((a * b).sum())
        assert abs(deviation(together, a.numel(), 0.25)) < 5, what
    # The control: the same draw twice.
    assert deviation(int((up * up).sum()), up.numel(), 0.25) > 50


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_seed_gives_the_same_weights_on_every_path(dtype: torch.dtype, level: str) -> None:
    x = (
        torch.randn(5, DIM, generator=torch.Generator().manual_seed(0))
        * 10 ** torch.linspace(-9, 4, 5)[:, None]
    )

    def stored(impl: str, seed: int) -> Tensor:
        w = torch.zeros(5, DIM, dtype=dtype)
        table.sparse_sgd_update(w, -x, lr=1.0, rounding_seed=seed, impl=impl)
        return w

    big = 2**64 - 1
    assert torch.equal(stored("cpu", big), stored("reference", big))
    assert torch.equal(stored("cpu", 5), stored("reference", 5))
    assert not torch.equal(stored("cpu", 5), stored("cpu", 6))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_the_type_holds_is_not_rounded(dtype: torch.dtype) -> None:
    inf = math.inf
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, inf, -inf, math.nan, 2.0**-24, 2.0**-14])
    for impl in ("cpu", "reference"):
        w = torch.zeros(1, 9, dtype=dtype)
        table.sparse_sgd_update(w, -values[None], lr=1.0, rounding_seed=1, impl=impl)
        torch.testing.assert_close(w[0].float(), values, rtol=0, atol=0, equal_nan=True)
    if dtype == torch.float16:
        assert bool((rounded(65503.0 + 30, dtype, seed=0, rows=2).abs() >= 65472).all())
        assert bool(rounded(1e6, dtype, seed=0, rows=1).isinf().all())


def test_float32_weights_take_no_draws() -> None:
    for case in CASES:
        weight, grads = inputs(2, 20)
        a, b = weight.clone(), weight.clone()
        case.call(a, grads[0], case.state(2, 20), rounding_seed=9, impl="cpu")
        case.call(b, grads[0], case.state(2, 20), impl="cpu")
        assert torch.equal(a, b)


def test_small_steps_are_not_lost() -> None:
    """What stochastic rounding is for: 1000 steps of 1e-5 from 1 in bfloat16, whose unit there is 4e-3 or 8e-3."""
    nearest, random = (
        torch.ones(64, 64, dtype=torch.bfloat16),
        torch.ones(64, 64, dtype=torch.bfloat16),
    )
    g = torch.full((64, 64), 1e-5)
    for step in range(1000):
        table.sparse_sgd_update(nearest, g, lr=1.0)
        table.sparse_sgd_update(random, g, lr=1.0, rounding_seed=step)
    assert bool((nearest == 1).all())
    # The mean of 4096 walks of standard deviation sqrt(1000 * 1e-5 * 4e-3) = 6e-3 each.
    assert abs(float(random.double().mean()) - 0.99) < 5 * 7e-3 / 64


# -- int8 rows -----------------------------------------------------------------------------------------


def nearest_away(x: np.ndarray, value_range: float) -> np.ndarray:
    q = x.astype(np.float64) / (value_range / 128)
    with np.errstate(invalid="ignore"):
        r = np.sign(q) * np.floor(np.abs(q) + 0.5)
    return np.nan_to_num(r, nan=0.0).clip(-128, 127).astype(np.int8)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("value_range", [1.0, 0.25, 16.0])
def test_int8_rounds_half_away_from_zero(impl: str, value_range: float, level: str) -> None:
    step = value_range / 128
    ties = (np.arange(-300, 300) + 0.5) * step / 1.0
    x = np.concatenate(
        [ties, np.nextafter(ties.astype(np.float32), 0), np.nextafter(ties.astype(np.float32), 99)]
    )
    special = [
        0.0,
        -0.0,
        np.nan,
        np.inf,
        -np.inf,
        1e30,
        -1e30,
        1e-45,
        0.49999997 * step,
        -0.49999997 * step,
    ]
    x = np.concatenate([x, special]).astype(np.float32)
    q = table.serving_row_quantize(x, value_range=value_range, impl=impl)
    assert _impl.last_impl("serving_row_quantize") == impl
    assert q.dtype == np.int8
    assert np.array_equal(q, nearest_away(x, value_range))  # powers of two: the division is exact


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    "shape", [(0, 5), (3, 0), (1, 1), (2, 13), (5, 63), (5, 64), (5, 65), (67,)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_int8_error_and_idempotence(impl: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    r = 0.7
    x = (torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 2 - 1).to(dtype) * (
        r - r / 64
    )
    q = table.serving_row_quantize(x, value_range=r, impl=impl)
    y = table.serving_row_dequantize(q, value_range=r, impl=impl)
    assert q.shape == y.shape == x.shape
    assert (q.dtype, y.dtype) == (torch.int8, torch.float32)
    assert bool(((y - x.float()).abs() <= r / 256 * (1 + 1e-6)).all())
    assert torch.equal(table.serving_row_quantize(y, value_range=r, impl=impl), q)
    for other in (dtype, torch.float64):
        name = str(other).removeprefix("torch.")
        z = table.serving_row_dequantize(q, value_range=r, dtype=name)
        assert z.dtype == other
        # Half types: one rounding of the float32 value. float64: its own step.
        torch.testing.assert_close(z.double(), y.to(other).double(), rtol=1e-7, atol=0)


def test_int8_paths_agree_and_strides_do_not_matter() -> None:
    x = torch.randn(9, 131, generator=torch.Generator().manual_seed(4))
    q = table.serving_row_quantize(x, value_range=3.0, impl="reference")
    wide = torch.zeros(9, 262)
    wide[:, ::2] = x
    for view in (x, wide[:, ::2], x.t().contiguous().t(), x.numpy()):
        ours = table.serving_row_quantize(view, value_range=3.0, impl="cpu")
        assert torch.equal(torch.as_tensor(ours), q)
    assert torch.equal(
        table.serving_row_dequantize(q.t().contiguous().t(), value_range=3.0, impl="cpu"),
        table.serving_row_dequantize(q, value_range=3.0, impl="reference"),
    )


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_half_rows_are_the_librarys_conversion(impl: str) -> None:
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(5))
    for dtype in HALVES:
        name = str(dtype).removeprefix("torch.")
        q = table.serving_row_quantize(x, mode=name, impl=impl)
        assert q.dtype == dtype
        assert torch.equal(q, x.to(dtype))
        assert torch.equal(table.serving_row_dequantize(q, impl=impl), q.float())
    q = table.serving_row_quantize(np.array([1e6, 0.1]), mode="float16", impl=impl)
    assert q.dtype == np.float16
    assert np.isinf(q[0])


# -- settings ------------------------------------------------------------------------------------------


@by_case
def test_layouts_and_first_states(case: Case) -> None:
    rule, wanted = case.rule, case.state(3, 7)
    scalars, vectors = native.core.table.state_shape(rule._rule())  # as the compiled loops have it
    assert list(rule.state_layout(7).values()) == [1] * scalars + [7] * vectors
    per_element = [name for name in case.columns if name not in case.scalars]
    assert list(rule.state_layout(7)) == [*case.scalars, *per_element]
    state = rule.init_state(3, 7, like=torch.zeros(1))
    assert state.keys() == wanted.keys() == rule.init_state(3, 7).keys()
    for name, x in state.items():
        assert x.dtype == torch.float32 and torch.equal(x, wanted[name])
    assert all(x.dtype == np.float64 for x in rule.init_state(3, 7, like=np.zeros(1)).values())


def test_settings_are_frozen_and_equal_by_value() -> None:
    rule = table.Adam(lr=0.1, betas=[0.8, 0.9])
    assert rule == table.Adam(lr=0.1, betas=(0.8, 0.9))
    assert hash(rule) == hash(table.Adam(lr=0.1, betas=(0.8, 0.9)))
    with pytest.raises(AttributeError):
        rule.lr = 0.2
    with pytest.raises(TypeError):
        table.Adam(0.1)
