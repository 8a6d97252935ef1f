# SPDX-License-Identifier: Apache-2.0
"""The stable counting sort: against NumPy's and torch's stable sorts, at every range of keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import with_threads
from hotloop.core import counting_sort
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import assert_refused, refused

# One pass over the keys up to 65536; then digits, in items of 8 bytes up to 2^32, of 16 above.
RANGES = [
    1,
    2,
    7,
    256,
    2048,
    65_536,
    65_537,
    2**20,
    2**31 - 1,
    2**31,
    2**32,
    2**32 + 1,
    2**45,
    2**62,
]


def keys_of(n: int, num_keys: int, dtype: str = "int64", seed: int = 0) -> np.ndarray:
    """Half of them from a few numbers, so that there are runs; both ends of the range among them."""
    g = np.random.default_rng(seed)
    keys = g.integers(0, num_keys, n)
    few = g.integers(0, num_keys, 5)
    keys[: n // 2] = few[g.integers(0, 5, n // 2)]
    g.shuffle(keys)
    if n > 1:
        keys[0], keys[-1] = num_keys - 1, 0
    return keys.astype(dtype)


def check(keys: Any, num_keys: int, found: Any) -> None:
    numbers = np.asarray(keys)
    np.testing.assert_array_equal(np.asarray(found.order), np.argsort(numbers, kind="stable"))
    if found.counts is not None:
        counts = np.bincount(numbers, minlength=num_keys)
        np.testing.assert_array_equal(np.asarray(found.counts), counts)
        np.testing.assert_array_equal(np.asarray(found.offsets), np.r_[0, np.cumsum(counts)])


@pytest.mark.parametrize("num_keys", RANGES)
@pytest.mark.parametrize("n", [0, 1, 2, 100, 5000, 150_000])
def test_the_order_is_that_of_numpy(n: int, num_keys: int) -> None:
    for dtype in ("int64", "int32"):
        if num_keys > 2**31 and dtype == "int32":
            continue
        keys = keys_of(n, num_keys, dtype)
        alone = counting_sort(keys, num_keys, order_only=True)
        assert alone.counts is None
        assert alone.offsets is None
        assert alone.order.dtype == np.int64
        check(keys, num_keys, alone)
        if num_keys <= 2**20:
            check(keys, num_keys, counting_sort(keys, num_keys))


def test_against_torch_stable_sort() -> None:
    keys = torch.from_numpy(keys_of(30_000, 300))
    found = counting_sort(keys, 300)
    assert torch.equal(found.order, torch.sort(keys, stable=True).indices)
    assert torch.equal(found.counts, torch.bincount(keys, minlength=300))
    assert found.offsets.dtype == torch.int64
    assert torch.equal(keys[found.order], keys.sort().values)


@pytest.mark.parametrize("num_keys", [64, 70_000, 2**40])
def test_threads_do_not_matter(num_keys: int) -> None:
    keys = torch.from_numpy(keys_of(300_000, num_keys))
    orders = [
        with_threads(k, lambda: counting_sort(keys, num_keys, order_only=True).order)
        for k in (1, 2, 5)
    ]
    for order in orders:
        check(keys, num_keys, counting_sort(keys, num_keys, order_only=True)._replace(order=order))


def test_runs_of_sorted_equal_and_falling_keys() -> None:
    n = 100_000
    for keys in (np.zeros(n, np.int64), np.arange(n), np.arange(n)[::-1], np.arange(n) // 1000):
        check(keys, n, counting_sort(keys, n))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**40), max_size=200), st.sampled_from([0, 3, 2**40]))
def test_any_keys(numbers: list[int], shift: int) -> None:
    keys = np.array(numbers, np.int64) % (shift + 1)
    check(keys, shift + 1, counting_sort(keys, shift + 1, order_only=shift > 2**20))


def test_reference_and_strides() -> None:
    base = keys_of(4000, 50).reshape(1000, 4)
    for keys in (base[:, 1], torch.from_numpy(base)[:, 1], base[::-1, 2]):
        for impl in ("cpu", "reference"):
            found = counting_sort(keys, 50, impl=impl)
            assert type(found.order) is type(keys)
            check(keys, 50, found)
    nothing = counting_sort(np.zeros(0, np.int32), 0)
    assert nothing.counts.shape == (0,)
    assert nothing.offsets.tolist() == [0]
    assert counting_sort(np.zeros(0, np.int64), 3).offsets.tolist() == [0, 0, 0, 0]


KEYS = np.array([0, 3, -1])


@pytest.mark.parametrize("impl", ["auto", "reference"])
@refused(
    {
        r"keys: expected 0 to 2, got 3 at \[1\] \(2 of 3\)": {"num_keys": 3},
        r"keys: expected 0 to 3, got -1 at \[2\] \(1 of 3\)": {},
        r"keys: expected 0 to -1, got 0 at \[0\] \(3 of 3\)": {"num_keys": 0},
        r"keys: expected 1 dimension\(s\), got shape \(1, 3\)": KEYS[None],
        "num_keys: expected an integer >= 0 and <= 4611686018427387904, got -1": -1,
    },
    {
        "keys: expected dtype int64, int32, got float64": KEYS / 1.0,
        "keys: expected a NumPy, torch or CuPy array, got list": [0],
        "num_keys: expected an integer, got float": 4.0,
        "order_only: expected True or False, got int": 1,
    },
)
def test_errors(changes: dict[str, Any], kind: type[Exception], text: str, impl: str) -> None:
    arguments = {"keys": KEYS, "num_keys": 4, "impl": impl, **changes}
    assert_refused(counting_sort, arguments, kind, text)


def test_keys_that_32_bits_would_let_pass() -> None:
    for big in (2**62 - 1, -(2**62)):
        with pytest.raises(ValueError, match=rf"expected 0 to 4294967295, got {big} at \[70000\]"):
            counting_sort(np.r_[np.zeros(70_000, np.int64), big], 2**32, order_only=True)
    with pytest.raises(
        NotImplementedError,
        match=r"no implementation fits keys \(3,\) int64 on cpu with impl='cuda'",
    ):
        counting_sort(KEYS, 4, impl="cuda")
