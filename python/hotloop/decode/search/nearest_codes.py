# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours of the codes of a codebook."""

from __future__ import annotations

import numpy as np

from ...front import arrays, check, environment, native
from ...front.arrays import Array
from ...front.check import integer
from ...front.impl import Impl, choose
from ...reference.decode import search as reference

TILE_BYTES = 8 * 2**20
"""Products of ``vq_neighbor_table`` that lie in memory at a time. From 2 to 32 MiB the time is the same within 30%
(4096 and 16384 codes of 8 dimensions, 8192 of 256; one core)."""


def vq_neighbor_table(codebook: Array, *, k: int | None = None, impl: Impl = "auto") -> Array:
    """List the nearest other codes of every code of a codebook, nearest first.

    D_ij = |E_i - E_j|_2, D_ii = infinity; row i holds the k columns of smallest D_ij. Unlike the authors' script only
    the k nearest are kept and sorted, and V x V distances never lie in memory at once. Distances are compared as
    squares, in float64, summed in the order of the dimensions; where two of them are the same number the lower index
    comes first, so duplicates of a code are its first neighbours in their order. A tile of distances comes from a
    matrix product; whatever lies closer together than its rounding is measured again, term by term.

    Args:
        codebook: E, (V, dim), float32, float64, float16 or bfloat16, finite, below 1e150.
        k: neighbours kept, 1 to V - 1. Default min(1000, V - 1).
        impl: "auto", "cpu" or "reference". Default "auto".

    Returns:
        (V, k) int32, of the kind of ``codebook``. Row i never holds i.

    Raises:
        TypeError: not an array, or a wrong dtype.
        ValueError: not two dimensions, a number that is not finite, or k out of range.
        NotImplementedError: the forced impl cannot run these inputs.

    Examples:
        >>> import numpy as np
        >>> vq_neighbor_table(np.array([[0.0], [1.0], [3.0]]), k=2).tolist()
        [[1, 2], [0, 2], [1, 0]]

    Reference:
        Jang et al. 2024, LANTERN, arXiv:2410.03355, and the published code.
    """
    op = "vq_neighbor_table"
    check.array(op, "codebook", codebook, arrays.FLOATS, 2)
    codes, dim = (int(n) for n in codebook.shape)
    width = (
        min(1000, max(codes - 1, 0))
        if k is None
        else integer(op, "k", k, at_least=1, at_most=codes - 1)
    )
    chosen = choose(op, impl, "codebook", codebook)
    e = arrays.dense(arrays.to_numpy(codebook), "float64")
    check.refuse(op, "codebook", e, ~(np.abs(e) < 1e150), "finite numbers below 1e150")
    if chosen == "reference":
        return reference.vq_neighbor_table(codebook, k=k)
    table = np.empty((codes, width), np.int32)
    squares = (e * e).sum(axis=1)
    # A sum of `dim` products, in any order, is off by at most 1.01 (dim + 1) units of |E_i| |E_j|, and by the least
    # normal number for each term that is flushed to zero.
    errors = (1.01 * (dim + 1) * 2.0**-53, dim * 2.0**-1021)
    rows = max(1, min(TILE_BYTES, environment.workspace_bytes()) // max(8 * codes, 1))
    for first in range(0, codes if width > 0 else 0, rows):
        products = e[first : first + rows] @ e.T
        native.core.decode.nearest_codes(
            products, e, squares, first, errors, table[first : first + rows]
        )
    return arrays.from_numpy(table, codebook)
