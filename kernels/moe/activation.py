# SPDX-License-Identifier: Apache-2.0
"""What stands between the two products of an expert, and its derivative, on a tile in registers.

h = f(gate) (value + shift) with a gate, h = f(gate) without; `Activation` of
python/hotloop/reference/moe/experts.py has the kinds. Everything is float32. Comparisons are written
so that NaN passes, as in torch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sigmoid_argument(x, alpha, KIND: tl.constexpr):
    # f(x) = x sigmoid(s(x)); (1 + tanh(u)) / 2 = sigmoid(2 u).
    if KIND == "silu":
        s = alpha * x
        slope = alpha
    else:
        s = x * (1.5957691216057308 + 0.07135481627260025 * x * x)
        slope = 1.5957691216057308 + 0.21406444881780074 * x * x
    return s, slope


@triton.jit
def _normal(x):
    # The distribution function of the normal law.
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def function(x, alpha, KIND: tl.constexpr):
    if KIND == "relu":
        y = tl.where(x <= 0.0, 0.0, x)
    elif KIND == "relu2":
        y = tl.where(x <= 0.0, 0.0, x)
        y = y * y
    elif KIND == "gelu":
        y = x * _normal(x)
    else:
        s, _ = _sigmoid_argument(x, alpha, KIND)
        y = x / (1.0 + tl.exp(-s))
    return y


@triton.jit
def slope(x, alpha, KIND: tl.constexpr):
    if KIND == "relu":
        y = tl.where(x <= 0.0, 0.0, 1.0)
    elif KIND == "relu2":
        y = tl.where(x <= 0.0, 0.0, 2.0 * x)
    elif KIND == "gelu":
        y = _normal(x) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        s, ds = _sigmoid_argument(x, alpha, KIND)
        # 1 - sigmoid(s) would cancel.
        e = tl.exp(-tl.abs(s))
        p = tl.where(s < 0.0, e, 1.0) / (1.0 + e)
        y = p + x * (e / ((1.0 + e) * (1.0 + e))) * ds
    return y


@triton.jit
def _cut(x, limit):
    return tl.where(x > limit, limit, x)


@triton.jit
def activate(
    gate, value, alpha, shift, limit,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
):  # fmt: skip
    alpha = tl.cast(alpha, tl.float32)
    if HAS_LIMIT:
        limit = tl.cast(limit, tl.float32)
        gate = _cut(gate, limit)
    h = function(gate, alpha, KIND)
    if GATED:
        if HAS_LIMIT:
            value = -_cut(-_cut(value, limit), limit)
        h = h * (value + tl.cast(shift, tl.float32))
    return h


@triton.jit
def gradient(
    dh, gate, value, alpha, shift, limit,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
):  # fmt: skip
    # (d gate, d value) from dh; at a limit itself the gradient passes.
    alpha = tl.cast(alpha, tl.float32)
    cut_gate = gate
    if HAS_LIMIT:
        limit = tl.cast(limit, tl.float32)
        cut_gate = _cut(gate, limit)
    dgate = dh * slope(cut_gate, alpha, KIND)
    dvalue = dh
    if GATED:
        cut_value = value
        if HAS_LIMIT:
            cut_value = -_cut(-_cut(value, limit), limit)
        dgate = dgate * (cut_value + tl.cast(shift, tl.float32))
        dvalue = dh * function(cut_gate, alpha, KIND)
        if HAS_LIMIT:
            dvalue = tl.where(cut_value != value, 0.0, dvalue)
    if HAS_LIMIT:
        dgate = tl.where(cut_gate != gate, 0.0, dgate)
    return dgate, dvalue
