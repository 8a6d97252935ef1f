# SPDX-License-Identifier: Apache-2.0
"""Divergences between the lm_heads of a student and a teacher, and their gradient, without the logits.

Idea: the two lm_heads share rows and vocabulary, not width. A program owns BLOCK_ROWS rows and one
split of the vocabulary; for each tile it makes the student's product, then the teacher's, both kept
as float32 in registers, and folds the pair into eight running sums per row (two softmax
normalisers, two entropies, two cross terms), from which forward KL, reverse KL and both entropies
follow. Jensen-Shannon needs the normalisers first, hence a second pass (`mixture`); the gradient is
a third, whose tiles go through the bounded workspace as in linear_logprob. Splits write partial
sums that a second kernel adds in ascending order: the result does not depend on scheduling.
Layout: student [n, Ds] x [V, Ds], teacher [n, Dt] x [V, Dt], rows of any stride; statistics [8, n],
mixture [2, n] and coefficients [7, n] float32 in the order of csrc/logprob/rows.hpp.
Flops: a pass 2 n V (Ds + Dt), the gradient 4 n V Ds more. Bytes of a pass, each operand once:
(V + n) (Ds + Dt) itemsize. On given logits (`Logits`) a pass reads 2 n V itemsize bytes instead.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
)

# max, sum_exp, sum_z_exp of student, then teacher; sum exp(t) (t - s), sum exp(s) (s - t)
STATISTICS = 8

# By counting for Hopper. Two float32 tiles of 128 x 128 are 128 registers per thread of 8 warps,
# what one lm_head spends on 128 x 256; four stages of (128 + 128) * 64 * 2 B are 128 KiB.
HALF = Config(128, 128, 64, num_warps=8, num_stages=4)
HALF_FEW_ROWS = Config(64, 128, 64, num_warps=4, num_stages=4)
# Consumer cards have 99 KiB of shared memory.
HALF_SMALL_SHARED = Config(128, 128, 64, num_warps=8, num_stages=2)
FLOAT = Config(64, 64, 32, num_warps=4, num_stages=2)
# Two rows per program: half the columns of the kernels of one lm_head for the same registers.
ROW = RowConfig(block_columns=2048)


class LmHead(NamedTuple):
    """One model's lm_head: hidden [n, D], weight [V, D], bias [V] float32 or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    transform: Transform = Transform()


class Logits(NamedTuple):
    """One model's logits [n, V] before bias and transform."""

    logits: Tensor
    bias: Tensor | None = None
    transform: Transform = Transform()


def default_config(student: LmHead, teacher: LmHead) -> Config:
    n, device = student.hidden.shape[0], student.hidden.device
    if torch.float32 in (student.hidden.dtype, teacher.hidden.dtype):
        return FLOAT
    if tiles.shared_memory(device) < 128 * 1024:
        return HALF_SMALL_SHARED
    return HALF_FEW_ROWS if n <= 64 else HALF


@triton.jit
def _raise(m, at_least):
    # The new maximum, what sums relative to the old one are multiplied by, and a finite shift.
    new_max = tl.maximum(m, at_least)
    shift = finite_shift(new_max)
    return new_max, tl.exp(m - shift), shift


@triton.jit
def _start(BLOCK: tl.constexpr):
    zero = tl.zeros((BLOCK,), tl.float32)
    return zero - float("inf"), zero, zero, zero - float("inf"), zero, zero, zero, zero


@triton.jit
def _log_mixture(p, q, beta):
    beta = tl.cast(beta, tl.float32)
    return tl.log(beta * p + (1.0 - beta) * q + 1e-37)


