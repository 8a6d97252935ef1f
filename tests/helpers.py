# SPDX-License-Identifier: Apache-2.0
"""Measures of closeness shared by the tests of every room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def assert_no_worse_than_torch(
    ours: Tensor,
    torch_same_dtype: Tensor,
    truth_float64: Tensor,
    k: float = 2.0,
    eps: float = 1e-6,
    floor: float = 1.0,
) -> None:
    """Assert |ours - truth| <= k * max|torch - truth| + eps * max(floor, |truth|), elementwise.

    NaN and infinities must stand in the same places as in plain torch, and count as equal there.
    """
    assert truth_float64.dtype == torch.float64
    assert ours.shape == torch_same_dtype.shape == truth_float64.shape, (
        f"shapes {tuple(ours.shape)}, {tuple(torch_same_dtype.shape)}, {tuple(truth_float64.shape)}"
    )
    ours, other = ours.detach().double(), torch_same_dtype.detach().double()
    assert_same_non_finite(ours, other)
    use = torch.isfinite(other) & torch.isfinite(truth_float64)
    if not bool(use.any()):
        return
    ours, other, truth = ours[use], other[use], truth_float64.detach()[use]
    error = (ours - truth).abs()
    bound = k * (other - truth).abs().max() + eps * truth.abs().clamp(min=floor)
    worst = int((error - bound).argmax())
    assert bool((error <= bound).all()), (
        f"error {error[worst]:.3e} > bound {bound[worst]:.3e} where the truth is "
        f"{truth[worst]:.9g} and we say {ours[worst]:.9g}; torch's largest error is "
        f"{(other - truth).abs().max():.3e}"
    )


def assert_same_non_finite(ours: Tensor, other: Tensor) -> None:
    """NaN where the other has NaN, and each infinity with its sign."""
    ours, other = ours.detach().double(), other.detach().double()
    for what, a, b in (
        ("NaN", ours.isnan(), other.isnan()),
        ("+inf", ours == torch.inf, other == torch.inf),
        ("-inf", ours == -torch.inf, other == -torch.inf),
    ):
        assert torch.equal(a, b), f"{what} at {a.tolist()}, expected at {b.tolist()}"


@dataclass(frozen=True)
class GradientDistance:
    relative_l2: float
    cosine: float
    bias: float
    """Mean of ours - truth over mean |truth|: a systematic error that the others average away."""
    row_ratio: float
    """Largest |log(|ours| / |truth|)| of a row: a zeroed one cannot hide behind large ones."""


def gradient_distance(ours: Tensor, truth: Tensor, floor: float = 0.0) -> GradientDistance:
    """Compare two gradients over the elements that are finite and larger than ``floor``."""
    a, b = ours.detach().double().flatten(), truth.detach().double().flatten()
    use = torch.isfinite(a) & torch.isfinite(b) & (b.abs() > floor)
    if not bool(use.any()):
        return GradientDistance(0.0, 1.0, 0.0, 0.0)
    a, b = a[use], b[use]
    tiny = torch.finfo(torch.float64).tiny
    return GradientDistance(
        relative_l2=float((a - b).norm() / b.norm()),
        cosine=float(a @ b / (a.norm() * b.norm()).clamp(min=tiny)),
        bias=float((a - b).mean().abs() / b.abs().mean()),
        row_ratio=float((a.abs() / b.abs()).clamp(min=tiny).log().abs().max()),
    )


def assert_gradient_close(
    ours: Tensor, truth: Tensor, tolerance: float, floor: float = 0.0
) -> None:
    """All four measures of ``gradient_distance`` within a tolerance that scales with the dtype."""
    small = truth.detach().double().abs() <= floor
    assert bool((ours.detach().double().abs()[small] <= 2 * floor).all())
    d = gradient_distance(ours, truth, floor)
    assert d.relative_l2 <= tolerance, d
    assert 1 - d.cosine <= tolerance, d
    assert d.bias <= tolerance, d
    assert d.row_ratio <= 4 * tolerance, d


def gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of sum(weights * loss) with fixed weights that are all different."""
    weights = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device)
    found = torch.autograd.grad((loss.reshape(-1) * weights).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]


def value_and_gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [value.detach(), *gradients(value, inputs)]


def misaligned(x: Tensor) -> Tensor:
    """The same values, contiguous, one element past an aligned address."""
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    buffer[1:] = x.reshape(-1)
    return buffer[1:].reshape(x.shape)


def strided(x: Tensor) -> Tensor:
    """The same values with a stride of two in the last dimension."""
    buffer = torch.empty((*x.shape, 2), dtype=x.dtype, device=x.device)
    buffer[..., 0] = x
    return buffer[..., 0]


def with_threads(count: int, call: Callable[[], T]) -> T:
    """Run with this many threads, then restore the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)
