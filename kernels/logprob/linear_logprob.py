# SPDX-License-Identifier: Apache-2.0
"""Row statistics of an lm_head, and their gradient, without the logits in memory.

Idea: a program owns BLOCK_ROWS rows and one split of the vocabulary. It walks the split tile by
tile: z = map(hidden @ weight^T + bias) in registers (`tl.dot`, float32), folded at once into the
running statistics of its rows (max, sum exp, sum z exp, sum exp^2, sum z, z of the label, argmax),
one register each per row. The splits exist so that few rows still fill the chip; each writes its
statistics to `partial` [splits, 6, n], and a second kernel folds the splits in ascending order, so
the result does not depend on scheduling. Backward recomputes a tile, turns it into dz in registers
and stores it (dtype of `hidden`) to a bounded workspace, which two cuBLAS products with float32
sums turn into dhidden and dweight. Rows that do not count are moved behind those that do by a
permutation made on the device; programs past the device-side count leave at once; no size is ever
read back.
Layout: hidden [n, D] and weight [V, D], rows of any stride; `statistics` and `coefficients` are [6,
n] float32 in the order of csrc/logprob/rows.hpp (Statistic) and heads.hpp (RowGradient).
Flops: forward 2 n V D, backward 6 n V D (recompute, dhidden, dweight). Bytes of the forward, each
operand once: (V + n) D itemsize; the order of the programs keeps repeated reads in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .tiles import (
    CHUNK_SIZES,
    WORKSPACE_BYTES,
    Config,
    RowConfig,
    Rows,
    Transform,
    chunk_tile,
    count_rows,
    finite_shift,
    locate,
    row_tile,
    rows_at,
    silenced,
    slope_at,
    store_chunk_tile,
    tile_product,
    to_logit,
    weighted,
    within,
    within_label,
)

STATISTICS = 6  # max, sum_exp, sum_z_exp, sum_exp2, sum_z, label_z

# By counting for Hopper (64 Ki registers and 227 KiB of shared memory per SM). Half precision, 128
# x 256 x 64: the sums are 128 registers per thread of 8 warps; three stages of operands are 3 *
# (128 + 256) * 64 * 2 B = 144 KiB; a step does 85 flop per byte from L2, where 128 x 128 would do
# 64. One exponential per logit at 16 per clock and SM is 2 Ki clocks, against 63 Ki for the
# products of a tile at D = 4096.
HALF = Config(128, 256, 64, num_warps=8, num_stages=3)
# The smallest M of a warp-group product, and a stage more in the same shared memory.
HALF_FEW_ROWS = Config(64, 256, 64, num_warps=4, num_stages=4)
# Consumer cards have 99 KiB of shared memory: two stages of 32 KiB.
HALF_SMALL_SHARED = Config(128, 128, 64, num_warps=8, num_stages=2)
# Exact float32 has no tensor cores: 32 sums per thread, and the unrolled products stay small.
FLOAT = Config(64, 64, 32, num_warps=4, num_stages=2)
ROW = RowConfig()


def default_config(dtype: torch.dtype, n: int, device: torch.device) -> Config:
    if dtype == torch.float32:
        return FLOAT
    if tiles.shared_memory(device) < 160 * 1024:
        return HALF_SMALL_SHARED
    return HALF_FEW_ROWS if n <= 64 else HALF


@triton.jit
def _start(BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), tl.float32)
    return zero - float("inf"), zero, zero, zero, zero, zero, tl.zeros((BLOCK,), tl.int64)


@triton.jit
def _fold(
    z,  # [rows, BLOCK_COLUMNS], anything outside the vocabulary
    start,
    vocabulary,
    label,  # [rows], relative to the first column of the weight
    m, s, sz, s2, sp, lz, best,
    BLOCK_COLUMNS: tl.constexpr,
    ALL: tl.constexpr,
    ARGMAX: tl.constexpr,
):  # fmt: skip
    # What only the last tile and the tiles with a label need stands behind branches all threads
    # take alike: as selects it would be a fifth of the instructions per logit.
    if start + BLOCK_COLUMNS > vocabulary:
        inside = within(start, vocabulary, BLOCK_COLUMNS)[None, :]
        if ALL:
            sp += tl.sum(tl.where(inside, z, 0.0), 1)
        z = tl.where(inside, z, float("-inf"))
    else:
        if ALL:
            sp += tl.sum(z, 1)
    if tl.max(((label >= start) & (label < start + BLOCK_COLUMNS)).to(tl.int32), 0) > 0:
        lz += tl.sum(tl.where(within_label(label, start, BLOCK_COLUMNS), z, 0.0), 1)
    tile_max = tl.max(z, 1)
    new_max = tl.maximum(m, tile_max)
    shift = finite_shift(new_max)
    rescale = tl.exp(m - shift)
    e = tl.exp(z - shift[:, None])
    s = s * rescale + tl.sum(e, 1)
    if ALL:
        sz = sz * rescale + tl.sum(weighted(e, z), 1)
        s2 = s2 * (rescale * rescale) + tl.sum(e * e, 1)
    if ARGMAX:
        offsets = tl.arange(0, BLOCK_COLUMNS)[None, :]
        at = tl.min(tl.where(z == tile_max[:, None], offsets, BLOCK_COLUMNS), 1)
        best = tl.where(tile_max > m, start + at, best)
    return new_max, s, sz, s2, sp, lz, best


@triton.jit
def _store_partial(
    partial_ptr, best_ptr, split, position, mask, n,
    m, s, sz, s2, sp, lz, best,
    ALL: tl.constexpr,
    ARGMAX: tl.constexpr,
):  # fmt: skip
    to = partial_ptr + split * 6 * n + position
    tl.store(to, m, mask=mask)
    tl.store(to + n, s, mask=mask)
    if ALL:
        tl.store(to + 2 * n, sz, mask=mask)
        tl.store(to + 3 * n, s2, mask=mask)
        tl.store(to + 4 * n, sp, mask=mask)
    tl.store(to + 5 * n, lz, mask=mask)
    if ARGMAX:
        tl.store(best_ptr + split * n + position, best, mask=mask)


@triton.jit(do_not_specialize=["n", "splits", "tiles_per_split", "row_blocks", "group"])
def _linear_logprob_fwd_kernel(
    x_ptr,  # [n, inner]
    w_ptr,  # [vocabulary, inner]
    bias_ptr,  # [vocabulary]
    label_ptr,  # [n]
    index_ptr,  # [n], rows that count first
    count_ptr,  # [1]
    partial_ptr,  # [splits, 6, n], n in the order of index
    best_ptr,  # [splits, n]
    stride_xn, stride_wv, n, vocabulary, inner, first_column,
    tiles_per_split, splits, row_blocks, group,
    scale, cap, inverse_temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    ALL: tl.constexpr,
    ARGMAX: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row_block, split = locate(row_blocks, splits, group)
    count = count_rows(count_ptr, n, HAS_INDEX)
    if row_block * BLOCK_ROWS >= count:
        return
    position = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    counts = position < count
    row = rows_at(position, counts, index_ptr, HAS_INDEX)
    label = tl.load(label_ptr + row, mask=counts, other=-1) - first_column
    m, s, sz, s2, sp, lz, best = _start(BLOCK_ROWS)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocabulary, BLOCK_COLUMNS))
    for tile in range(split * tiles_per_split, last):
        start = tile * BLOCK_COLUMNS
        columns = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        u = tile_product(
            x_ptr, row, stride_xn, w_ptr, tl.minimum(columns, vocabulary - 1), stride_wv, bias_ptr,
            inner, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, EVEN_INNER, HAS_BIAS, UPCAST,
        )  # fmt: skip
        z = to_logit(u, scale, cap, inverse_temperature, HAS_CAP)
        m, s, sz, s2, sp, lz, best = _fold(
            z, start, vocabulary, label, m, s, sz, s2, sp, lz, best, BLOCK_COLUMNS, ALL, ARGMAX
        )
    _store_partial(
        partial_ptr, best_ptr, split, position, counts, n, m, s, sz, s2, sp, lz, best, ALL, ARGMAX
    )


@triton.jit(do_not_specialize=["n", "splits", "tiles_per_split", "ignore_index"])
def _logits_logprob_fwd_kernel(
    logits_ptr,  # [n, vocabulary]
    bias_ptr,
    label_ptr,
    partial_ptr,  # [splits, 6, n]
    best_ptr,
    stride_ln, n, vocabulary, first_column, ignore_index, tiles_per_split, splits,
    scale, cap, inverse_temperature,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    ALL: tl.constexpr,
    ARGMAX: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    row = program // splits + tl.zeros((1,), tl.int64)
    if HAS_IGNORE:
        if tl.load(label_ptr + program // splits) == ignore_index:
            return
    label = tl.load(label_ptr + row) - first_column
    m, s, sz, s2, sp, lz, best = _start(1)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocabulary, BLOCK_COLUMNS))
    for tile in range(split * tiles_per_split, last):
        start = tile * BLOCK_COLUMNS
        columns = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        inside = within(start, vocabulary, BLOCK_COLUMNS)
        u = row_tile(logits_ptr, row, stride_ln, bias_ptr, columns, inside, HAS_BIAS)
        z = to_logit(u, scale, cap, inverse_temperature, HAS_CAP)
        m, s, sz, s2, sp, lz, best = _fold(
            z, start, vocabulary, label, m, s, sz, s2, sp, lz, best, BLOCK_COLUMNS, ALL, ARGMAX
        )
    _store_partial(
        partial_ptr, best_ptr, split, row, row < n, n, m, s, sz, s2, sp, lz, best, ALL, ARGMAX
    )


@triton.jit(do_not_specialize=["n", "splits", "ignore_index"])
def _merge_logprob_fwd_kernel(
    partial_ptr,  # [splits, 6, n], n in the order of index
    best_ptr,
    label_ptr,
    index_ptr,
    statistics_ptr,  # [6, n]
    argmax_ptr,  # [n]
    n, vocabulary, first_column, ignore_index, splits,
    BLOCK: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    ALL: tl.constexpr,
    ARGMAX: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = position < n
    row = position
    if HAS_INDEX:
        row = tl.load(index_ptr + position, mask=mask, other=0)
    label = tl.load(label_ptr + row, mask=mask, other=0)
    counts = mask
    if HAS_IGNORE:
        counts = mask & (label != ignore_index)
    label -= first_column
    m, s, sz, s2, sp, lz, best = _start(BLOCK)
    at = partial_ptr + position
    if ARGMAX:
        at_best = best_ptr + position
    for _ in range(splits):
        next_m = tl.load(at, mask=counts, other=0.0)
        new_max = tl.maximum(m, next_m)
        shift = finite_shift(new_max)
        old = tl.exp(m - shift)
        new = tl.exp(next_m - shift)
        s = s * old + tl.load(at + n, mask=counts, other=1.0) * new
        if ALL:
            sz = sz * old + tl.load(at + 2 * n, mask=counts, other=0.0) * new
            s2 = s2 * (old * old) + tl.load(at + 3 * n, mask=counts, other=0.0) * (new * new)
            sp += tl.load(at + 4 * n, mask=counts, other=0.0)
        lz += tl.load(at + 5 * n, mask=counts, other=0.0)
        if ARGMAX:
            best = tl.where(next_m > m, tl.load(at_best, mask=counts, other=0), best)
            at_best += n
        m = new_max
        at += 6 * n
    # A label outside these columns may be another device's: its z is not ours to report.
    lz = tl.where((label >= 0) & (label < vocabulary), lz, float("nan"))
    to = statistics_ptr + row
    tl.store(to, tl.where(counts, m, 0.0), mask=mask)
    tl.store(to + n, tl.where(counts, s, 1.0), mask=mask)
    tl.store(to + 2 * n, tl.where(counts, sz, 0.0), mask=mask)
    tl.store(to + 3 * n, tl.where(counts, s2, 0.0), mask=mask)
    tl.store(to + 4 * n, tl.where(counts, sp, 0.0), mask=mask)
    tl.store(to + 5 * n, tl.where(counts, lz, 0.0), mask=mask)
    if ARGMAX:
        tl.store(argmax_ptr + row, tl.where(counts, first_column + best, 0), mask=mask)


@triton.jit
def _row_gradient(
    z, label_at, coefficient_ptr, row, mask, n, scale, cap, inverse_temperature,
    HAS_CAP: tl.constexpr,
):  # fmt: skip
    # Gradient with respect to the matrix product, from the six coefficients of each row.
    at = coefficient_ptr + row
    lse = tl.load(at, mask=mask, other=0.0)[:, None]
    a = tl.load(at + n, mask=mask, other=0.0)[:, None]
    b = tl.load(at + 2 * n, mask=mask, other=0.0)[:, None]
    c = tl.load(at + 3 * n, mask=mask, other=0.0)[:, None]
    d = tl.load(at + 4 * n, mask=mask, other=0.0)[:, None]
    e = tl.load(at + 5 * n, mask=mask, other=0.0)[:, None]
    p = tl.exp(z - lse)
    g = silenced(p, a + b * z + c * p) + d + tl.where(label_at, e, 0.0)
    return g * slope_at(z, scale, cap, inverse_temperature, HAS_CAP)


@triton.jit(do_not_specialize=CHUNK_SIZES)
def _linear_logprob_bwd_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    label_ptr,
    coefficient_ptr,  # [6, n]
    index_ptr,
    count_ptr,
    dz_ptr,  # [rows, columns] of the chunk, rows in the order of index
    dbias_ptr,  # [row_blocks, columns]
    stride_xn, stride_wv, stride_dn, stride_bn, n, inner, vocabulary, first_column,
    first_row, chunk_rows, chunk_first, chunk_columns, column_blocks, row_blocks, group,
    scale, cap, inverse_temperature,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row_block, column_block = locate(row_blocks, column_blocks, group)
    in_chunk, column, inside, to, to_mask = chunk_tile(
        dz_ptr, stride_dn, row_block, column_block, chunk_rows, chunk_columns,
        BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
    count = count_rows(count_ptr, n, HAS_INDEX)
    if first_row + row_block * BLOCK_ROWS >= count:
        g = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        store_chunk_tile(g, to, to_mask, dbias_ptr, stride_bn, row_block, column, inside, NEED_BIAS)
        return
    position = first_row + in_chunk
    counts = (position < count) & (in_chunk < chunk_rows)
    row = rows_at(position, counts, index_ptr, HAS_INDEX)
    columns = chunk_first + column
    u = tile_product(
        x_ptr, row, stride_xn, w_ptr, tl.minimum(columns, vocabulary - 1), stride_wv, bias_ptr,
        inner, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, EVEN_INNER, HAS_BIAS, UPCAST,
    )  # fmt: skip
    z = to_logit(u, scale, cap, inverse_temperature, HAS_CAP)
    label = tl.load(label_ptr + row, mask=counts, other=-1) - first_column
    at_label = within_label(label, chunk_first + column_block * BLOCK_COLUMNS, BLOCK_COLUMNS)
    g = _row_gradient(
        z, at_label, coefficient_ptr, row, counts, n, scale, cap, inverse_temperature, HAS_CAP
    )
    g = tl.where(counts[:, None], g, 0.0)
    store_chunk_tile(g, to, to_mask, dbias_ptr, stride_bn, row_block, column, inside, NEED_BIAS)


@triton.jit(do_not_specialize=["n", "column_blocks", "ignore_index"])
def _logits_logprob_bwd_kernel(
    logits_ptr,
    bias_ptr,
    label_ptr,
    coefficient_ptr,
    dlogits_ptr,  # may be logits_ptr: each element is read, then written, by one program
    stride_ln, stride_dn, n, vocabulary, first_column, ignore_index, column_blocks,
    scale, cap, inverse_temperature,
    BLOCK_COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // column_blocks + tl.zeros((1,), tl.int64)
    start = program % column_blocks * BLOCK_COLUMNS
    columns = start + tl.arange(0, BLOCK_COLUMNS)
    inside = within(start, vocabulary, BLOCK_COLUMNS)
    to = dlogits_ptr + row[:, None] * stride_dn + columns[None, :]
    if HAS_IGNORE:
        if tl.load(label_ptr + program // column_blocks) == ignore_index:
            nothing = tl.zeros((1, BLOCK_COLUMNS), dlogits_ptr.dtype.element_ty)
            tl.store(to, nothing, mask=inside[None, :])
            return
    u = row_tile(logits_ptr, row, stride_ln, bias_ptr, columns, inside, HAS_BIAS)
    z = to_logit(u, scale, cap, inverse_temperature, HAS_CAP)
    label = tl.load(label_ptr + row) - first_column
    at_label = within_label(label, start, BLOCK_COLUMNS)
    g = _row_gradient(
        z, at_label, coefficient_ptr, row, row < n, n, scale, cap, inverse_temperature, HAS_CAP
    )
    tl.store(to, g.to(dlogits_ptr.dtype.element_ty), mask=inside[None, :])


def _constants(
    config: Config, hidden: Tensor, bias: Tensor | None, softcap: float
) -> dict[str, object]:
    even = hidden.shape[1] % config.block_inner == 0
    flags = {"EVEN_INNER": even, "HAS_BIAS": bias is not None, "HAS_CAP": softcap > 0}
    return {**config.constants(hidden.dtype), **flags}


def _merge(
    partial: Tensor, best: Tensor | None, labels: Tensor, rows: Rows, vocabulary: int,
    first_column: int, ignore_index: int | None, all_statistics: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    splits, _, n = partial.shape
    statistics = torch.empty((STATISTICS, n), dtype=torch.float32, device=partial.device)
    argmax = None if best is None else torch.empty(n, dtype=torch.int64, device=partial.device)
    _merge_logprob_fwd_kernel[tiles.grid(triton.cdiv(n, 128))](
        partial, best, labels, rows.index, statistics, argmax,
        n, vocabulary, first_column, ignore_index or 0, splits,
        BLOCK=128,
        HAS_IGNORE=ignore_index is not None, HAS_INDEX=rows.index is not None,
        ALL=all_statistics, ARGMAX=best is not None,
    )  # fmt: skip
    return statistics, argmax


def _empty_statistics(device: torch.device, argmax: bool) -> tuple[Tensor, Tensor | None]:
    statistics = torch.empty((STATISTICS, 0), dtype=torch.float32, device=device)
    return statistics, torch.empty(0, dtype=torch.int64, device=device) if argmax else None


@torch.no_grad()
def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    *,
    scale: float = 1.0, softcap: float = 0.0, temperature: float = 1.0,
    all_statistics: bool = True, argmax: bool = False,
    first_column: int = 0, ignore_index: int | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Statistics [6, n] of z = hidden @ weight^T (see `Transform`), and argmax [n] where asked for.

    `labels` index the whole vocabulary, `weight` holds its columns from `first_column` on. label_z
    is NaN for a label outside them. A row whose label is `ignore_index` reads as one logit of 0
    (max 0, sum_exp 1, the rest 0; argmax 0), so that whatever is made of it is finite. Without
    `all_statistics` the rows sum_z_exp, sum_exp2 and sum_z are 0.
    """
    n, vocabulary = hidden.shape[0], weight.shape[0]
    device = hidden.device
    if n == 0:
        return _empty_statistics(device, argmax)
    hidden, weight = tiles.aligned(hidden), tiles.aligned(weight)
    inner = hidden.shape[1]
    labels = labels.contiguous()
    config = config or default_config(hidden.dtype, n, hidden.device)
    row_blocks = triton.cdiv(n, config.block_rows)
    group = config.group(inner * hidden.element_size())
    splits, tiles_per_split = tiles.split_tiles(
        row_blocks, triton.cdiv(vocabulary, config.block_columns), device, group
    )
    with tiles.on_device(hidden):
        rows = Rows.where(None if ignore_index is None else labels != ignore_index, n)
        partial = torch.empty((splits, STATISTICS, n), dtype=torch.float32, device=device)
        best = torch.empty((splits, n), dtype=torch.int64, device=device) if argmax else None
        _linear_logprob_fwd_kernel[tiles.grid(row_blocks * splits)](
            hidden, weight, bias, labels, rows.index, rows.count, partial, best,
            hidden.stride(0), weight.stride(0), n, vocabulary, inner, first_column,
            tiles_per_split, splits, row_blocks, group,
            *Transform(scale, softcap, temperature).arguments,
            HAS_INDEX=rows.index is not None, ALL=all_statistics, ARGMAX=argmax,
            **_constants(config, hidden, bias, softcap),
        )  # fmt: skip
        return _merge(
            partial, best, labels, rows, vocabulary, first_column, ignore_index, all_statistics
        )