@triton.jit
def _fold(
    s, t, start, vocabulary, beta,
    sm, ss, ssz, tm, ts, tsz, tg, sg,  # MIXTURE: sm and tm are the log-sum-exps, tg and sg the KLs
    BLOCK_COLUMNS: tl.constexpr,
    MIXTURE: tl.constexpr,
):  # fmt: skip
    # Only the last tile reaches past the vocabulary: all threads take this branch alike.
    if start + BLOCK_COLUMNS > vocabulary:
        inside = within(start, vocabulary, BLOCK_COLUMNS)[None, :]
        s = tl.where(inside, s, float("-inf"))
        t = tl.where(inside, t, float("-inf"))
    if MIXTURE:
        log_q = s - sm[:, None]
        log_p = t - tm[:, None]
        q = tl.exp(log_q)
        p = tl.exp(log_p)
        log_m = _log_mixture(p, q, beta)
        tg += tl.sum(weighted(p, log_p - log_m), 1)
        sg += tl.sum(weighted(q, log_q - log_m), 1)
    else:
        sm, s_rescale, s_shift = _raise(sm, tl.max(s, 1))
        tm, t_rescale, t_shift = _raise(tm, tl.max(t, 1))
        q = tl.exp(s - s_shift[:, None])
        p = tl.exp(t - t_shift[:, None])
        gap = t - s
        ss = ss * s_rescale + tl.sum(q, 1)
        ssz = ssz * s_rescale + tl.sum(weighted(q, s), 1)
        sg = sg * s_rescale - tl.sum(silenced(q, gap), 1)
        ts = ts * t_rescale + tl.sum(p, 1)
        tsz = tsz * t_rescale + tl.sum(weighted(p, t), 1)
        tg = tg * t_rescale + tl.sum(silenced(p, gap), 1)
    return sm, ss, ssz, tm, ts, tsz, tg, sg


@triton.jit
def _store_partial(
    partial_ptr, split, position, row, mask, n,
    sm, ss, ssz, tm, ts, tsz, tg, sg,
    MIXTURE: tl.constexpr,
):  # fmt: skip
    if MIXTURE:
        to = partial_ptr + split * 2 * n + row
        tl.store(to, tg, mask=mask)
        tl.store(to + n, sg, mask=mask)
    else:
        to = partial_ptr + split * 8 * n + position
        tl.store(to, sm, mask=mask)
        tl.store(to + n, ss, mask=mask)
        tl.store(to + 2 * n, ssz, mask=mask)
        tl.store(to + 3 * n, tm, mask=mask)
        tl.store(to + 4 * n, ts, mask=mask)
        tl.store(to + 5 * n, tsz, mask=mask)
        tl.store(to + 6 * n, tg, mask=mask)
        tl.store(to + 7 * n, sg, mask=mask)


@triton.jit
def _gradient_of_student(
    s, t, coefficient_ptr, row, mask, n, beta, scale, cap, inverse_temperature,
    HAS_CAP: tl.constexpr,
    JSD: tl.constexpr,
):  # fmt: skip
    at = coefficient_ptr + row
    lse_s = tl.load(at, mask=mask, other=0.0)[:, None]
    lse_t = tl.load(at + n, mask=mask, other=0.0)[:, None]
    forward = tl.load(at + 2 * n, mask=mask, other=0.0)[:, None]
    reverse = tl.load(at + 3 * n, mask=mask, other=0.0)[:, None]
    reverse_kl = tl.load(at + 5 * n, mask=mask, other=0.0)[:, None]
    log_q = s - lse_s
    log_p = t - lse_t
    q = tl.exp(log_q)
    p = tl.exp(log_p)
    g = forward * (q - p)
    g += tl.where(reverse != 0.0, reverse * silenced(q, log_q - log_p - reverse_kl), 0.0)
    if JSD:
        jsd = (1.0 - tl.cast(beta, tl.float32)) * tl.load(at + 4 * n, mask=mask, other=0.0)[:, None]
        student_kl = tl.load(at + 6 * n, mask=mask, other=0.0)[:, None]
        g += jsd * weighted(q, log_q - _log_mixture(p, q, beta) - student_kl)
    return g * slope_at(s, scale, cap, inverse_temperature, HAS_CAP)


