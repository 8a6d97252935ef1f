# SPDX-License-Identifier: Apache-2.0
"""The fused lm_head on the CPU: matrix products by torch (oneDNN) on tiles of logits, C++ rows between them.

For n valid rows and a vocabulary of V the logits would take n * V elements. Here they exist as tiles of some
columns. Forward turns each tile into running statistics and keeps as many tiles as the workspace allows;
backward overwrites kept tiles by their gradient and computes the others again. With everything kept a step
is three products (logits, d hidden, d weight) instead of four; with nothing kept it needs one tile of memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..front import buffers, environment, native
from ..front.autocast import in_the_dtype_given
from ._call import LmHeadCall, LogitsCall

STATISTICS = ("max", "sum_exp", "sum_z_exp", "sum_exp2", "sum_z", "label_z")
"""Rows of the statistics matrix, as ``Statistic`` in csrc/logprob/rows.hpp."""

# A tile of this many bytes stays in the last-level cache between the product and the row loop; smaller ones
# make the product less efficient (docs/perf-notes.md, "tile width").
_TILE_BYTES = 8 * 2**20
_LEAST_TILE_COLUMNS = 512
# A workspace smaller than one tile of this size is exceeded by it.
_SMALL_TILE_BYTES = 8 * 2**20


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Products:
    """Tiles of ``hidden @ weight.T`` and the two products of its gradient, for the rows given.

    float16 is computed in float32: oneDNN's float16 product runs at a twentieth of the float32 rate on CPUs
    without native support (measured, docs/perf-notes.md).
    """

    def __init__(self, hidden: Tensor, weight: Tensor, workspace: int) -> None:
        self.dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        self.hidden = hidden.to(self.dtype)
        self.weight = weight
        n, vocabulary = hidden.shape[0], weight.shape[0]
        column_bytes = max(1, n) * self.dtype.itemsize
        # Many rows: fewer columns than the product likes, so that a tile does not outgrow the workspace.
        most = max(1, max(workspace, _SMALL_TILE_BYTES) // column_bytes)
        self.tile_columns = max(
            1, min(vocabulary, most, max(_LEAST_TILE_COLUMNS, _TILE_BYTES // column_bytes))
        )
        fit = workspace // column_bytes
        if fit >= vocabulary:
            self.kept_columns = vocabulary
        else:
            spare = (fit - self.tile_columns) // self.tile_columns
            self.kept_columns = max(0, spare) * self.tile_columns
        self._buffers: list[Tensor] = []
        self.kept = self._matrix(n, self.kept_columns)
        self._scratch: Tensor | None = None

    def _matrix(self, rows: int, columns: int) -> Tensor:
        size = rows * columns * self.dtype.itemsize
        if size == 0:
            return torch.empty(rows, columns, dtype=self.dtype, device="cpu")
        self._buffers.append(buffers.workspace.take(size))
        return self._buffers[-1][:size].view(self.dtype).view(rows, columns)

    def release(self) -> None:
        """Hand the tiles' memory on; nothing may look at them any more."""
        for buffer in self._buffers:
            buffers.workspace.give(buffer)
        self._buffers.clear()
        self._scratch = None

    def weight_rows(self, first: int, last: int) -> Tensor:
        return self.weight[first:last].to(self.dtype)

    def _tile(self, first: int, last: int) -> Tensor:
        """Memory for one tile: a part of what is kept, or scratch that the next tile overwrites."""
        if last <= self.kept_columns:
            return self.kept[:, first:last]
        if self._scratch is None:
            self._scratch = self._matrix(self.hidden.shape[0], self.tile_columns).view(-1)
        n = self.hidden.shape[0]
        return self._scratch[: n * (last - first)].view(n, last - first)

    def _ranges(self, start: int) -> Iterator[tuple[int, int]]:
        vocabulary = self.weight.shape[0]
        for first in range(start, vocabulary, self.tile_columns):
            yield first, min(first + self.tile_columns, vocabulary)

    def logits(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Yield (first column, logits) over the columns from ``start`` on."""
        for first, last in self._ranges(start):
            tile = self._tile(first, last)
            torch.mm(self.hidden, self.weight_rows(first, last).t(), out=tile)
            yield first, tile

    def tiles_again(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits once more, for their gradient: first what was kept, as one, then the rest."""
        if self.kept_columns:
            yield 0, self.kept
        yield from self.logits(self.kept_columns)


class Gradients:
    """Sums what the gradient tiles give: d hidden in float32 or better, d weight tile by tile, d bias."""

    def __init__(
        self,
        products: Products,
        weight_dtype: torch.dtype,
        need_hidden: bool,
        need_weight: bool,
        need_bias: bool,
    ) -> None:
        self.products = products
        width = products.hidden.shape[1]
        vocabulary = products.weight.shape[0]
        self.hidden: Tensor | None = None
        self.need_hidden = need_hidden
        # Each row of d weight comes from one product over all n rows, so it is rounded once.
        self.weight = buffers.empty(vocabulary, width, dtype=weight_dtype) if need_weight else None
        self.bias = (
            torch.empty(vocabulary, dtype=accumulate_dtype(products.dtype), device="cpu")
            if need_bias
            else None
        )

    def add(self, first: int, dz: Tensor) -> None:
        last = first + dz.shape[1]
        p = self.products
        if self.need_hidden:
            rows = p.weight_rows(first, last)
            if self.hidden is None:
                whole = dz.shape[1] == p.weight.shape[0]
                product = torch.mm(dz, rows)
                self.hidden = product if whole else product.to(accumulate_dtype(p.dtype))
            elif p.dtype == self.hidden.dtype:
                self.hidden.addmm_(dz, rows)
            else:
                self.hidden += torch.mm(dz, rows)
        if self.weight is not None:
            out = self.weight[first:last]
            if out.dtype == p.dtype:
                torch.mm(dz.t(), p.hidden, out=out)
            else:
                out.copy_(torch.mm(dz.t(), p.hidden))
        if self.bias is not None:
            self.bias[first:last] = dz.sum(0, dtype=self.bias.dtype)


def new_statistics(n: int, dtype: torch.dtype) -> Tensor:
    """Statistics of no columns: max -inf, sums 0, label NaN until its column has been seen."""
    statistics = torch.zeros(len(STATISTICS), n, dtype=dtype, device="cpu")
    statistics[0] = -torch.inf
    statistics[5] = torch.nan
    return statistics


class HeadState:
    """What forward leaves for backward: the valid rows, their labels, and the tiles that were kept."""

    def __init__(self, rows: Tensor | None, products: Products | None, labels: Tensor) -> None:
        self.rows = rows  # index of the valid rows; None: all of them
        self.products = products
        self.labels = labels

    def take_products(self) -> Products | None:
        """The products with their tiles, for one backward: of two threads one gets them."""
        products: Products | None = self.__dict__.pop("products", None)
        return products


def select_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    valid = labels != ignore_index
    return None if bool(valid.all()) else valid.nonzero().squeeze(1)


def _wide_bias(call: LmHeadCall) -> Tensor | None:
    """The bias in the dtype of sums."""
    if call.bias is None:
        return None
    return call.bias.to(accumulate_dtype(call.weight.dtype)).contiguous()


def part_of(bias: Tensor | None, first: int, tile: Tensor) -> Tensor | None:
    """The bias of a tile's columns."""
    return None if bias is None else bias[first : first + tile.shape[1]]


@in_the_dtype_given
def forward(
    call: LmHeadCall, everything: bool, argmax: bool, keep: bool = True
) -> tuple[Tensor, Tensor | None, HeadState]:
    """Return (statistics [6, N], index of the largest logit [N] or None, state for backward).

    Rows whose label is ``ignore_index`` take no part in the product; theirs are the statistics of a row
    with log-sum-exp 0, every other statistic 0, and argmax -1.
    """
    labels, rows = call.labels, select_rows(call.labels, call.ignore_index)
    x = call.hidden if rows is None else call.hidden.index_select(0, rows)
    y = (labels if rows is None else labels.index_select(0, rows)).contiguous()
    products = Products(x, call.weight, environment.workspace_bytes() if keep else 0)
    dtype = accumulate_dtype(call.weight.dtype)
    statistics = new_statistics(x.shape[0], dtype)
    largest = torch.zeros(x.shape[0], dtype=torch.int64, device="cpu") if argmax else None
    bias, transform = _wide_bias(call), call.logit.native()
    for first, tile in products.logits():
        native.core.logprob.row_statistics(
            tile, part_of(bias, first, tile), y, call.first_column + first, transform, everything, statistics, largest
        )  # fmt: skip
    if products.kept_columns == 0:
        products.release()
    if rows is not None:
        n = labels.shape[0]
        full = torch.zeros(len(STATISTICS), n, dtype=dtype, device="cpu")
        full[1] = 1.0
        statistics = full.index_copy_(1, rows, statistics)
        if largest is not None:
            largest = torch.full((n,), -1, dtype=torch.int64, device="cpu").index_copy_(
                0, rows, largest
            )
    return statistics, largest, HeadState(rows, products, y)


@in_the_dtype_given
def backward(
    call: LmHeadCall, coefficients: Tensor, state: HeadState | None, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return d hidden, d weight, d bias (None where not needed) from the row coefficients [6, N].

    ``state`` keeps its rows but gives up its tiles, which are overwritten: a second backward computes them again.
    """
    if state is None:
        rows = select_rows(call.labels, call.ignore_index)
        y = (call.labels if rows is None else call.labels.index_select(0, rows)).contiguous()
        state = HeadState(rows, None, y)
    rows = state.rows
    products = state.take_products()
    if products is None:
        x = call.hidden if rows is None else call.hidden.index_select(0, rows)
        products = Products(x, call.weight, 0)
    packed = (coefficients if rows is None else coefficients.index_select(1, rows)).contiguous()
    gradients = Gradients(products, call.weight.dtype, *need)
    bias, transform = _wide_bias(call), call.logit.native()
    for first, tile in products.tiles_again():
        native.core.logprob.row_gradient(
            tile,
            part_of(bias, first, tile),
            state.labels,
            call.first_column + first,
            transform,
            packed,
        )
        gradients.add(first, tile)
    products.release()
    return finish(gradients, call.hidden, call.bias, rows)


def logits_forward(
    call: LogitsCall, everything: bool, argmax: bool
) -> tuple[Tensor, Tensor | None]:
    """Statistics [6, N] of every row, and the index of its largest logit."""
    n = call.logits.shape[0]
    sums = new_statistics(n, accumulate_dtype(call.logits.dtype))
    largest = torch.zeros(n, dtype=torch.int64, device="cpu") if argmax else None
    native.core.logprob.row_statistics(
        call.logits, None, call.labels, 0, call.logit.native(), everything, sums, largest
    )
    return sums, largest


def logits_backward(call: LogitsCall, coefficients: Tensor) -> Tensor:
    gradient = call.logits.detach().clone(memory_format=torch.contiguous_format)
    native.core.logprob.row_gradient(
        gradient, None, call.labels, 0, call.logit.native(), coefficients.contiguous()
    )
    return gradient.masked_fill_((call.labels == call.ignore_index).unsqueeze(1), 0.0)


def finish(
    gradients: Gradients, hidden: Tensor, bias: Tensor | None, rows: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Bring the sums into the dtype and the rows of the inputs."""
    d_hidden = gradients.hidden
    if gradients.need_hidden:
        if d_hidden is None:
            d_hidden = torch.zeros(
                gradients.products.hidden.shape, dtype=hidden.dtype, device="cpu"
            )
        d_hidden = d_hidden.to(hidden.dtype)
        if rows is not None:
            d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device="cpu").index_copy_(
                0, rows, d_hidden
            )
    d_bias = gradients.bias
    if d_bias is not None and bias is not None:
        d_bias = d_bias.to(bias.dtype)
    return d_hidden, gradients.weight, d_bias
