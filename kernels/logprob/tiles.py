# SPDX-License-Identifier: Apache-2.0
"""What the kernels of this room share: the product of one tile, the map from logit to z, the rows
that count, and the products of backward over a bounded workspace.

Layout: activations [n, D] and weights [V, D], last dimension contiguous, rows of any stride. A tile
is [BLOCK_ROWS, BLOCK_COLUMNS] in registers, float32; its operands pass through shared memory,
BLOCK_INNER of D at a time. Rows that count come first in `Rows.index`; how many they are stays on
the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import tiles
from ..core.tiles import aligned as aligned
from ..core.tiles import locate as locate
from ..core.tiles import multiprocessors, on_device, stored, upcast
from ..core.tiles import shared_memory as shared_memory

WORKSPACE_BYTES = 512 * 2**20
grid = partial(tiles.grid, room="logprob")

# Sizes that only bound loops and masks: a kernel per divisibility of each would buy nothing. Not
# chunk_columns, which masks the stores of dz: only where 16 is known to divide it are they 128 bit.
CHUNK_SIZES = [
    *("n", "first_row", "chunk_rows", "chunk_first"),
    *("column_blocks", "row_blocks", "group"),
]


@dataclass(frozen=True)
class Transform:
    """z = softcap(scale (u + bias)) / temperature, softcap(y) = cap tanh(y / cap); 0 is none."""

    scale: float = 1.0
    softcap: float = 0.0
    temperature: float = 1.0

    @property
    def arguments(self) -> tuple[float, float, float]:
        return float(self.scale), float(self.softcap), 1.0 / float(self.temperature)


@dataclass(frozen=True)
class Config:
    """Launch choices of one call; each file says how its defaults follow from counting."""

    block_rows: int
    block_columns: int
    block_inner: int
    num_warps: int
    num_stages: int
    # Rows that programs running at the same time share: 16 MiB of a 50 MiB L2, the rest is for the
    # weight tiles they stream. At n = 8192, D = 4096 all row blocks at once would be 64 MiB.
    l2_bytes: int = 16 * 2**20
    # Rows per workspace chunk: products of 16 Ki x 4 Ki do 1 Ki flop and more per byte of the
    # float32 sums they update, 4 times what an H100 needs.
    workspace_rows: int = 16384

    def group(self, row_bytes: int) -> int:
        return max(1, self.l2_bytes // (self.block_rows * row_bytes))

    def blocks(self, tile: Tensor) -> tuple[int, int]:
        """Blocks of rows and of columns that cover a tile."""
        return triton.cdiv(tile.shape[0], self.block_rows), triton.cdiv(
            tile.shape[1], self.block_columns
        )

    def constants(self, *dtypes: torch.dtype) -> dict[str, Any]:
        """What every kernel with a product takes by name; `dtypes`: of what is multiplied."""
        return {
            "BLOCK_ROWS": self.block_rows,
            "BLOCK_COLUMNS": self.block_columns,
            "BLOCK_INNER": self.block_inner,
            "UPCAST": any(upcast(dtype) for dtype in dtypes),
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@dataclass(frozen=True)
class RowConfig:
    """Launch choices of the row kernels on given logits: 4 Ki logits are 16 registers per thread of
    8 warps; four programs per SM keep 32 KiB of half precision in flight, what latency times
    bandwidth asks.
    """

    block_columns: int = 4096
    num_warps: int = 8
    programs_per_sm: int = 4

    def columns(self, vocabulary: int) -> int:
        return min(self.block_columns, max(128, triton.next_power_of_2(vocabulary)))

    def splits(self, n: int, vocabulary: int, device: torch.device) -> tuple[int, int]:
        """(splits, tiles per split) of each row: one split unless there are few rows."""
        tiles = triton.cdiv(vocabulary, self.columns(vocabulary))
        wanted = triton.cdiv(self.programs_per_sm * multiprocessors(device), n)
        per_split = triton.cdiv(tiles, min(tiles, wanted))
        return triton.cdiv(tiles, per_split), per_split


@triton.jit
def _tanh(x):
    # Below 0.4 the exponential form cancels; there the next term of the series is below 6e-8 of x.
    square = x * x
    series = square * (-1382.0 / 155925.0) + 62.0 / 2835.0
    series = series * square - 17.0 / 315.0
    series = series * square + 2.0 / 15.0
    series = series * square - 1.0 / 3.0
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.4, x + x * square * series, tl.where(x < 0.0, -far, far))


@triton.jit
def to_logit(u, scale, cap, inverse_temperature, HAS_CAP: tl.constexpr):
    y = u * tl.cast(scale, tl.float32)
    if HAS_CAP:
        cap = tl.cast(cap, tl.float32)
        y = cap * _tanh(y / cap)
    return y * tl.cast(inverse_temperature, tl.float32)


@triton.jit
def slope_at(z, scale, cap, inverse_temperature, HAS_CAP: tl.constexpr):
    slope = tl.cast(scale, tl.float32) * tl.cast(inverse_temperature, tl.float32)
    if HAS_CAP:
        t = z / (tl.cast(cap, tl.float32) * tl.cast(inverse_temperature, tl.float32))
        slope = slope * (1.0 - t * t)
    return slope


@triton.jit
def finite_shift(maximum):
    # exp(z - shift) of a row of -inf is 0, not NaN.
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def weighted(weight, value):
    # A weight of 0 silences its value, even one of -inf: 0 times the lowest number is 0. NaN has a
    # NaN weight and passes. One instruction less per logit than a comparison and a select.
    return weight * tl.maximum(value, -3.4028234663852886e38)


@triton.jit
def silenced(weight, value):
    # The same for a value that may be +inf or NaN where the weight is 0.
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def within(start, vocabulary, BLOCK_COLUMNS: tl.constexpr):
    # 32 bits inside the tile: a 64 bit comparison per logit costs two instructions.
    remaining = tl.minimum(vocabulary - start, BLOCK_COLUMNS).to(tl.int32)
    return tl.arange(0, BLOCK_COLUMNS) < remaining


@triton.jit
def within_label(label, start, BLOCK_COLUMNS: tl.constexpr):
    # [rows, BLOCK_COLUMNS]: where the tile holds the label of its row.
    at = label - start
    at = tl.where((at >= 0) & (at < BLOCK_COLUMNS), at, -1).to(tl.int32)
    return tl.arange(0, BLOCK_COLUMNS)[None, :] == at[:, None]


@triton.jit
def tile_product(
    x_ptr,
    rows,  # [BLOCK_ROWS] int64, all valid
    stride_xn,
    w_ptr,
    columns,  # [BLOCK_COLUMNS] int64, all valid
    stride_wv,
    bias_ptr,
    inner,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_INNER: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    k = tl.arange(0, BLOCK_INNER)
    x_ptrs = x_ptr + rows[:, None] * stride_xn + k[None, :]
    w_ptrs = w_ptr + columns[None, :] * stride_wv + k[:, None]
    u = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        if EVEN_INNER:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            x = tl.load(x_ptrs, mask=k[None, :] < inner - start, other=0.0)
            w = tl.load(w_ptrs, mask=k[:, None] < inner - start, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        u = tl.dot(x, w, u, input_precision="ieee")
        x_ptrs += BLOCK_INNER
        w_ptrs += BLOCK_INNER
    if HAS_BIAS:
        u += tl.load(bias_ptr + columns)[None, :]
    return u


@triton.jit
def row_tile(logits_ptr, row, stride_ln, bias_ptr, columns, inside, HAS_BIAS: tl.constexpr):
    u = tl.load(
        logits_ptr + row[:, None] * stride_ln + columns[None, :], mask=inside[None, :], other=0.0
    ).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + columns, mask=inside, other=0.0)[None, :]
    return u


@triton.jit
def rows_at(position, counts, index_ptr, HAS_INDEX: tl.constexpr):
    # The rows that positions among those that count stand for; row 0 for the others.
    if HAS_INDEX:
        row = tl.load(index_ptr + position, mask=counts, other=0)
    else:
        row = tl.where(counts, position, 0)
    return row


@triton.jit
def count_rows(count_ptr, n, HAS_INDEX: tl.constexpr):
    if HAS_INDEX:
        count = tl.load(count_ptr)
    else:
        count = tl.cast(n, tl.int64)
    return count


@triton.jit
def chunk_tile(
    dz_ptr, stride_dn, row_block, column_block, chunk_rows, chunk_columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Row and column numbers in the workspace chunk, where the tile goes, and which of it exists.
    row = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = within(column_block * BLOCK_COLUMNS, chunk_columns, BLOCK_COLUMNS)
    to = dz_ptr + row[:, None] * stride_dn + column[None, :]
    return row, column, inside, to, (row < chunk_rows)[:, None] & inside[None, :]


@triton.jit
def store_chunk_tile(
    g, to, to_mask, dbias_ptr, stride_bn, row_block, column, inside, NEED_BIAS: tl.constexpr
):
    tl.store(to, g.to(to.dtype.element_ty), mask=to_mask)
    if NEED_BIAS:
        tl.store(dbias_ptr + row_block * stride_bn + column, tl.sum(g, 0), mask=inside)


@triton.jit(do_not_specialize=["n"])
def _compact_rows_fwd_kernel(valid_ptr, before_ptr, index_ptr, count_ptr, n, BLOCK: tl.constexpr):
    # before[r]: rows that count up to and with r. Those that do not follow the last that does, in
    # order.
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < n
    before = tl.load(before_ptr + row, mask=mask, other=0)
    count = tl.load(before_ptr + n - 1)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, count)
    valid = tl.load(valid_ptr + row, mask=mask, other=0) != 0
    to = tl.where(valid, before - 1, count + row - before)
    tl.store(index_ptr + to, row, mask=mask)


@triton.jit(do_not_specialize=["n"])
def _gather_rows_fwd_kernel(
    x_ptr, index_ptr, count_ptr, y_ptr, stride_xn, n, inner, BLOCK: tl.constexpr
):
    position = tl.program_id(0).to(tl.int64)
    # Rows that do not count become 0: their content, NaN included, never reaches a product.
    filled = tl.where(position < tl.load(count_ptr), inner, 0)
    row = tl.load(index_ptr + position)
    for start in range(0, inner, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride_xn + k, mask=k < filled, other=0.0)
        tl.store(y_ptr + position * inner + k, x, mask=k < inner)


@triton.jit(do_not_specialize=["n"])
def _scatter_rows_fwd_kernel(x_ptr, index_ptr, count_ptr, y_ptr, n, inner, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    filled = tl.where(position < tl.load(count_ptr), inner, 0)
    row = tl.load(index_ptr + position)
    for start in range(0, inner, BLOCK):
        k = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + position * inner + k, mask=k < filled, other=0.0)
        tl.store(y_ptr + row * inner + k, x.to(y_ptr.dtype.element_ty), mask=k < inner)


def gradient_like(x: Tensor, out: Tensor | None) -> Tensor:
    """Where a kernel stores the gradient of `x`: `out` if it can."""
    if out is not None and stored(x.dtype) == x.dtype:
        return out
    return torch.empty(x.shape, dtype=stored(x.dtype), device=x.device)


def rounded(stored_gradient: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if out is None or out is stored_gradient:
        return stored_gradient.to(dtype)
    return out.copy_(stored_gradient)


def inner_contiguous(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=1024)
def _split_tiles(row_blocks: int, tiles: int, slots: int, group: int) -> tuple[int, int]:
    least = min(tiles, -(-slots // min(group, row_blocks)))
    best = (float("inf"), 1, tiles)
    for wanted in range(least, min(tiles, 4 * least + 16) + 1):
        per_split = -(-tiles // wanted)
        splits = -(-tiles // per_split)
        waves = -(-row_blocks * splits // slots)
        best = min(best, (waves * (per_split + 0.5), splits, per_split))
    return best[1], best[2]


def split_tiles(row_blocks: int, tiles: int, device: torch.device, group: int) -> tuple[int, int]:
    """(splits, tiles per split) that take the least time, counted in tiles: whole waves of
    programs, half a tile for what a program does beside its tiles. At least so many splits that
    `group` row blocks fill the chip.
    """
    return _split_tiles(row_blocks, tiles, multiprocessors(device), group)


@dataclass(frozen=True)
class Rows:
    """The rows that count: `index` [n] is a permutation, them first; `count` [1] their number."""

    n: int
    index: Tensor | None = None
    count: Tensor | None = None

    @staticmethod
    def where(valid: Tensor | None, n: int) -> Rows:
        """`valid` [n] bool, or None for every row. Deterministic; nothing is read on the host."""
        if valid is None or n == 0:
            return Rows(n)
        before = torch.cumsum(valid, 0, dtype=torch.int64)
        index = torch.empty_like(before)
        # Not a view of `before`: its alignment would change with n, and kernels with it.
        count = torch.empty(1, dtype=torch.int64, device=before.device)
        with on_device(valid):
            _compact_rows_fwd_kernel[grid(triton.cdiv(n, 1024))](
                valid.contiguous().view(torch.uint8), before, index, count, n, BLOCK=1024
            )
        return Rows(n, index, count)

    def gather(self, x: Tensor) -> Tensor:
        """Rows of `x` in the order of `index`, 0 where they do not count."""
        if self.index is None:
            return x
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        block = min(1024, triton.next_power_of_2(x.shape[1]))
        _gather_rows_fwd_kernel[grid(self.n)](
            x, self.index, self.count, y, x.stride(0), self.n, x.shape[1], BLOCK=block
        )
        return y

    def scatter(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `gather`, in `dtype`."""
        if self.index is None:
            return x.to(dtype)
        y = torch.empty(x.shape, dtype=stored(dtype), device=x.device)
        block = min(1024, triton.next_power_of_2(x.shape[1]))
        _scatter_rows_fwd_kernel[grid(self.n)](
            x, self.index, self.count, y, self.n, x.shape[1], BLOCK=block
        )
        return y.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total (float32) = or += a @ b, summed in float32 whatever a and b are stored in."""
    if a.dtype != torch.float32 and not a.is_cuda:
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        torch.mm(a, b, out=total) if first else torch.addmm(total, a, b, out=total)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


# (dz [rows, columns] to fill, first row, first column, bias sums [row blocks, columns] or None)
FillTile = Callable[[Tensor, int, int, "Tensor | None"], None]


def chunked_backward(
    fill: FillTile,
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    config: Config,
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    workspace_bytes: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz in chunks of columns (outer) and rows (inner), each followed by its products.

    The workspace holds a chunk of dz and, where the weight is not float32, the float32 sums of its
    part of dweight: `workspace_bytes` bound both together, down to one block of columns. Beside it:
    dhidden in float32 [n, D] and, where rows are left out, a copy of `hidden` in the order of the
    rows.
    """
    n, inner = hidden.shape
    vocabulary = weight.shape[0]
    device = hidden.device
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=device) if need_weight else None
    dbias = torch.empty(vocabulary, dtype=torch.float32, device=device) if need_bias else None
    if n == 0:
        dhidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=device)
        return (
            dhidden if need_hidden else None,
            dweight.zero_() if dweight is not None else None,
            dbias.zero_() if dbias is not None else None,
        )
    sums_apart = need_weight and weight.dtype != torch.float32
    chunk_rows = min(n, config.workspace_rows)
    column_bytes = chunk_rows * hidden.element_size() + (4 * inner if sums_apart else 0)
    blocks = max(1, workspace_bytes // (column_bytes * config.block_columns))
    chunk_columns = min(vocabulary, blocks * config.block_columns)
    # A row stride of whole 16 byte words: the products and the stores of a tile want aligned rows.
    width = -(-chunk_columns // 8) * 8
    dz = torch.empty((chunk_rows, width), dtype=stored(hidden.dtype), device=device)

    def float_sums(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=device) if wanted else None

    sums = float_sums(sums_apart, chunk_columns, inner)
    bias_sums = float_sums(need_bias, triton.cdiv(chunk_rows, config.block_rows), chunk_columns)
    dhidden = float_sums(need_hidden, n, inner)
    x = rows.gather(hidden) if need_weight else hidden
    for first_column in range(0, vocabulary, chunk_columns):
        columns = slice(first_column, min(vocabulary, first_column + chunk_columns))
        width = columns.stop - columns.start
        for first_row in range(0, n, chunk_rows):
            some = slice(first_row, min(n, first_row + chunk_rows))
            tile = dz[: some.stop - some.start, :width]
            part = None
            if bias_sums is not None:
                part = bias_sums[: triton.cdiv(tile.shape[0], config.block_rows), :width]
            fill(tile, first_row, first_column, part)
            tile = tile.to(hidden.dtype)
            if dhidden is not None:
                _add_product(dhidden[some], tile, weight[columns], first=first_column == 0)
            if dweight is not None:
                total = dweight[columns] if sums is None else sums[:width]
                _add_product(total, tile.t(), x[some], first=first_row == 0)
            if dbias is not None and part is not None:
                if first_row == 0:
                    torch.sum(part, 0, out=dbias[columns])
                else:
                    dbias[columns] += part.sum(0)
        if dweight is not None and sums is not None:
            dweight[columns] = sums[:width]
    return (
        rows.scatter(dhidden, hidden.dtype) if dhidden is not None else None,
        dweight,
        dbias,
    )