@triton.jit
def _two_tiles(
    row, columns, vocabulary,
    xs_ptr, ws_ptr, bs_ptr, stride_xsn, stride_wsv, inner_s, scale_s, cap_s, inverse_s,
    xt_ptr, wt_ptr, bt_ptr, stride_xtn, stride_wtv, inner_t, scale_t, cap_t, inverse_t,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_S: tl.constexpr, BIAS_S: tl.constexpr, CAP_S: tl.constexpr,
    EVEN_T: tl.constexpr, BIAS_T: tl.constexpr, CAP_T: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    columns = tl.minimum(columns, vocabulary - 1)
    s = tile_product(
        xs_ptr, row, stride_xsn, ws_ptr, columns, stride_wsv, bs_ptr, inner_s,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, EVEN_S, BIAS_S, UPCAST,
    )  # fmt: skip
    t = tile_product(
        xt_ptr, row, stride_xtn, wt_ptr, columns, stride_wtv, bt_ptr, inner_t,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER, EVEN_T, BIAS_T, UPCAST,
    )  # fmt: skip
    s = to_logit(s, scale_s, cap_s, inverse_s, CAP_S)
    return s, to_logit(t, scale_t, cap_t, inverse_t, CAP_T)


@triton.jit(do_not_specialize=["n", "splits", "tiles_per_split", "row_blocks", "group"])
def _linear_divergence_fwd_kernel(
    xs_ptr, ws_ptr, bs_ptr, stride_xsn, stride_wsv, inner_s, scale_s, cap_s, inverse_s,
    xt_ptr, wt_ptr, bt_ptr, stride_xtn, stride_wtv, inner_t, scale_t, cap_t, inverse_t,
    index_ptr,  # [n], rows that count first
    count_ptr,  # [1]
    coefficient_ptr,  # MIXTURE: [2, n], the log-sum-exps
    partial_ptr,  # [splits, 8, n], n in the order of index; MIXTURE: [splits, 2, n], rows in place
    n, vocabulary, tiles_per_split, splits, row_blocks, group, beta,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_S: tl.constexpr, BIAS_S: tl.constexpr, CAP_S: tl.constexpr,
    EVEN_T: tl.constexpr, BIAS_T: tl.constexpr, CAP_T: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    MIXTURE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    row_block, split = locate(row_blocks, splits, group)
    count = count_rows(count_ptr, n, HAS_INDEX)
    if row_block * BLOCK_ROWS >= count:
        return
    position = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    counts = position < count
    row = rows_at(position, counts, index_ptr, HAS_INDEX)
    sm, ss, ssz, tm, ts, tsz, tg, sg = _start(BLOCK_ROWS)
    if MIXTURE:
        sm = tl.load(coefficient_ptr + row, mask=counts, other=0.0)
        tm = tl.load(coefficient_ptr + n + row, mask=counts, other=0.0)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocabulary, BLOCK_COLUMNS))
    for tile in range(split * tiles_per_split, last):
        start = tile * BLOCK_COLUMNS
        s, t = _two_tiles(
            row, start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64), vocabulary,
            xs_ptr, ws_ptr, bs_ptr, stride_xsn, stride_wsv, inner_s, scale_s, cap_s, inverse_s,
            xt_ptr, wt_ptr, bt_ptr, stride_xtn, stride_wtv, inner_t, scale_t, cap_t, inverse_t,
            BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER,
            EVEN_S, BIAS_S, CAP_S, EVEN_T, BIAS_T, CAP_T, UPCAST,
        )  # fmt: skip
        sm, ss, ssz, tm, ts, tsz, tg, sg = _fold(
            s, t, start, vocabulary, beta, sm, ss, ssz, tm, ts, tsz, tg, sg, BLOCK_COLUMNS, MIXTURE
        )
    _store_partial(
        partial_ptr, split, position, row, counts, n, sm, ss, ssz, tm, ts, tsz, tg, sg, MIXTURE
    )