@torch.no_grad()
def backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
    coefficients: Tensor,
    *,
    scale: float = 1.0, softcap: float = 0.0, temperature: float = 1.0,
    first_column: int = 0, ignore_index: int | None = None,
    need_hidden: bool = True, need_weight: bool = True, need_bias: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dhidden, dweight, dbias) from `coefficients` [6, n] float32, the numbers of RowGradient.

    In order: lse, a, b, c, d, e. dweight is summed in float32 and rounded once; dbias is float32.
    Rows whose label is `ignore_index` get dhidden 0 and add nothing, whatever their content or
    coefficients. They are skipped when tiles are recomputed, not in the two cuBLAS products, whose
    size the host must know.
    """
    hidden, weight = tiles.inner_contiguous(hidden), tiles.inner_contiguous(weight)
    # For the tiles; the products take any width, and their results have it.
    x, w = tiles.aligned(hidden), tiles.aligned(weight)
    n, inner = x.shape
    labels = labels.contiguous()
    coefficients = coefficients.contiguous()
    config = config or default_config(hidden.dtype, n, hidden.device)
    group = config.group(inner * hidden.element_size())
    transform = Transform(scale, softcap, temperature)
    with tiles.on_device(hidden):
        rows = Rows.where(None if ignore_index is None else labels != ignore_index, n)

        def fill(dz: Tensor, first_row: int, chunk_first: int, bias_sums: Tensor | None) -> None:
            row_blocks, column_blocks = config.blocks(dz)
            _linear_logprob_bwd_kernel[tiles.grid(row_blocks * column_blocks)](
                x, w, bias, labels, coefficients, rows.index, rows.count, dz, bias_sums,
                x.stride(0), w.stride(0), dz.stride(0),
                0 if bias_sums is None else bias_sums.stride(0),
                n, inner, weight.shape[0], first_column,
                first_row, dz.shape[0], chunk_first, dz.shape[1], column_blocks, row_blocks, group,
                *transform.arguments,
                HAS_INDEX=rows.index is not None, NEED_BIAS=bias_sums is not None,
                **_constants(config, x, bias, softcap),
            )  # fmt: skip

        return tiles.chunked_backward(
            fill, hidden, weight, rows, config,
            need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
            workspace_bytes=workspace_bytes,
        )  # fmt: skip


@torch.no_grad()
def logits_statistics(
    logits: Tensor, labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0, softcap: float = 0.0, temperature: float = 1.0,
    all_statistics: bool = True, argmax: bool = False,
    first_column: int = 0, ignore_index: int | None = None,
    config: RowConfig = ROW,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`forward` on given logits [n, V]: one read of each row that counts, n V itemsize bytes."""
    n, vocabulary = logits.shape
    if n == 0:
        return _empty_statistics(logits.device, argmax)
    logits, labels = tiles.inner_contiguous(logits), labels.contiguous()
    block = config.columns(vocabulary)
    splits, tiles_per_split = config.splits(n, vocabulary, logits.device)
    with tiles.on_device(logits):
        partial = torch.empty((splits, STATISTICS, n), dtype=torch.float32, device=logits.device)
        best = torch.empty((splits, n), dtype=torch.int64, device=logits.device) if argmax else None
        _logits_logprob_fwd_kernel[tiles.grid(n * splits)](
            logits, bias, labels, partial, best,
            logits.stride(0), n, vocabulary, first_column, ignore_index or 0,
            tiles_per_split, splits,
            *Transform(scale, softcap, temperature).arguments,
            BLOCK_COLUMNS=block, HAS_BIAS=bias is not None, HAS_CAP=softcap > 0,
            HAS_IGNORE=ignore_index is not None, ALL=all_statistics, ARGMAX=argmax,
            num_warps=config.num_warps,
        )  # fmt: skip
        return _merge(
            partial, best, labels, Rows(n), vocabulary, first_column, ignore_index, all_statistics
        )


