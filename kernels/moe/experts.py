# SPDX-License-Identifier: Apache-2.0
"""What is fused with the products of an expert: the activation and its gradient, the weights of
choices, the sum of a token's rows.

Forward: a program computes a tile of gate and of value, applies the activation in registers and
stores h. It stores the first product too where that is kept for the gradient. Backward: with the
gradient dy_t of a token's result, the product u = down^T dy_t of a row is at once what the
activation's gradient takes, times the weight of the choice, and what the weight's own gradient
takes: <dy_t, down h> = <u, h>. So the rows of the second product are never computed again.
Everything stored is rounded once from float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import tiles as core
from ..core.tiles import locate
from . import activation, grouped
from .grouped import COUNTS, Config, Schedule, rows_of, tile_at, tile_product, weight_tile


@triton.jit
def _gate_and_value(
    x_ptr, rows, stride_xn, w_ptr, bias_ptr, bias_first, columns, pairs, stride_wk, stride_wn, inner, width,
    outputs,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # The first product of the columns of h, [rows, BLOCK_COLUMNS]: gate, and value where there is
    # one. Interleaved pairs are one product of twice the columns, whatever dimension is contiguous.
    if INTERLEAVED:
        u = tile_product(
            x_ptr, rows, stride_xn, w_ptr, pairs, stride_wk, stride_wn, inner, width,
            BLOCK_ROWS, 2 * BLOCK_COLUMNS, BLOCK_INNER, EVEN_INNER, EVEN_COLUMNS, PRECISION, UPCAST,
        )  # fmt: skip
        if HAS_BIAS:
            bias = tl.load(bias_ptr + bias_first + pairs, mask=pairs < 2 * outputs, other=0.0)
            u += bias.to(tl.float32)[None, :]
        gate, value = tl.split(tl.reshape(u, (BLOCK_ROWS, BLOCK_COLUMNS, 2)))
    elif GATED:
        k = tl.arange(0, BLOCK_INNER)
        x_ptrs = x_ptr + rows[:, None] * stride_xn + k[None, :]
        g_ptrs = w_ptr + k.to(tl.int64)[:, None] * stride_wk + columns[None, :] * stride_wn
        v_ptrs = g_ptrs + tl.cast(outputs, tl.int64) * stride_wn
        gate = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        value = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, inner, BLOCK_INNER):
            if EVEN_INNER:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=k[None, :] < inner - start, other=0.0)
            g = weight_tile(g_ptrs, k, inner - start, columns, outputs, EVEN_INNER, EVEN_COLUMNS)
            v = weight_tile(v_ptrs, k, inner - start, columns, outputs, EVEN_INNER, EVEN_COLUMNS)
            if UPCAST:
                x = x.to(tl.float32)
                g = g.to(tl.float32)
                v = v.to(tl.float32)
            gate = tl.dot(x, g, gate, input_precision=PRECISION)
            value = tl.dot(x, v, value, input_precision=PRECISION)
            x_ptrs += BLOCK_INNER
            g_ptrs += BLOCK_INNER * stride_wk
            v_ptrs += BLOCK_INNER * stride_wk
        if HAS_BIAS:
            inside = columns < outputs
            b = tl.load(bias_ptr + bias_first + columns, mask=inside, other=0.0)
            gate += b.to(tl.float32)[None, :]
            b = tl.load(bias_ptr + bias_first + outputs + columns, mask=inside, other=0.0)
            value += b.to(tl.float32)[None, :]
    else:
        gate = tile_product(
            x_ptr, rows, stride_xn, w_ptr, columns, stride_wk, stride_wn, inner, width,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, EVEN_INNER, EVEN_COLUMNS, PRECISION, UPCAST,
        )  # fmt: skip
        if HAS_BIAS:
            b = tl.load(bias_ptr + bias_first + columns, mask=columns < outputs, other=0.0)
            gate += b.to(tl.float32)[None, :]
        value = gate
    return gate, value


@triton.jit
def _as_stored(u, like_ptr, UPCAST: tl.constexpr):
    # What backward will read, so that both compute the same h. The interpreter would cut bfloat16
    # off; there the rounding is left to torch.
    if not UPCAST:
        u = u.to(like_ptr.dtype.element_ty).to(tl.float32)
    return u


@triton.jit
def _store_pairs(
    ptr, gate, value, position, row_mask, columns, pairs, outputs,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    # Into rows of the width of the first product.
    dtype = ptr.dtype.element_ty
    if INTERLEAVED:
        u = tl.reshape(tl.join(gate, value), (BLOCK_ROWS, 2 * BLOCK_COLUMNS))
        to = ptr + position[:, None] * (2 * outputs) + pairs[None, :]
        tl.store(to, u.to(dtype), mask=row_mask[:, None] & (pairs < 2 * outputs)[None, :])
    else:
        mask = row_mask[:, None] & (columns < outputs)[None, :]
        if GATED:
            to = ptr + position[:, None] * (2 * outputs) + columns[None, :]
            tl.store(to, gate.to(dtype), mask=mask)
            tl.store(to + outputs, value.to(dtype), mask=mask)
        else:
            to = ptr + position[:, None] * outputs + columns[None, :]
            tl.store(to, gate.to(dtype), mask=mask)


@triton.jit(do_not_specialize=[*COUNTS, "kept_first", "kept_stop"])
def _expert_inner_fwd_kernel(
    x_ptr,  # [n, inner]
    token_ptr,  # [rows]
    schedule_ptr,
    w_ptr,  # [experts, inner, width]
    bias_ptr,  # [experts, outputs or 2 outputs]
    kept_ptr,  # [kept rows, outputs or 2 outputs]: the first product of rows kept_first .. kept_stop
    h_ptr,  # [rows, outputs]
    stride_xn, stride_we, stride_wk, stride_wn, stride_be, inner, width, outputs,
    tiles, column_tiles, group, kept_first, kept_stop,
    alpha, shift, limit,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NEED_KEPT: tl.constexpr,
    NEED_H: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # Rows that hold nothing are not written: nobody reads them.
    tile, column_tile = locate(tiles, column_tiles, group)
    expert, first, filled, _ = tile_at(schedule_ptr, tiles, tile)
    filled = tl.minimum(filled, first + BLOCK_ROWS)
    if first >= filled:
        return
    if not NEED_H:
        if filled <= kept_first:
            return
    position = first + tl.arange(0, BLOCK_ROWS)
    columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    pairs = column_tile * (2 * BLOCK_COLUMNS) + tl.arange(0, 2 * BLOCK_COLUMNS)
    rows = rows_of(first, filled, token_ptr, BLOCK_ROWS, True)
    gate, value = _gate_and_value(
        x_ptr, rows, stride_xn, w_ptr + expert * stride_we, bias_ptr, expert * stride_be,
        columns, pairs, stride_wk, stride_wn, inner, width, outputs,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, EVEN_INNER, EVEN_COLUMNS,
        HAS_BIAS, GATED, INTERLEAVED, PRECISION, UPCAST,
    )  # fmt: skip
    mask = position < filled
    if NEED_KEPT:
        _store_pairs(
            kept_ptr, gate, value, position, mask & (position >= kept_first) & (position < kept_stop),
            columns, pairs, outputs, BLOCK_ROWS, BLOCK_COLUMNS, GATED, INTERLEAVED,
        )  # fmt: skip
    if NEED_H:
        gate = _as_stored(gate, h_ptr, UPCAST)
        value = _as_stored(value, h_ptr, UPCAST)
        h = activation.activate(gate, value, alpha, shift, limit, KIND, GATED, HAS_LIMIT)
        to = h_ptr + position[:, None] * outputs + columns[None, :]
        tl.store(
            to, h.to(h_ptr.dtype.element_ty), mask=mask[:, None] & (columns < outputs)[None, :]
        )


@triton.jit
def _halves(u, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(u, (BLOCK_ROWS, 2, BLOCK_COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _inner_gradient_part(
    u, first_column, position, filled, scale, inner_ptr, d_inner_ptr, h_ptr, outputs,
    alpha, shift, limit,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NEED_INNER: tl.constexpr,
    NEED_H: tl.constexpr,
    NEED_DOT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    # What happens to some columns of u: [BLOCK_ROWS] of <u, h>.
    columns = first_column + tl.arange(0, BLOCK_COLUMNS)
    pairs = 2 * first_column + tl.arange(0, 2 * BLOCK_COLUMNS)
    row_mask = position < filled
    mask = row_mask[:, None] & (columns < outputs)[None, :]
    if INTERLEAVED:
        both = tl.load(
            inner_ptr + position[:, None] * (2 * outputs) + pairs[None, :],
            mask=row_mask[:, None] & (pairs < 2 * outputs)[None, :],
            other=0.0,
        ).to(tl.float32)
        gate, value = tl.split(tl.reshape(both, (BLOCK_ROWS, BLOCK_COLUMNS, 2)))
    elif GATED:
        at = inner_ptr + position[:, None] * (2 * outputs) + columns[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(at + outputs, mask=mask, other=0.0).to(tl.float32)
    else:
        at = inner_ptr + position[:, None] * outputs + columns[None, :]
        gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        value = gate
    dot = tl.zeros((BLOCK_ROWS,), tl.float32)
    if NEED_H or NEED_DOT:
        h = activation.activate(gate, value, alpha, shift, limit, KIND, GATED, HAS_LIMIT)
        h = _as_stored(h, inner_ptr, UPCAST)
        if NEED_DOT:
            dot = tl.sum(tl.where(mask, u * h, 0.0), 1)
        if NEED_H:
            if HAS_SCALE:
                h = h * scale[:, None]
            to = h_ptr + position[:, None] * outputs + columns[None, :]
            tl.store(to, h.to(h_ptr.dtype.element_ty), mask=mask)
    if NEED_INNER:
        if HAS_SCALE:
            u = u * scale[:, None]
        gate, value = activation.gradient(
            u, gate, value, alpha, shift, limit, KIND, GATED, HAS_LIMIT
        )
        _store_pairs(
            d_inner_ptr, gate, value, position, row_mask, columns, pairs, outputs,
            BLOCK_ROWS, BLOCK_COLUMNS, GATED, INTERLEAVED,
        )  # fmt: skip
    return dot


@triton.jit(do_not_specialize=[*COUNTS])
def _expert_inner_bwd_kernel(
    dy_ptr,  # [n, inner]
    token_ptr,  # [rows], the row of dy
    scale_ptr,  # [rows]
    schedule_ptr,
    w_ptr,  # [experts, inner, width]
    inner_ptr,  # [rows, outputs or 2 outputs], the first product
    d_inner_ptr,  # its gradient; may be the same
    h_ptr,  # [rows, outputs]: h times its scale
    dot_ptr,  # [column_tiles, rows]: <u, h>
    stride_yn, stride_we, stride_wk, stride_wn, inner, width, outputs, rows,
    tiles, column_tiles, group,
    alpha, shift, limit,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NEED_INNER: tl.constexpr,
    NEED_H: tl.constexpr,
    NEED_DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile, column_tile = locate(tiles, column_tiles, group)
    expert, first, filled, _ = tile_at(schedule_ptr, tiles, tile)
    if first >= filled:
        return
    position = first + tl.arange(0, BLOCK_ROWS)
    columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    u = tile_product(
        dy_ptr, rows_of(first, filled, token_ptr, BLOCK_ROWS, HAS_TOKENS), stride_yn,
        w_ptr + expert * stride_we, columns, stride_wk, stride_wn, inner, width,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, EVEN_INNER, EVEN_COLUMNS, PRECISION, UPCAST,
    )  # fmt: skip
    scale = tl.zeros((BLOCK_ROWS,), tl.float32)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + position, mask=position < filled, other=0.0)
    # Four parts of the columns one after the other: whole tiles of u, gate, value, h and two
    # gradients would be more numbers than a thread has registers.
    PART: tl.constexpr = BLOCK_COLUMNS // 4
    start = column_tile * BLOCK_COLUMNS
    u01, u23 = _halves(u, BLOCK_ROWS, BLOCK_COLUMNS)
    u0, u1 = _halves(u01, BLOCK_ROWS, BLOCK_COLUMNS // 2)
    u2, u3 = _halves(u23, BLOCK_ROWS, BLOCK_COLUMNS // 2)
    dot = _inner_gradient_part(
        u0, start, position, filled, scale, inner_ptr, d_inner_ptr,
        h_ptr, outputs, alpha, shift, limit, BLOCK_ROWS, PART, HAS_SCALE, HAS_LIMIT, KIND, GATED,
        INTERLEAVED, NEED_INNER, NEED_H, NEED_DOT, UPCAST,
    )  # fmt: skip
    dot += _inner_gradient_part(
        u1, start + PART, position, filled, scale, inner_ptr, d_inner_ptr,
        h_ptr, outputs, alpha, shift, limit, BLOCK_ROWS, PART, HAS_SCALE, HAS_LIMIT, KIND, GATED,
        INTERLEAVED, NEED_INNER, NEED_H, NEED_DOT, UPCAST,
    )  # fmt: skip
    dot += _inner_gradient_part(
        u2, start + 2 * PART, position, filled, scale, inner_ptr, d_inner_ptr,
        h_ptr, outputs, alpha, shift, limit, BLOCK_ROWS, PART, HAS_SCALE, HAS_LIMIT, KIND, GATED,
        INTERLEAVED, NEED_INNER, NEED_H, NEED_DOT, UPCAST,
    )  # fmt: skip
    dot += _inner_gradient_part(
        u3, start + 3 * PART, position, filled, scale, inner_ptr, d_inner_ptr,
        h_ptr, outputs, alpha, shift, limit, BLOCK_ROWS, PART, HAS_SCALE, HAS_LIMIT, KIND, GATED,
        INTERLEAVED, NEED_INNER, NEED_H, NEED_DOT, UPCAST,
    )  # fmt: skip
    if NEED_DOT:
        tl.store(dot_ptr + column_tile * rows + position, dot, mask=position < filled)


@triton.jit(do_not_specialize=["column_tiles", "rows", "tiles"])
def _choice_weight_bwd_kernel(
    dot_ptr,  # [column_tiles, rows]
    dy_ptr,  # [n, columns]
    token_ptr,  # [rows]
    bias_ptr,  # [experts, columns]
    schedule_ptr,
    slot_ptr,  # [rows]
    out_ptr,  # [slots]
    stride_yn, stride_be, columns, column_tiles, rows, tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    # <dy_t, down h + bias>; slots without a row are left as they are.
    tile = tl.program_id(0).to(tl.int64)
    expert, first, filled, _ = tile_at(schedule_ptr, tiles, tile)
    if first >= filled:
        return
    position = first + tl.arange(0, BLOCK_ROWS)
    mask = position < filled
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    at = dot_ptr + position
    for _ in range(column_tiles):
        total += tl.load(at, mask=mask, other=0.0)
        at += rows
    if HAS_BIAS:
        token = rows_of(first, filled, token_ptr, BLOCK_ROWS, True)
        for start in range(0, columns, BLOCK_COLUMNS):
            column = start + tl.arange(0, BLOCK_COLUMNS)
            inside = column < columns
            bias = tl.load(bias_ptr + expert * stride_be + column, mask=inside, other=0.0)
            dy = tl.load(
                dy_ptr + token[:, None] * stride_yn + column[None, :],
                mask=inside[None, :],
                other=0.0,
            )
            total += tl.sum(dy.to(tl.float32) * bias.to(tl.float32)[None, :], 1)
    slot = tl.load(slot_ptr + position, mask=mask, other=-1)
    tl.store(out_ptr + slot, total, mask=mask & (slot >= 0))


@triton.jit(do_not_specialize=["column_tiles"])
def _sum_choices_fwd_kernel(
    rows_ptr,  # [rows, columns]
    row_ptr,  # [n * k], the row of a slot
    weight_ptr,  # [n * k]
    shared_ptr,  # [n, columns]
    out_ptr,  # [n, columns]
    stride_sn, columns, k, column_tiles,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SHARED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    token = program // column_tiles
    column = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for j in range(k):
        slot = token * k + j
        row = tl.load(row_ptr + slot)
        y = tl.load(rows_ptr + row * columns + column, mask=inside & (row >= 0), other=0.0)
        y = y.to(tl.float32)
        if HAS_WEIGHT:
            # A weight of nothing may be anything.
            y = y * tl.where(row >= 0, tl.load(weight_ptr + slot), 0.0)
        total += y
    if HAS_SHARED:
        shared = tl.load(shared_ptr + token * stride_sn + column, mask=inside, other=0.0)
        total += shared.to(tl.float32)
    to = out_ptr + token * columns + column
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=inside)


class Function(NamedTuple):
    """An activation as the kernels take it; python/hotloop/reference/moe/experts.py says what it is."""

    kind: str
    """ "silu", "gelu", "gelu_tanh", "relu" or "relu2"."""
    gated: bool
    interleaved: bool
    limit: float | None
    alpha: float
    shift: float

    def arguments(self) -> dict[str, object]:
        return {
            "alpha": float(self.alpha),
            "shift": float(self.shift),
            "limit": 0.0 if self.limit is None else float(self.limit),
            "HAS_LIMIT": self.limit is not None,
            "KIND": self.kind,
            "GATED": self.gated,
            "INTERLEAVED": self.interleaved,
        }

    def columns(self, config: Config) -> int:
        """Columns of h in a tile of the first product: with a gate a tile holds both."""
        return config.columns // 2 if self.gated else config.columns


def first_product(
    x: Tensor, tokens: Tensor, tiles: Schedule, rows: int, weight: Tensor, bias: Tensor | None,
    function: Function, config: Config,
    *,
    kept: Tensor | None = None, kept_first: int = 0, kept_stop: int = 0, need_h: bool = True,
) -> Tensor | None:  # fmt: skip
    """h [rows, I] of weight [E, K, I or 2 I]; rows kept_first to kept_stop - 1 of the first product
    into `kept`, which counts rows from 0. Rows that hold nothing are left as they are.
    """
    outputs = weight.shape[2] // 2 if function.gated else weight.shape[2]
    h = None
    if need_h:
        h = torch.empty((rows, outputs), dtype=core.stored(x.dtype), device=x.device)
    store = kept
    if kept is not None and kept.dtype != core.stored(kept.dtype):
        store = kept.to(core.stored(kept.dtype))
    if rows and outputs:
        x, w = core.aligned(x), grouped.aligned_weight(weight)
        width = function.columns(config)
        column_tiles = triton.cdiv(outputs, width)
        with core.on_device(x):
            _expert_inner_fwd_kernel[grouped.grid(tiles.tiles * column_tiles)](
                x, tokens, tiles.table, w, bias, store, h, x.stride(0),
                stride_be=0 if bias is None else bias.stride(0),
                tiles=tiles.tiles, column_tiles=column_tiles,
                kept_first=kept_first, kept_stop=kept_stop,
                BLOCK_COLUMNS=width, EVEN_COLUMNS=outputs % width == 0,
                HAS_BIAS=bias is not None, NEED_KEPT=store is not None, NEED_H=need_h,
                **function.arguments(), **grouped.operands(x, w, config, outputs),
            )  # fmt: skip
    if kept is not None and store is not kept:
        kept.copy_(store)
    return None if h is None else h.to(x.dtype)


class InnerGradient(NamedTuple):
    inner: Tensor | None
    """[rows, I or 2 I], of the first product."""
    h: Tensor | None
    """[rows, I], h times the scale of its row."""
    dots: Tensor | None
    """[column tiles, rows] float32: parts of <dy, down h>, without the scale."""


def inner_gradient(
    dy: Tensor, tokens: Tensor | None, scale: Tensor | None, tiles: Schedule, weight: Tensor,
    inner: Tensor, function: Function, config: Config,
    *,
    need_inner: bool, need_h: bool, need_dots: bool, reuse: bool,
) -> InnerGradient:  # fmt: skip
    """From dy [n, K] and weight [E, K, I]. With `reuse` the gradient may take the place of `inner`.
    Rows that hold nothing are left as they are.
    """
    rows, outputs = inner.shape[0], weight.shape[2]
    stored = core.stored(dy.dtype)
    width = function.columns(config)
    column_tiles = triton.cdiv(outputs, width)
    d_inner = h = dots = None
    if need_inner:
        d_inner = (
            inner if reuse and stored == inner.dtype else torch.empty_like(inner, dtype=stored)
        )
    if need_h:
        h = torch.empty((rows, outputs), dtype=stored, device=dy.device)
    if need_dots:
        dots = torch.empty((column_tiles, rows), dtype=torch.float32, device=dy.device)
    if rows and outputs:
        y, w = core.aligned(dy), grouped.aligned_weight(weight)
        with core.on_device(y):
            _expert_inner_bwd_kernel[grouped.grid(tiles.tiles * column_tiles)](
                y, tokens, scale, tiles.table, w, inner, d_inner, h, dots, y.stride(0),
                rows=rows, tiles=tiles.tiles, column_tiles=column_tiles,
                BLOCK_COLUMNS=width, EVEN_COLUMNS=outputs % width == 0,
                HAS_TOKENS=tokens is not None, HAS_SCALE=scale is not None,
                NEED_INNER=need_inner, NEED_H=need_h, NEED_DOT=need_dots,
                **function.arguments(), **grouped.operands(y, w, config, outputs),
            )  # fmt: skip
    return InnerGradient(
        None if d_inner is None else d_inner.to(dy.dtype),
        None if h is None else h.to(dy.dtype),
        dots,
    )


def choice_weight_gradient(
    dots: Tensor, dy: Tensor, tokens: Tensor, bias: Tensor | None, tiles: Schedule,
    slot_of_row: Tensor, slots: int,
) -> Tensor:  # fmt: skip
    """[slots] float32, 0 where a slot has no row."""
    out = torch.zeros(slots, dtype=torch.float32, device=dy.device)
    if tiles.tiles:
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        with core.on_device(dy):
            _choice_weight_bwd_kernel[grouped.grid(tiles.tiles)](
                dots, dy, tokens, bias, tiles.table, slot_of_row, out, dy.stride(0),
                0 if bias is None else bias.stride(0), dy.shape[1], dots.shape[0], dots.shape[1],
                tiles.tiles,
                BLOCK_ROWS=tiles.block_rows, BLOCK_COLUMNS=64, HAS_BIAS=bias is not None,
            )  # fmt: skip
    return out


def sum_choices(
    rows: Tensor, row_of_slot: Tensor, tokens: int, weights: Tensor | None, shared: Tensor | None
) -> Tensor:
    """[tokens, D]: of each token the sum of the rows of its slots, in their order, times `weights`
    (float32, one per slot), plus `shared`; added in float32 and rounded once.
    """
    columns = rows.shape[1]
    out = torch.empty((tokens, columns), dtype=core.stored(rows.dtype), device=rows.device)
    if out.numel() == 0:
        return out.to(rows.dtype)
    if shared is not None and shared.stride(1) != 1:
        shared = shared.contiguous()
    # 8 numbers per thread of 4 warps; a token has enough programs where tokens are few.
    block = min(1024, max(16, triton.next_power_of_2(columns)))
    column_tiles = triton.cdiv(columns, block)
    with core.on_device(rows):
        _sum_choices_fwd_kernel[grouped.grid(tokens * column_tiles)](
            rows, row_of_slot, weights, shared, out, 0 if shared is None else shared.stride(0),
            columns, row_of_slot.shape[0] // tokens, column_tiles,
            BLOCK_COLUMNS=block, HAS_WEIGHT=weights is not None, HAS_SHARED=shared is not None,
        )  # fmt: skip
    return out.to(rows.dtype)