@triton.jit(do_not_specialize=["n", "splits", "tiles_per_split"])
def _logits_divergence_fwd_kernel(
    s_ptr, bs_ptr, stride_sn, scale_s, cap_s, inverse_s,
    t_ptr, bt_ptr, stride_tn, scale_t, cap_t, inverse_t,
    index_ptr,
    count_ptr,
    coefficient_ptr,
    partial_ptr,
    n, vocabulary, tiles_per_split, splits, beta,
    BLOCK_COLUMNS: tl.constexpr,
    BIAS_S: tl.constexpr, CAP_S: tl.constexpr, BIAS_T: tl.constexpr, CAP_T: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    MIXTURE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    split = program % splits
    count = count_rows(count_ptr, n, HAS_INDEX)
    if program // splits >= count:
        return
    position = program // splits + tl.zeros((1,), tl.int64)
    counts = position < count
    row = rows_at(position, counts, index_ptr, HAS_INDEX)
    sm, ss, ssz, tm, ts, tsz, tg, sg = _start(1)
    if MIXTURE:
        sm = tl.load(coefficient_ptr + row)
        tm = tl.load(coefficient_ptr + n + row)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(vocabulary, BLOCK_COLUMNS))
    for tile in range(split * tiles_per_split, last):
        start = tile * BLOCK_COLUMNS
        columns = start + tl.arange(0, BLOCK_COLUMNS).to(tl.int64)
        inside = within(start, vocabulary, BLOCK_COLUMNS)
        s = row_tile(s_ptr, row, stride_sn, bs_ptr, columns, inside, BIAS_S)
        t = row_tile(t_ptr, row, stride_tn, bt_ptr, columns, inside, BIAS_T)
        s = to_logit(s, scale_s, cap_s, inverse_s, CAP_S)
        t = to_logit(t, scale_t, cap_t, inverse_t, CAP_T)
        sm, ss, ssz, tm, ts, tsz, tg, sg = _fold(
            s, t, start, vocabulary, beta, sm, ss, ssz, tm, ts, tsz, tg, sg, BLOCK_COLUMNS, MIXTURE
        )
    _store_partial(
        partial_ptr, split, position, row, counts, n, sm, ss, ssz, tm, ts, tsz, tg, sg, MIXTURE
    )


