# SPDX-License-Identifier: Apache-2.0
"""Philox 4x32-10: the published answers, the NumPy reference, and the distribution of its numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hotloop import core
from hotloop.reference import core as reference

ONES = 0xFFFFFFFF
# kat_vectors of Random123 (Salmon et al. 2011), "philox 4x32 10": counter, key, answer.
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...], native: object
) -> None:
    assert tuple(native.philox4x32_10(list(counter), list(key))) == answer
    item, offset = counter[0] | counter[1] << 32, counter[2] | counter[3] << 32
    seed = key[0] | key[1] << 32
    for module in (core, reference):
        assert tuple(module.philox(seed, 1, offset=offset, first_item=item)[0]) == answer


# n 0: nothing. 1. 7. 9001: more than two threads' share of 4096.
@pytest.mark.parametrize("n", [0, 1, 7, 9001])
@pytest.mark.parametrize(
    ("seed", "offset", "first_item"),
    [(0, 0, 0), (2**64 - 1, 2**63 + 5, 2**32 - 3), (12345, 7, 2**40)],
)
def test_equal_to_the_reference(n: int, seed: int, offset: int, first_item: int) -> None:
    found = core.philox(seed, n, offset=offset, first_item=first_item)
    assert found.dtype == np.uint32
    assert found.shape == (n, 4)
    assert np.array_equal(found, reference.philox(seed, n, offset=offset, first_item=first_item))
    uniform = core.philox_uniform(seed, n, offset=offset, first_item=first_item)
    assert np.array_equal(
        uniform, reference.philox_uniform(seed, n, offset=offset, first_item=first_item)
    )


def test_a_draw_belongs_to_its_item() -> None:
    whole = core.philox(3, 100, offset=9)
    assert np.array_equal(whole[40:], core.philox(3, 60, offset=9, first_item=40))
    assert not np.array_equal(whole, core.philox(3, 100, offset=10))
    assert not np.array_equal(whole, core.philox(4, 100, offset=9))


def test_items_wrap_around_at_two_to_the_64() -> None:
    last = core.philox(3, 2, first_item=2**64 - 1)
    assert np.array_equal(last[1], core.philox(3, 1)[0])


def chi_square(uniform: np.ndarray, cells: int) -> float:
    counts = np.bincount((np.ceil(uniform.ravel() * cells) - 1).astype(np.int64), minlength=cells)
    expected = uniform.size / cells
    return float(((counts - expected) ** 2 / expected).sum())


def test_uniform_by_chi_square_with_a_negative_control() -> None:
    """255 degrees of freedom: above 350 with probability 7e-5. Numbers bent by 2 % must be rejected."""
    u = core.philox_uniform(2024, 250_000).astype(np.float64)
    for column in range(4):
        assert chi_square(u[:, column], 256) < 350
    assert chi_square(u, 256) < 350
    assert chi_square(u**1.02, 256) > 350


def test_neighbouring_items_are_independent_by_chi_square_with_a_negative_control() -> None:
    """Pairs of one column's neighbours over 16 x 16 cells; the control carries 1 % of its neighbour."""
    u = core.philox_uniform(5, 500_000)[:, 0].astype(np.float64)

    def pairs(first: np.ndarray, second: np.ndarray) -> float:
        cell = np.ceil(first * 16) - 1 + (np.ceil(second * 16) - 1) / 16
        return chi_square((cell + 1 / 32) / 16, 256)

    assert pairs(u[:-1], u[1:]) < 350
    mixed = np.where(np.arange(u.size - 1) % 50 == 0, u[:-1], u[1:])
    assert pairs(u[:-1], mixed) > 350


def test_uniform_is_in_the_half_open_interval_without_zero() -> None:
    """The smallest word gives 2^-24 and the largest 1, both exactly."""
    u = core.philox_uniform(1, 100_000)
    assert u.dtype == np.float32
    assert u.min() >= np.float32(2.0**-24)
    assert u.max() <= 1
    assert np.isfinite(np.log(u)).all()
    words = np.array([0, 255, 256, ONES], np.uint32)
    made = ((words >> np.uint32(8)) + np.uint32(1)).astype(np.float32) * np.float32(2.0**-24)
    assert made.tolist() == [2.0**-24, 2.0**-24, 2.0**-23, 1.0]


@pytest.mark.parametrize("name", ["seed", "offset", "first_item"])
@pytest.mark.parametrize("value", [-1, 2**64])
def test_errors(name: str, value: int) -> None:
    arguments = {"seed": 0, "n": 1, name: value}
    with pytest.raises(
        ValueError, match=rf"\[philox\] {name}: expected 0 to 2\^64 - 1, got {value}"
    ):
        core.philox(**arguments)


def test_error_of_n() -> None:
    with pytest.raises(ValueError, match=r"\[philox\] n: expected at least 0, got -1"):
        core.philox(0, -1)