@torch.no_grad()
def logits_gradient(
    logits: Tensor, labels: Tensor, coefficients: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0, softcap: float = 0.0, temperature: float = 1.0,
    first_column: int = 0, ignore_index: int | None = None,
    out: Tensor | None = None,
    config: RowConfig = ROW,
) -> Tensor:  # fmt: skip
    """dlogits [n, V] in the dtype of `logits`, into `out` (which may be `logits`) where given.

    2 n V itemsize bytes. Its column sums are the gradient of the bias.
    """
    n, vocabulary = logits.shape
    logits, labels = tiles.inner_contiguous(logits), labels.contiguous()
    to = tiles.gradient_like(logits, out)
    if n == 0:
        return to
    block = config.columns(vocabulary)
    column_blocks = triton.cdiv(vocabulary, block)
    with tiles.on_device(logits):
        _logits_logprob_bwd_kernel[tiles.grid(n * column_blocks)](
            logits, bias, labels, coefficients.contiguous(), to,
            logits.stride(0), to.stride(0), n, vocabulary, first_column, ignore_index or 0,
            column_blocks,
            *Transform(scale, softcap, temperature).arguments,
            BLOCK_COLUMNS=block, HAS_BIAS=bias is not None, HAS_CAP=softcap > 0,
            HAS_IGNORE=ignore_index is not None,
            num_warps=config.num_warps,
        )  # fmt: skip
    return tiles.rounded(to, logits.dtype, out)
