# SPDX-License-Identifier: Apache-2.0
"""Products of the rows of experts with the weights of their experts, forward and backward.

Idea: rows lie in the order of their experts, so a product of all experts is a list of tiles, each of
one expert. The list is made on the device from the offsets (`Schedule`), its length is bounded by
shapes alone: a program reads its tile, and programs beyond the last tile leave. Nothing is read on
the host, so a captured graph follows another routing. Rows that hold nothing are tiles too, and
stored as 0. Rows of tokens are gathered by the loads of a tile, so they never lie in memory in the
order of experts; the activation is applied to tiles of gate and value in the registers of one
program (experts.py). The gradient of a weight is the work of one program per tile of the weight,
which adds the rows of its expert in order. Nothing is added by atomics: the same bits every time.
Layout: rows [n, K], the last dimension contiguous; weights [E, K, N] with any strides of which one
is 1, so that both orders of storage are read in place. Offsets of elements are 64 bit.
Flops: 2 R K N per product. Bytes: each weight of an expert that has rows once per group of row
tiles, rows once per column tile; the order of the programs keeps repeated reads in L2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import tiles as core
from ..core.tiles import locate

# Sizes that only bound loops and masks: a kernel per divisibility of each would buy nothing.
COUNTS = ["rows", "experts", "tiles", "column_tiles", "group"]


@triton.jit
def expert_range(offsets_ptr, counts_ptr, expert, rows, HAS_COUNTS: tl.constexpr):
    # First row of an expert, and the row behind the last that holds something; inside the rows
    # whatever the numbers are, which nobody looks at on a GPU.
    first = tl.minimum(tl.maximum(tl.load(offsets_ptr + expert), 0), rows)
    filled = tl.minimum(tl.load(offsets_ptr + expert + 1), rows)
    if HAS_COUNTS:
        filled = tl.minimum(filled, first + tl.load(counts_ptr + expert))
    return first, filled


@triton.jit(do_not_specialize=["rows", "experts", "tiles"])
def _tile_schedule_fwd_kernel(
    offsets_ptr,  # [experts + 1]
    counts_ptr,  # [experts]
    schedule_ptr,  # [4, tiles]: expert, first row, end of the rows that hold something, end of rows
    rows, experts, tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    SEGMENTS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    # Segment e + 1 are the rows of expert e; segment 0 and the last are rows before and behind all.
    segment = tl.arange(0, SEGMENTS).to(tl.int64)
    last = experts + 1
    first = tl.load(offsets_ptr + segment - 1, mask=(segment > 0) & (segment <= last), other=0)
    stop = tl.load(offsets_ptr + segment, mask=segment < last, other=0)
    stop = tl.minimum(tl.where(segment == last, rows, stop), rows)
    number = (tl.maximum(stop - tl.maximum(first, 0), 0) + BLOCK_ROWS - 1) // BLOCK_ROWS
    end = tl.cumsum(tl.where(segment <= last, number, 0), 0)
    tile = tl.program_id(0).to(tl.int64) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    before = end[None, :] <= tile[:, None]
    at = tl.sum(before.to(tl.int64), 1)
    exists = (at <= last) & (tile < tiles)
    first = tl.load(offsets_ptr + at - 1, mask=exists & (at > 0), other=0)
    row = tl.maximum(first, 0) + (tile - tl.max(tl.where(before, end[None, :], 0), 1)) * BLOCK_ROWS
    stop = tl.load(offsets_ptr + at, mask=exists & (at < last), other=0)
    stop = tl.minimum(tl.where(at == last, rows, stop), rows)
    of_expert = exists & (at > 0) & (at < last)
    filled = stop
    if HAS_COUNTS:
        filled = first + tl.load(counts_ptr + at - 1, mask=of_expert, other=0)
        filled = tl.minimum(filled, stop)
    row = tl.where(exists, row, 0)
    to = schedule_ptr + tile
    mask = tile < tiles
    tl.store(to, at - 1, mask=mask)
    tl.store(to + tiles, row, mask=mask)
    tl.store(to + 2 * tiles, tl.where(of_expert, filled, 0), mask=mask)
    tl.store(to + 3 * tiles, tl.where(exists, stop, 0), mask=mask)


@triton.jit
def tile_at(schedule_ptr, tiles, tile):
    # (expert, first row, end of the rows that hold something, end of the rows to write), the last
    # two within the tile's rows or before them. No tile: both ends are 0.
    at = schedule_ptr + tile
    expert = tl.load(at)
    first = tl.load(at + tiles)
    filled = tl.load(at + 2 * tiles)
    return expert, first, filled, tl.load(at + 3 * tiles)


@triton.jit
def rows_of(first, filled, token_ptr, BLOCK_ROWS: tl.constexpr, HAS_TOKENS: tl.constexpr):
    # Rows of the operand, all valid: rows that hold nothing stand for the first, which does.
    row = first + tl.arange(0, BLOCK_ROWS)
    row = tl.where(row < filled, row, first)
    if HAS_TOKENS:
        row = tl.load(token_ptr + row)
    return row


@triton.jit
def weight_tile(
    ptrs, k, left, columns, width, EVEN_INNER: tl.constexpr, EVEN_COLUMNS: tl.constexpr
):
    # A tile of a weight, [BLOCK_INNER, columns].
    if EVEN_INNER and EVEN_COLUMNS:
        w = tl.load(ptrs)
    elif EVEN_INNER:
        w = tl.load(ptrs, mask=(columns < width)[None, :], other=0.0)
    elif EVEN_COLUMNS:
        w = tl.load(ptrs, mask=(k < left)[:, None], other=0.0)
    else:
        w = tl.load(ptrs, mask=(k < left)[:, None] & (columns < width)[None, :], other=0.0)
    return w


@triton.jit
def tile_product(
    a_ptr,
    rows,  # [BLOCK_ROWS] int64, all valid
    stride_an,
    w_ptr,  # of the expert
    columns,  # [BLOCK_COLUMNS] int64
    stride_wk, stride_wn, inner, width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    k = tl.arange(0, BLOCK_INNER)
    a_ptrs = a_ptr + rows[:, None] * stride_an + k[None, :]
    w_ptrs = w_ptr + k.to(tl.int64)[:, None] * stride_wk + columns[None, :] * stride_wn
    u = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        if EVEN_INNER:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=k[None, :] < inner - start, other=0.0)
        w = weight_tile(w_ptrs, k, inner - start, columns, width, EVEN_INNER, EVEN_COLUMNS)
        if UPCAST:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        u = tl.dot(a, w, u, input_precision=PRECISION)
        a_ptrs += BLOCK_INNER
        w_ptrs += BLOCK_INNER * stride_wk
    return u


@triton.jit(do_not_specialize=COUNTS)
def _grouped_product_fwd_kernel(
    a_ptr,  # [n, inner]
    token_ptr,  # [rows], the row of a
    schedule_ptr,
    w_ptr,  # [experts, inner, width]
    bias_ptr,  # [experts, outputs]
    out_ptr,  # [rows, outputs]
    stride_an, stride_we, stride_wk, stride_wn, stride_be, inner, width, outputs,
    tiles, column_tiles, group,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile, column_tile = locate(tiles, column_tiles, group)
    expert, first, filled, stop = tile_at(schedule_ptr, tiles, tile)
    if first >= stop:
        return
    position = first + tl.arange(0, BLOCK_ROWS)
    columns = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = columns < outputs
    to = out_ptr + position[:, None] * outputs + columns[None, :]
    to_mask = (position < stop)[:, None] & inside[None, :]
    if first >= filled:
        nothing = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), out_ptr.dtype.element_ty)
        tl.store(to, nothing, mask=to_mask)
        return
    rows = rows_of(first, filled, token_ptr, BLOCK_ROWS, HAS_TOKENS)
    u = tile_product(
        a_ptr, rows, stride_an, w_ptr + expert * stride_we, columns, stride_wk, stride_wn,
        inner, width, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, EVEN_INNER, EVEN_COLUMNS,
        PRECISION, UPCAST,
    )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * stride_be + columns, mask=inside, other=0.0)
        u += bias.to(tl.float32)[None, :]
    u = tl.where((position < filled)[:, None], u, 0.0)
    tl.store(to, u.to(out_ptr.dtype.element_ty), mask=to_mask)


@triton.jit(do_not_specialize=["rows", "m_tiles", "n_tiles"])
def _grouped_weight_bwd_kernel(
    a_ptr,  # [n, m]
    a_token_ptr,  # [rows], the row of a
    b_ptr,  # [n, n]
    b_token_ptr,
    offsets_ptr, counts_ptr,
    out_ptr,  # [experts, m_outputs, n_outputs]
    stride_an, stride_bn, m, n, m_outputs, n_outputs, rows, m_tiles, n_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    A_TOKENS: tl.constexpr,
    B_TOKENS: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    expert = program // (m_tiles * n_tiles)
    inside = program % (m_tiles * n_tiles)
    at_m = inside % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    at_n = inside // m_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    first, filled = expert_range(offsets_ptr, counts_ptr, expert, rows, HAS_COUNTS)
    u = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, filled, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        # Both operands: the next expert's rows may hold what 0 does not silence.
        exists = row < filled
        a_row = row
        b_row = row
        if A_TOKENS:
            a_row = tl.load(a_token_ptr + row, mask=exists, other=0)
        if B_TOKENS:
            b_row = tl.load(b_token_ptr + row, mask=exists, other=0)
        a = tl.load(
            a_ptr + a_row[None, :] * stride_an + at_m[:, None],
            mask=exists[None, :] & (at_m < m)[:, None],
            other=0.0,
        )
        b = tl.load(
            b_ptr + b_row[:, None] * stride_bn + at_n[None, :],
            mask=exists[:, None] & (at_n < n)[None, :],
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        u = tl.dot(a, b, u, input_precision=PRECISION)
    to = out_ptr + (expert * m_outputs + at_m[:, None]) * n_outputs + at_n[None, :]
    mask = (at_m < m_outputs)[:, None] & (at_n < n_outputs)[None, :]
    tl.store(to, u.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "column_tiles"])
def _grouped_bias_bwd_kernel(
    a_ptr,  # [n, columns]
    token_ptr,  # [rows]
    scale_ptr,  # [rows]
    offsets_ptr, counts_ptr,
    out_ptr,  # [experts, columns]
    stride_an, columns, rows, column_tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_TOKENS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    expert = program // column_tiles
    column = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first, filled = expert_range(offsets_ptr, counts_ptr, expert, rows, HAS_COUNTS)
    total = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    for start in range(first, filled, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        exists = row < filled
        a_row = row
        if HAS_TOKENS:
            a_row = tl.load(token_ptr + row, mask=exists, other=0)
        a = tl.load(
            a_ptr + a_row[:, None] * stride_an + column[None, :],
            mask=exists[:, None] & (column < columns)[None, :],
            other=0.0,
        ).to(tl.float32)
        if HAS_SCALE:
            a = a * tl.load(scale_ptr + row, mask=exists, other=0.0)[:, None]
        total += tl.sum(a, 0)
    to = out_ptr + expert * columns + column
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=column < columns)


class Config(NamedTuple):
    """Launch choices of a product: the sums of a program are [rows, columns], of which `inner` of
    the inner dimension pass through shared memory at a time.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


