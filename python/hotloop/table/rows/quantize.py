# SPDX-License-Identifier: Apache-2.0
"""Rows in fewer bytes, for tables that only serve."""

from __future__ import annotations

import math
from typing import Any

from ...front import arrays, check, native
from ...front.check import choice, number
from ...front.impl import Impl, choose
from ...reference.table import rows as _reference
from .. import _words
from . import engine

QUANTIZE_MODES = ("int8", "float16", "bfloat16")
VALUE_RANGE = 1.0


def _no_bfloat16(op: str, name: str, like: Any, others: str) -> None:
    if not arrays.is_torch(like):
        raise TypeError(
            f"[{op}] {name}: expected {others} for a {arrays.kind(like)} array, which has no bfloat16, "
            "got 'bfloat16'. Pass a torch tensor."
        )


def _two_dimensional(x: Any) -> Any:
    return x.reshape(1, -1) if x.ndim == 1 else x


@_words.documented_rows
def serving_row_quantize(
    rows: Any, *, mode: str = "int8", value_range: float = VALUE_RANGE, impl: Impl = "auto"
) -> Any:
    """Store rows in fewer bytes: int8 on a fixed grid, or half precision.

    "int8": step = value_range / 128; q = x / step rounded half away from zero and clipped to [-128, 127]; NaN becomes
    0. Inside [-value_range, value_range - step] the error is at most step / 2. x / step is one division in float32
    (float64 for float64 rows). "float16", "bfloat16": the conversion of NumPy or torch, to nearest even, with either
    ``impl``.

    Args:
        rows: (N, D) or (D,), float32, float16, bfloat16 or float64 (int8 of float64: reference).
        mode: "int8", "float16" or "bfloat16" (torch only). Default "int8".

    Returns:
        Array of the shape, library and device of rows: int8, float16 or bfloat16.

    Raises:
        ValueError: an array of another shape, an unknown mode, or value_range out of range; with HOTLOOP_CHECK=1 NaN or
            infinity in rows.

    Examples:
        >>> import numpy as np
        >>> serving_row_quantize(np.array([0.25, -2.0, 0.004, np.nan])).tolist()
        [32, -128, 1, 0]

    Reference:
        Monolith, Liu et al. 2022, arXiv:2209.07663 (fixed_r8 of hash_table/compressor/fake_quantizer.h).
    """
    op = "serving_row_quantize"
    check.array(op, "rows", rows, arrays.FLOATS, 1, 2)
    choice(op, "mode", mode, QUANTIZE_MODES)
    value_range = number(op, "value_range", value_range, above=0, below=math.inf)
    check.finite(op, rows=rows)
    if mode == "bfloat16":
        _no_bfloat16(op, "mode", rows, "int8 or float16")
    floats = (arrays.dtype(rows),) if mode == "int8" else ()
    if choose(op, impl, "rows", rows, engine.loops(*floats)) == "reference":
        return _reference.serving_row_quantize(rows, mode=mode, value_range=value_range)
    if mode != "int8":
        return _reference.converted(rows, mode)
    matrix = arrays.unit_stride(_two_dimensional(rows))
    out = arrays.empty(rows, tuple(map(int, rows.shape)), "int8")
    codes = arrays.as_bytes(_two_dimensional(out))
    native.core.table.quantize(matrix, codes, value_range, True)
    return out


@_words.documented_rows
def serving_row_dequantize(
    codes: Any, *, value_range: float = VALUE_RANGE, dtype: str = "float32", impl: Impl = "auto"
) -> Any:
    """Rows from what ``serving_row_quantize`` stored.

    int8: x = q value_range / 128. Half types: their value.

    Args:
        codes: (N, D) or (D,), int8, float16 or bfloat16.
        value_range: as when stored, > 0; not used by the half types. Default 1.
        dtype: "float32", "float16", "bfloat16" (torch only) or "float64" (from int8: reference). Default "float32".

    Returns:
        Array of the shape, library and device of codes, of this dtype.

    Raises:
        ValueError: an array of another shape, an unknown dtype, or value_range out of range.

    Examples:
        >>> import numpy as np
        >>> serving_row_dequantize(np.array([32, -128, 1], np.int8)).tolist()
        [0.25, -1.0, 0.0078125]

    Reference:
        Monolith, Liu et al. 2022, arXiv:2209.07663 (fixed_r8 of hash_table/compressor/fake_quantizer.h).
    """
    op = "serving_row_dequantize"
    check.array(op, "codes", codes, QUANTIZE_MODES, 1, 2)
    choice(op, "dtype", dtype, arrays.FLOATS)
    value_range = number(op, "value_range", value_range, above=0, below=math.inf)
    if dtype == "bfloat16":
        _no_bfloat16(op, "dtype", codes, "float32, float64 or float16")
    from_int8 = arrays.dtype(codes) == "int8"

    chosen = choose(op, impl, "codes", codes, engine.loops(*(dtype,) if from_int8 else ()))
    if chosen == "reference":
        return _reference.serving_row_dequantize(codes, value_range=value_range, dtype=dtype)
    if not from_int8:
        return _reference.converted(codes, dtype)
    matrix = arrays.unit_stride(_two_dimensional(codes))
    out = arrays.empty(codes, tuple(map(int, codes.shape)), dtype)
    native.core.table.quantize(_two_dimensional(out), arrays.as_bytes(matrix), value_range, False)
    return out
