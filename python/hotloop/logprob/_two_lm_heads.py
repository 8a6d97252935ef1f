# SPDX-License-Identifier: Apache-2.0
"""Two lm_heads over one vocabulary on the CPU: the student's and the teacher's tiles side by side.

Forward folds both tiles into running sums; the Jensen-Shannon mixture needs both log-sum-exps first and so a
second pass over the tiles. Backward overwrites the student's tiles by their gradient. Tiles that the
workspace holds are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..front import environment, native
from ..front.autocast import in_the_dtype_given
from ._call import Divergence, DivergenceCall
from ._cpu import Gradients, Products, accumulate_dtype, finish, part_of

KINDS = ("forward_kl", "reverse_kl", "jsd", "balanced", "log_cosh")
_STATISTICS = 8
_Numbers = tuple[float, float, float]
_Tiles = Iterator[tuple[int, Tensor, Tensor]]


@dataclass
class Given:
    """Logits that exist: one tile each."""

    student: Tensor
    teacher: Tensor
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None

    def tiles(self) -> _Tiles:
        yield 0, self.student, self.teacher

    again = tiles


@dataclass
class LmHeads:
    """Logits that exist only as tiles of two products."""

    student_products: Products
    teacher_products: Products
    student_bias: Tensor | None = None
    teacher_bias: Tensor | None = None

    @classmethod
    def of(cls, call: DivergenceCall, rows: Tensor | None) -> LmHeads:
        half = environment.workspace_bytes() // 2
        products = [
            Products(h if rows is None else h.index_select(0, rows), w, half)
            for h, w, _ in (call.student, call.teacher)
        ]
        dtype = accumulate_dtype(call.weight.dtype)
        wide = [
            None if b is None else b.to(dtype).contiguous() for b in (call.bias, call.teacher_bias)
        ]
        return cls(products[0], products[1], *wide)

    def tiles(self) -> _Tiles:
        for (first, s), (_, t) in zip(
            self.student_products.logits(), self.teacher_products.logits()
        ):
            yield first, s, t

    def again(self) -> _Tiles:
        for (first, s), (_, t) in zip(
            self.student_products.tiles_again(), self.teacher_products.tiles_again()
        ):
            yield first, s, t


@dataclass
class Rows:
    """Per-row results of forward, all [n] or [k, n], and what backward needs of them."""

    loss: Tensor
    lse: Tensor  # [2, n]: student, teacher
    weights: Tensor  # [3, n]: of KL(p||q), KL(q||p), JSD in the loss
    inner: Tensor  # [2, n]: KL(q||p), KL(q||M)
    source: Given | LmHeads | None = None


def _shared(
    d: Divergence, source: Given | LmHeads, first: int, s: Tensor, t: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, _Numbers, _Numbers]:
    """What both loops take first: tiles, biases, transforms."""
    biases = (part_of(source.student_bias, first, s), part_of(source.teacher_bias, first, t))
    return s, t, *biases, d.student.native(), d.teacher.native()


def _call(
    d: Divergence,
    source: Given | LmHeads,
    first: int,
    s: Tensor,
    t: Tensor,
    mode: str,
    *,
    statistics: Tensor | None = None,
    coefficients: Tensor | None = None,
    mixture: Tensor | None = None,
) -> None:
    native.core.logprob.divergence(
        mode, *_shared(d, source, first, s, t), d.beta, statistics, coefficients, mixture
    )


def _log_cosh(
    d: Divergence, source: Given | LmHeads, first: int, s: Tensor, t: Tensor, *, sums: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:  # fmt: skip
    native.core.logprob.log_cosh(*_shared(d, source, first, s, t), sums, weights)


@in_the_dtype_given
def forward(d: Divergence, source: Given | LmHeads, n: int, dtype: torch.dtype) -> Rows:
    if d.kind == "log_cosh":
        sums = torch.zeros(n, dtype=dtype, device="cpu")
        for first, s, t in source.tiles():
            _log_cosh(d, source, first, s, t, sums=sums)
        scale = d.student.temperature**2
        empty = torch.zeros(0, n, dtype=dtype, device="cpu")
        return Rows(scale * sums, empty, empty, empty, source)
    statistics = torch.zeros(_STATISTICS, n, dtype=dtype, device="cpu")
    statistics[0] = statistics[3] = -torch.inf
    for first, s, t in source.tiles():
        _call(d, source, first, s, t, "statistics", statistics=statistics)
    return combine(d, statistics, lambda lse: mixture_of(d, source, lse), source)


def mixture_of(d: Divergence, source: Given | LmHeads, lse: Tensor) -> Tensor:
    """KL(p||M) and KL(q||M), [2, n], by a second pass over the tiles."""
    n = lse.shape[1]
    coefficients = torch.zeros(7, n, dtype=lse.dtype, device="cpu")
    coefficients[:2] = lse
    mixture = torch.zeros(2, n, dtype=lse.dtype, device="cpu")
    for first, s, t in source.again():
        _call(d, source, first, s, t, "mixture", coefficients=coefficients, mixture=mixture)
    return mixture


def combine(
    d: Divergence, statistics: Tensor, mixture_of_lse: object, source: Given | LmHeads | None = None
) -> Rows:
    """From the eight running sums to the loss of each row and what backward needs; the same on every device."""
    s_max, s_sum, s_z, t_max, t_sum, t_z, t_gap, s_gap = statistics.unbind(0)
    lse_s, lse_t = s_max + torch.log(s_sum), t_max + torch.log(t_sum)
    lse = torch.stack((lse_s, lse_t))
    forward_kl = t_gap / t_sum + lse_s - lse_t
    reverse_kl = s_gap / s_sum + lse_t - lse_s
    zero, one = torch.zeros_like(lse_s), torch.ones_like(lse_s)
    inner = torch.stack((reverse_kl, zero))
    if d.kind == "forward_kl":
        return Rows(forward_kl, lse, torch.stack((one, zero, zero)), inner, source)
    if d.kind == "reverse_kl":
        return Rows(reverse_kl, lse, torch.stack((zero, one, zero)), inner, source)
    if d.kind == "balanced":
        sharper = (lse_t - t_z / t_sum) > (
            lse_s - s_z / s_sum
        )  # the student's entropy is the smaller one
        weights = torch.stack(
            (torch.where(sharper, d.delta, one), torch.where(sharper, one, d.delta), zero)
        )
        scale = d.student.temperature**2
        return Rows(
            scale * (weights[0] * forward_kl + weights[1] * reverse_kl),
            lse,
            scale * weights,
            inner,
            source,
        )
    assert callable(mixture_of_lse)
    teacher_kl, student_kl = mixture_of_lse(lse).unbind(0)
    loss = d.beta * teacher_kl + (1 - d.beta) * student_kl
    return Rows(
        loss, lse, torch.stack((zero, zero, one)), torch.stack((reverse_kl, student_kl)), source
    )


def coefficients(rows: Rows, grad: Tensor) -> Tensor:
    """[7, n] as DivergenceCall in csrc/logprob/rows.hpp."""
    return torch.cat((rows.lse, rows.weights * grad, rows.inner)).contiguous()


def overwrite_student(
    d: Divergence, source: Given | LmHeads, rows: Rows, grad: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Turn the student's tiles into their gradient, one after the other."""
    if d.kind == "log_cosh":
        weights = (0.5 * d.student.temperature**2 * grad).contiguous()
        for first, s, t in source.again():
            _log_cosh(d, source, first, s, t, weights=weights)
            yield first, s
        return
    packed = coefficients(rows, grad)
    flag = (
        {"mixture": torch.zeros(2, grad.shape[0], dtype=grad.dtype, device="cpu")}
        if d.kind == "jsd"
        else {}
    )
    for first, s, t in source.again():
        _call(d, source, first, s, t, "gradient", coefficients=packed, **flag)
        yield first, s


@in_the_dtype_given
def lm_head_gradients(
    call: DivergenceCall, source: LmHeads, rows: Rows, grad: Tensor, index: Tensor | None, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    gradients = Gradients(source.student_products, call.weight.dtype, *need)
    for first, tile in overwrite_student(call.divergence, source, rows, grad):
        gradients.add(first, tile)
    source.student_products.release()
    source.teacher_products.release()
    return finish(gradients, call.hidden, call.bias, index)
