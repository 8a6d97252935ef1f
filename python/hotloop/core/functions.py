# SPDX-License-Identifier: Apache-2.0
"""Elementary functions, exponentials of few operations and random numbers, for NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..front import arrays, check, native
from ..vocabulary import like

FUNCTIONS = (
    "exp",
    "exp_weight",
    "expm1",
    "log",
    "log1p",
    "sigmoid",
    "softplus",
    "tanh",
    "log1mexp",
)


def _map(op: str, name: str, x: Any) -> Any:
    if not hasattr(x, "dtype") or isinstance(x, np.generic):
        x = np.asarray(x)  # lists and numbers
    check.kind(op, "x", x)
    if arrays.dtype(x) not in ("float32", "float64"):
        raise TypeError(
            f"[{op}] x: expected dtype float32 or float64, got {arrays.dtype(x)}. Convert it first."
        )
    array = arrays.to_numpy(x)
    dense = np.ascontiguousarray(array).reshape(-1)
    out = np.empty_like(dense)
    native.core.map(name, dense, out)
    return out.reshape(array.shape)


def elementary(name: str, x: Any) -> np.ndarray:
    """One of the elementary functions that the CPU loops use, on an array.

    Float32 in branch-free SIMD code, float64 by libm; errors in ulp are in docs/numerics.md. ``exp_weight`` is
    exp for x <= 0 with results below the smallest normal number taken as 0; ``log1mexp`` is log(1 - e^x), x < 0.

    Args:
        name: "exp", "exp_weight", "expm1", "log", "log1p", "sigmoid", "softplus", "tanh" or "log1mexp".
        x: float32 or float64 array of any shape.

    Returns:
        Array of the shape and dtype of ``x``.

    Raises:
        TypeError: another dtype.
        ValueError: another name.

    Examples:
        >>> import numpy as np
        >>> elementary("softplus", np.zeros(1, np.float32)).round(4).tolist()
        [0.6930999755859375]

    Reference:
        Definition.
    """
    check.choice("elementary", "name", name, FUNCTIONS)
    return _map("elementary", name, x)


def exp2_evolved(x: Any, *, coarse: bool = False) -> np.ndarray:
    """2^x on [0, 1] in ten operations, two of them divisions: the evolved program of AutoNumerics-Zero.

    u = x + c3 / x;  2^x = (c4 / (c1 / u + c2 + u) - c5)^8. The structure is the paper's; the constants are our own
    minimax fit under 2^0 = 1 and 2^1 = 2, since the published ones were not found. Relative error at most 4.4e-15 in
    float64; exact at 0.

    Args:
        x: float32 or float64 array with values in [0, 1].
        coarse: the three-operation form a / (x + b) + c, relative error at most 8.7e-4. Default False.

    Returns:
        Array of the shape and dtype of ``x``; meaningless outside [0, 1].

    Raises:
        TypeError: another dtype.

    Examples:
        >>> import numpy as np
        >>> exp2_evolved(np.array([0.0, 1.0])).round(14).tolist()
        [1.0, 2.0]

    Reference:
        Real et al. 2023, arXiv:2312.08472.
    """
    return _map("exp2_evolved", "exp2_evolved_coarse" if coarse else "exp2_evolved", x)


@like(exp2_evolved)
def exp2_minimax(x: Any, *, degree: int = 5) -> np.ndarray:
    """2^x on [0, 1] by a minimax polynomial (our Remez fit).

    Relative error before rounding at most 7.5e-8 (degree 5) or 1.9e-9 (degree 6).

    Args:
        degree: 5 or 6. Default 5.

    Raises:
        ValueError: another degree.

    Examples:
        >>> abs(exp2_minimax(np.array([0.5]))[0] / 2**0.5 - 1) < 7.5e-8
        np.True_

    Reference:
        The baseline of Real et al. 2023, arXiv:2312.08472; coefficients by Remez exchange.
    """
    if degree not in (5, 6):
        raise ValueError(f"[exp2_minimax] degree: expected 5 or 6, got {degree!r}.")
    return _map("exp2_minimax", f"exp2_minimax{degree}", x)


@like(elementary)
def exp_by_exp2(x: Any, *, method: str = "minimax") -> np.ndarray:
    """exp(x) from one of the exponentials above: x = (k + r) log 2 with k = floor(x / log 2).

    Args:
        x: float32 or float64 array. "minimax" clamps to [-87.3, 88.7].
        method: "minimax" (degree 5) or "evolved". Default "minimax".

    Raises:
        ValueError: another method.

    Examples:
        >>> abs(exp_by_exp2(np.array([1.0]), method="evolved")[0] / np.e - 1) < 1e-14
        np.True_

    Reference:
        Real et al. 2023, arXiv:2312.08472.
    """
    if method not in ("minimax", "evolved"):
        raise ValueError(f"[exp_by_exp2] method: expected minimax or evolved, got {method!r}.")
    return _map("exp_by_exp2", f"exp_{method}", x)


def philox(seed: int, n: int, *, offset: int = 0, first_item: int = 0) -> np.ndarray:
    """The four 32-bit words of Philox 4x32-10 for items first_item to first_item + n - 1.

    Counter (item, offset), key seed: the same words on every machine, in any order, on CPU and GPU.

    Args:
        seed: 0 to 2^64 - 1.
        n: number of items, >= 0.
        offset: second half of the counter, 0 to 2^64 - 1. Default 0.
        first_item: first half of the counter of the first item. Default 0.

    Returns:
        uint32 array of shape (n, 4).

    Raises:
        ValueError: a number out of range.

    Examples:
        >>> philox(0, 1).tolist()
        [[1713891541, 3781805453, 3159862348, 2600524760]]

    Reference:
        Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", SC11.
    """
    for name, value in (("seed", seed), ("offset", offset), ("first_item", first_item)):
        if not 0 <= value < 2**64:
            raise ValueError(f"[philox] {name}: expected 0 to 2^64 - 1, got {value!r}.")
    if n < 0:
        raise ValueError(f"[philox] n: expected at least 0, got {n!r}.")
    words = np.empty((n, 4), np.int32)
    native.core.philox_fill(seed, offset, first_item, words)
    return words.view(np.uint32)


@like(philox)
def philox_uniform(seed: int, n: int, *, offset: int = 0, first_item: int = 0) -> np.ndarray:
    """Uniform float32 numbers in (0, 1] from the words of ``philox``: ((word >> 8) + 1) / 2^24, shape (n, 4).

    Returns:
        float32 array of shape (n, 4); never 0, so its logarithm is finite.

    Examples:
        >>> bool((philox_uniform(1, 100) > 0).all())
        True

    Reference:
        Salmon et al. 2011, SC11.
    """
    words = philox(seed, n, offset=offset, first_item=first_item)
    return ((words >> np.uint32(8)) + np.uint32(1)).astype(np.float32) * np.float32(2.0**-24)