class Configs(NamedTuple):
    """Of the products over rows, and of the gradients of weights."""

    product: Config
    weight: Config


# Row tiles that programs running at the same time share. With tiles of 128 x 256 the 132 programs
# of an H200 hold 8 x 16 of them: 24 tiles of operands for 128 of results.
GROUP = 8

# By counting for Hopper (64 Ki registers and 227 KiB of shared memory per SM), half precision. Where
# an expert has many rows a product is bound by the tensor cores: 128 x 256 x 64 has 128 sums per
# thread of 8 warps, does 85 flop per byte from L2, and three stages are 3 (128 + 256) 64 2 B =
# 144 KiB (of 163 on sm_80). Below 96 rows the weights are what moves: m rows do m flop per byte of a
# weight, at 64 rows and 4.3 TB/s 275 TFLOP/s, which half-filled tiles of 64 rows still do; two
# programs of 4 stages, 96 KiB each, keep 96 KiB in flight where latency times bandwidth asks 33. At
# 32 and 16 rows three and more programs fit an SM.
LARGE = Config(128, 256, 64, num_warps=8, num_stages=3)
MEDIUM = Config(64, 128, 64, num_warps=4, num_stages=4)
SMALL = Config(32, 128, 64, num_warps=4, num_stages=4)
LEAST = Config(16, 128, 64, num_warps=4, num_stages=4)
# The rows of a step of a weight's gradient are looked up first, which takes pipeline stages: of five,
# three hold operands.
LARGE_WEIGHT = LARGE._replace(num_stages=5)
# Consumer cards have 99 KiB of shared memory: two stages of 32 KiB, three of 24.
LARGE_SMALL_SHARED = Config(128, 128, 64, num_warps=8, num_stages=2)
MEDIUM_SMALL_SHARED = Config(64, 128, 64, num_warps=4, num_stages=3)
# Exact float32 has no tensor cores: 32 sums per thread, and the unrolled products stay small. With
# tf32 a stage of 128 x 128 x 32 is 32 KiB and has 64 sums per thread.
FLOAT = Config(64, 64, 32, num_warps=4, num_stages=2)
FLOAT_FEW_ROWS = Config(16, 64, 32, num_warps=4, num_stages=2)
TF32 = Config(128, 128, 32, num_warps=8, num_stages=3)
TF32_FEW_ROWS = Config(64, 128, 32, num_warps=4, num_stages=3)
# Few rows per expert: the gradient of a weight is bound by writing it, and half a step is enough.
WEIGHT_FEW_ROWS = Config(128, 128, 32, num_warps=4, num_stages=2)