@triton.jit(do_not_specialize=["n", "splits"])
def _merge_divergence_fwd_kernel(
    partial_ptr,  # [splits, 8, n], n in the order of index
    index_ptr,
    count_ptr,
    statistics_ptr,  # [8, n]
    n, splits,
    BLOCK: tl.constexpr,
    HAS_INDEX: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = position < n
    row = position
    if HAS_INDEX:
        row = tl.load(index_ptr + position, mask=mask, other=0)
    counts = position < count_rows(count_ptr, n, HAS_INDEX)
    sm, ss, ssz, tm, ts, tsz, tg, sg = _start(BLOCK)
    at = partial_ptr + position
    for _ in range(splits):
        next_m = tl.load(at, mask=counts, other=0.0)
        sm, old, shift = _raise(sm, next_m)
        new = tl.exp(next_m - shift)
        ss = ss * old + tl.load(at + n, mask=counts, other=0.0) * new
        ssz = ssz * old + tl.load(at + 2 * n, mask=counts, other=0.0) * new
        sg = sg * old + tl.load(at + 7 * n, mask=counts, other=0.0) * new
        next_m = tl.load(at + 3 * n, mask=counts, other=0.0)
        tm, old, shift = _raise(tm, next_m)
        new = tl.exp(next_m - shift)
        ts = ts * old + tl.load(at + 4 * n, mask=counts, other=0.0) * new
        tsz = tsz * old + tl.load(at + 5 * n, mask=counts, other=0.0) * new
        tg = tg * old + tl.load(at + 6 * n, mask=counts, other=0.0) * new
        at += 8 * n
    to = statistics_ptr + row
    tl.store(to, tl.where(counts, sm, 0.0), mask=mask)
    tl.store(to + n, tl.where(counts, ss, 1.0), mask=mask)
    tl.store(to + 2 * n, tl.where(counts, ssz, 0.0), mask=mask)
    tl.store(to + 3 * n, tl.where(counts, tm, 0.0), mask=mask)
    tl.store(to + 4 * n, tl.where(counts, ts, 1.0), mask=mask)
    tl.store(to + 5 * n, tl.where(counts, tsz, 0.0), mask=mask)
    tl.store(to + 6 * n, tl.where(counts, tg, 0.0), mask=mask)
    tl.store(to + 7 * n, tl.where(counts, sg, 0.0), mask=mask)


@triton.jit(do_not_specialize=CHUNK_SIZES)
def _linear_divergence_bwd_kernel(
    xs_ptr, ws_ptr, bs_ptr, stride_xsn, stride_wsv, inner_s, scale_s, cap_s, inverse_s,
    xt_ptr, wt_ptr, bt_ptr, stride_xtn, stride_wtv, inner_t, scale_t, cap_t, inverse_t,
    index_ptr,
    count_ptr,
    coefficient_ptr,  # [7, n]
    dz_ptr,  # [rows, columns] of the chunk, rows in the order of index
    dbias_ptr,  # [row_blocks, columns]
    stride_dn, stride_bn, n, vocabulary,
    first_row, chunk_rows, chunk_first, chunk_columns, column_blocks, row_blocks, group, beta,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_S: tl.constexpr, BIAS_S: tl.constexpr, CAP_S: tl.constexpr,
    EVEN_T: tl.constexpr, BIAS_T: tl.constexpr, CAP_T: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    JSD: tl.constexpr,
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
    s, t = _two_tiles(
        row, chunk_first + column, vocabulary,
        xs_ptr, ws_ptr, bs_ptr, stride_xsn, stride_wsv, inner_s, scale_s, cap_s, inverse_s,
        xt_ptr, wt_ptr, bt_ptr, stride_xtn, stride_wtv, inner_t, scale_t, cap_t, inverse_t,
        BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_INNER,
        EVEN_S, BIAS_S, CAP_S, EVEN_T, BIAS_T, CAP_T, UPCAST,
    )  # fmt: skip
    g = _gradient_of_student(
        s, t, coefficient_ptr, row, counts, n, beta, scale_s, cap_s, inverse_s, CAP_S, JSD
    )
    g = tl.where(counts[:, None], g, 0.0)
    store_chunk_tile(g, to, to_mask, dbias_ptr, stride_bn, row_block, column, inside, NEED_BIAS)


@triton.jit(do_not_specialize=["n", "column_blocks"])
def _logits_divergence_bwd_kernel(
    s_ptr, bs_ptr, stride_sn, scale_s, cap_s, inverse_s,
    t_ptr, bt_ptr, stride_tn, scale_t, cap_t, inverse_t,
    valid_ptr,  # [n]
    coefficient_ptr,
    ds_ptr,  # may be s_ptr: each element is read, then written, by one program
    stride_dn, n, vocabulary, column_blocks, beta,
    BLOCK_COLUMNS: tl.constexpr,
    BIAS_S: tl.constexpr, CAP_S: tl.constexpr, BIAS_T: tl.constexpr, CAP_T: tl.constexpr,
    HAS_VALID: tl.constexpr,
    JSD: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row = program // column_blocks + tl.zeros((1,), tl.int64)
    start = program % column_blocks * BLOCK_COLUMNS
    columns = start + tl.arange(0, BLOCK_COLUMNS)
    inside = within(start, vocabulary, BLOCK_COLUMNS)
    to = ds_ptr + row[:, None] * stride_dn + columns[None, :]
    if HAS_VALID:
        if tl.load(valid_ptr + program // column_blocks) == 0:
            nothing = tl.zeros((1, BLOCK_COLUMNS), ds_ptr.dtype.element_ty)
            tl.store(to, nothing, mask=inside[None, :])
            return
    s = row_tile(s_ptr, row, stride_sn, bs_ptr, columns, inside, BIAS_S)
    t = row_tile(t_ptr, row, stride_tn, bt_ptr, columns, inside, BIAS_T)
    s = to_logit(s, scale_s, cap_s, inverse_s, CAP_S)
    t = to_logit(t, scale_t, cap_t, inverse_t, CAP_T)
    g = _gradient_of_student(
        s, t, coefficient_ptr, row, row < n, n, beta, scale_s, cap_s, inverse_s, CAP_S, JSD
    )
    tl.store(to, g.to(ds_ptr.dtype.element_ty), mask=inside[None, :])


def _prepare(
    student: LmHead | Logits, teacher: LmHead | Logits, config: Config | RowConfig, vocabulary: int
) -> tuple[list[Any], dict[str, Any]]:
    """What every kernel over two lm_heads takes: arguments, and constants by name."""
    arguments: list[Any] = []
    constants: dict[str, Any]
    if isinstance(config, Config):
        constants = config.constants(student[0].dtype, teacher[0].dtype)
    else:
        constants = {"BLOCK_COLUMNS": config.columns(vocabulary), "num_warps": config.num_warps}
    for head, name in ((student, "S"), (teacher, "T")):
        if isinstance(head, LmHead) and isinstance(config, Config):
            x, weight = tiles.aligned(head.hidden), tiles.aligned(head.weight)
            inner = x.shape[1]
            arguments += [x, weight, head.bias, x.stride(0), weight.stride(0), inner]
            constants[f"EVEN_{name}"] = inner % config.block_inner == 0
        else:
            x = tiles.inner_contiguous(head[0])
            arguments += [x, head.bias, x.stride(0)]
        arguments += head.transform.arguments
        constants[f"BIAS_{name}"] = head.bias is not None
        constants[f"CAP_{name}"] = head.transform.softcap > 0
    return arguments, constants


def _group(config: Config, student: LmHead, teacher: LmHead) -> int:
    return config.group(
        sum(h.hidden.shape[1] * h.hidden.element_size() for h in (student, teacher))
    )


def _merge(partial: Tensor, rows: Rows) -> Tensor:
    splits, _, n = partial.shape
    merged = torch.empty((STATISTICS, n), dtype=torch.float32, device=partial.device)
    _merge_divergence_fwd_kernel[tiles.grid(triton.cdiv(n, 128))](
        partial, rows.index, rows.count, merged, n, splits,
        BLOCK=128, HAS_INDEX=rows.index is not None,
    )  # fmt: skip
    return merged


def _forward(
    student: LmHead | Logits, teacher: LmHead | Logits, valid: Tensor | None, lses: Tensor | None,
    beta: float, config: Config | RowConfig | None,
) -> Tensor:  # fmt: skip
    n, device = student[0].shape[0], student[0].device
    is_mixture = lses is not None
    if n == 0:
        return torch.empty((2 if is_mixture else STATISTICS, 0), dtype=torch.float32, device=device)
    blocks: list[int] = []
    kernel: Any
    if isinstance(student, LmHead) and isinstance(teacher, LmHead):
        kernel, vocabulary = _linear_divergence_fwd_kernel, student.weight.shape[0]
        chosen = config or default_config(student, teacher)
        assert isinstance(chosen, Config)
        row_blocks, group = triton.cdiv(n, chosen.block_rows), _group(chosen, student, teacher)
        splits, tiles_per_split = tiles.split_tiles(
            row_blocks, triton.cdiv(vocabulary, chosen.block_columns), device, group
        )
        programs, blocks = row_blocks * splits, [row_blocks, group]
    else:
        kernel, vocabulary = _logits_divergence_fwd_kernel, student[0].shape[1]
        chosen = config or ROW
        assert isinstance(chosen, RowConfig)
        splits, tiles_per_split = chosen.splits(n, vocabulary, device)
        programs = n * splits
    arguments, constants = _prepare(student, teacher, chosen, vocabulary)
    shape = (splits, 2 if is_mixture else STATISTICS, n)
    with tiles.on_device(student[0]):
        rows = Rows.where(valid, n)
        # The mixture's rows are in place: those that do not count stay 0.
        make = torch.zeros if is_mixture else torch.empty
        partial = make(shape, dtype=torch.float32, device=device)
        kernel[tiles.grid(programs)](
            *arguments, rows.index, rows.count, lses, partial,
            n, vocabulary, tiles_per_split, splits, *blocks, float(beta),
            HAS_INDEX=rows.index is not None, MIXTURE=is_mixture, **constants,
        )  # fmt: skip
        return partial.sum(0) if is_mixture else _merge(partial, rows)


@torch.no_grad()
def statistics(
    student: LmHead | Logits, teacher: LmHead | Logits, *,
    valid: Tensor | None = None, config: Config | RowConfig | None = None,
) -> Tensor:  # fmt: skip
    """[8, n] in the order of DivergenceStatistic, from two lm_heads or from two tensors of logits.

    A row with `valid` False never reaches a product and reads as one logit of 0 in both heads
    (max 0, sum_exp 1, the rest 0), so that its divergences are 0.
    """
    return _forward(student, teacher, valid, None, 0.0, config)


@torch.no_grad()
def mixture(
    student: LmHead | Logits, teacher: LmHead | Logits, coefficients: Tensor, *,
    beta: float = 0.5, valid: Tensor | None = None, config: Config | RowConfig | None = None,
) -> Tensor:  # fmt: skip
    """[2, n]: KL(p||M) and KL(q||M), M = beta p + (1 - beta) q, 0 where a row is not `valid`.

    The first two rows of `coefficients` are the log-sum-exps of student and teacher.
    """
    return _forward(student, teacher, valid, coefficients.contiguous(), beta, config)


@torch.no_grad()
def gradient(
    student: LmHead, teacher: LmHead, coefficients: Tensor, *,
    beta: float = 0.5, jsd: bool = False, valid: Tensor | None = None,
    need_hidden: bool = True, need_weight: bool = True, need_bias: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES, config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The student's (dhidden, dweight, dbias) from `coefficients` [7, n] float32.

    Their rows are those of DivergenceGradient: lse_student, lse_teacher, the upstream weights of
    forward KL, reverse KL and (with `jsd`) JSD, then KL(q||p) and KL(q||M). dweight is summed in
    float32 and rounded once. A row with `valid` False gets dhidden 0 and adds nothing.
    """
    n, vocabulary = student.hidden.shape[0], student.weight.shape[0]
    chosen = config or default_config(student, teacher)
    arguments, constants = _prepare(student, teacher, chosen, vocabulary)
    group = _group(chosen, student, teacher)
    coefficients = coefficients.contiguous()
    with tiles.on_device(student.hidden):
        rows = Rows.where(valid, n)

        def fill(dz: Tensor, first_row: int, chunk_first: int, bias_sums: Tensor | None) -> None:
            row_blocks, column_blocks = chosen.blocks(dz)
            _linear_divergence_bwd_kernel[tiles.grid(row_blocks * column_blocks)](
                *arguments, rows.index, rows.count, coefficients, dz, bias_sums,
                dz.stride(0), 0 if bias_sums is None else bias_sums.stride(0), n, vocabulary,
                first_row, dz.shape[0], chunk_first, dz.shape[1], column_blocks, row_blocks, group,
                float(beta),
                HAS_INDEX=rows.index is not None, JSD=jsd, NEED_BIAS=bias_sums is not None,
                **constants,
            )  # fmt: skip

        return tiles.chunked_backward(
            fill, tiles.inner_contiguous(student.hidden), student.weight, rows, chosen,
            need_hidden=need_hidden, need_weight=need_weight, need_bias=need_bias,
            workspace_bytes=workspace_bytes,
        )  # fmt: skip


@torch.no_grad()
def logits_gradient(
    student: Logits, teacher: Logits, coefficients: Tensor, *,
    beta: float = 0.5, jsd: bool = False, valid: Tensor | None = None,
    out: Tensor | None = None, config: RowConfig = ROW,
) -> Tensor:  # fmt: skip
    """Gradient [n, V] of the student's logits in their dtype, into `out` (which may be them)."""
    x = student.logits
    n, vocabulary = x.shape
    to = tiles.gradient_like(x, out)
    if n == 0:
        return to
    column_blocks = triton.cdiv(vocabulary, config.columns(vocabulary))
    arguments, constants = _prepare(student, teacher, config, vocabulary)
    with tiles.on_device(x):
        _logits_divergence_bwd_kernel[tiles.grid(n * column_blocks)](
            *arguments, None if valid is None else valid.contiguous().view(torch.uint8),
            coefficients.contiguous(), to, to.stride(0), n, vocabulary, column_blocks, float(beta),
            HAS_VALID=valid is not None, JSD=jsd, **constants,
        )  # fmt: skip
    return tiles.rounded(to, x.dtype, out)