def configs(dtype: torch.dtype, rows: int, experts: int, device: torch.device) -> Configs:
    """By the rows of a mean expert, all that is known without asking the device."""
    mean = rows // max(1, experts)
    ample = core.shared_memory(device) >= 160 * 1024
    if dtype == torch.float32:
        if precision(dtype) == "ieee":
            return Configs(FLOAT if mean > 16 else FLOAT_FEW_ROWS, FLOAT)
        weight = TF32 if ample else TF32_FEW_ROWS
        return Configs(
            weight if mean > 96 else TF32_FEW_ROWS if mean > 16 else FLOAT_FEW_ROWS, weight
        )
    large, weight = (LARGE, LARGE_WEIGHT) if ample else (LARGE_SMALL_SHARED, LARGE_SMALL_SHARED)
    if mean > 96:
        return Configs(large, weight)
    if mean <= 32:
        weight = WEIGHT_FEW_ROWS
    if mean > 32:
        return Configs(MEDIUM if ample else MEDIUM_SMALL_SHARED, weight)
    return Configs(SMALL if mean > 16 else LEAST, weight)


def precision(dtype: torch.dtype) -> str:
    """tf32 where torch's own products of float32 may take it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    named = getattr(matmul, "fp32_precision", None)
    allowed = matmul.allow_tf32 if named is None else named == "tf32"
    return "tf32" if allowed else "ieee"


class Order(NamedTuple):
    """Where the rows of experts lie."""

    offsets: Tensor
    counts: Tensor | None
    rows: int

    @property
    def experts(self) -> int:
        return self.offsets.shape[0] - 1


class Schedule(NamedTuple):
    """The row tiles of all experts, made on the device."""

    table: Tensor
    """(4, tiles) int64: expert, first row, end of the rows that hold something, end of rows. Tiles
    that do not exist end at row 0."""
    block_rows: int

    @property
    def tiles(self) -> int:
        return self.table.shape[1]


def schedule(order: Order, block_rows: int) -> Schedule:
    """At most as many tiles as there are rows, and at most one that is not full per expert, before
    all and behind all."""
    segments = order.experts + 2
    tiles = min(order.rows, (order.rows + segments * (block_rows - 1)) // block_rows)
    table = order.offsets.new_empty((4, tiles))
    width = triton.next_power_of_2(segments)
    # 8 Ki comparisons are 64 per thread.
    block = max(1, min(128, 8192 // width))
    if tiles:
        with core.on_device(table):
            _tile_schedule_fwd_kernel[grid(triton.cdiv(tiles, block))](
                order.offsets, order.counts, table, order.rows, order.experts, tiles,
                BLOCK_ROWS=block_rows, BLOCK_TILES=block, SEGMENTS=width,
                HAS_COUNTS=order.counts is not None,
            )  # fmt: skip
    return Schedule(table, block_rows)


def grid(programs: int) -> tuple[int]:
    return core.grid(programs, "moe")


def aligned_weight(weight: Tensor) -> Tensor:
    """[E, K, N] with 128 bit copies along the dimension whose stride is 1."""
    if weight.stride(1) == 1 and weight.stride(2) != 1:
        return core.aligned(weight.transpose(1, 2)).transpose(1, 2)
    return core.aligned(weight)


def operands(a: Tensor, weight: Tensor, config: Config, outputs: int) -> dict[str, Any]:
    """What every product over rows takes by name, from its aligned operands."""
    inner = min(a.shape[1], weight.shape[1])
    return {
        "stride_we": weight.stride(0),
        "stride_wk": weight.stride(1),
        "stride_wn": weight.stride(2),
        "inner": inner,
        "width": weight.shape[2],
        "outputs": outputs,
        "EVEN_INNER": inner % config.inner == 0,
        "BLOCK_ROWS": config.rows,
        "BLOCK_INNER": config.inner,
        "PRECISION": precision(a.dtype),
        "UPCAST": core.upcast(a.dtype),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "group": GROUP,
    }


def product(
    a: Tensor, tokens: Tensor | None, tiles: Schedule, rows: int, weight: Tensor,
    bias: Tensor | None, config: Config,
) -> Tensor:  # fmt: skip
    """[rows, N]: rows of a, those that `tokens` names, times weight [E, K, N], plus bias [E, N]."""
    outputs = weight.shape[2]
    out = torch.empty((rows, outputs), dtype=core.stored(a.dtype), device=a.device)
    if out.numel() == 0:
        return out.to(a.dtype)
    a, w = core.aligned(a), aligned_weight(weight)
    column_tiles = triton.cdiv(outputs, config.columns)
    with core.on_device(a):
        _grouped_product_fwd_kernel[grid(tiles.tiles * column_tiles)](
            a, tokens, tiles.table, w, bias, out, a.stride(0),
            stride_be=0 if bias is None else bias.stride(0),
            tiles=tiles.tiles, column_tiles=column_tiles,
            BLOCK_COLUMNS=config.columns,
            EVEN_COLUMNS=outputs % config.columns == 0,
            HAS_TOKENS=tokens is not None, HAS_BIAS=bias is not None,
            **operands(a, w, config, outputs),
        )  # fmt: skip
    return out.to(a.dtype)


def weight_gradient(
    a: Tensor, a_tokens: Tensor | None, b: Tensor, b_tokens: Tensor | None, order: Order,
    config: Config,
) -> Tensor:  # fmt: skip
    """[E, M, N]: of each expert the sum over its rows of a^T b."""
    m, n = a.shape[1], b.shape[1]
    out = torch.empty((order.experts, m, n), dtype=core.stored(a.dtype), device=a.device)
    if out.numel() == 0:
        return out.to(a.dtype)
    a, b = core.aligned(a), core.aligned(b)
    m_tiles, n_tiles = triton.cdiv(m, config.rows), triton.cdiv(n, config.columns)
    with core.on_device(a):
        _grouped_weight_bwd_kernel[grid(order.experts * m_tiles * n_tiles)](
            a, a_tokens, b, b_tokens, order.offsets, order.counts, out,
            a.stride(0), b.stride(0), a.shape[1], b.shape[1], m, n, order.rows, m_tiles, n_tiles,
            BLOCK_M=config.rows, BLOCK_N=config.columns, BLOCK_ROWS=config.inner,
            A_TOKENS=a_tokens is not None, B_TOKENS=b_tokens is not None,
            HAS_COUNTS=order.counts is not None,
            PRECISION=precision(a.dtype), UPCAST=core.upcast(a.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out.to(a.dtype)


def bias_gradient(a: Tensor, tokens: Tensor | None, scale: Tensor | None, order: Order) -> Tensor:
    """[E, N]: of each expert the sum of its rows of a, times `scale` (float32, of each row)."""
    columns = a.shape[1]
    out = torch.empty((order.experts, columns), dtype=core.stored(a.dtype), device=a.device)
    if out.numel() == 0:
        return out.to(a.dtype)
    if a.stride(1) != 1:
        a = a.contiguous()
    # Rows of 64 half numbers are whole sectors, and there are enough programs where experts are few.
    column_tiles = triton.cdiv(columns, 64)
    with core.on_device(a):
        _grouped_bias_bwd_kernel[grid(order.experts * column_tiles)](
            a, tokens, scale, order.offsets, order.counts, out, a.stride(0), columns, order.rows,
            column_tiles,
            BLOCK_ROWS=64, BLOCK_COLUMNS=64,
            HAS_TOKENS=tokens is not None, HAS_SCALE=scale is not None,
            HAS_COUNTS=order.counts is not None,
        )  # fmt: skip
    return out.to(a.dtype)
