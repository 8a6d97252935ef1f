# SPDX-License-Identifier: Apache-2.0
"""A head with labels, what runs on it, and the two references that judge the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers import assert_no_worse_than_torch
from hotloop.logprob import LogprobStatistics, linear_logprob
from hotloop.reference import logprob as reference
from torch import Tensor

DIFFERENTIABLE = ("logps", "entropy", "lse", "sum_p2", "mean_logit")
OPTIONAL = ("entropy", "lse", "sum_p2", "mean_logit", "argmax_hit")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
by_impl = pytest.mark.parametrize("impl", ["cpu", "reference"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Beyond k times plain torch's error: sums of a thousand terms in another order, and exponentials that are
# good to a few units in the last place where torch's are good to one.
EPS = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6, torch.float64: 1e-13}


@dataclass
class LmHead:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    def to(self, dtype: torch.dtype) -> LmHead:
        bias = None if self.bias is None else self.bias.to(dtype)
        return LmHead(self.hidden.to(dtype), self.weight.to(dtype), bias, self.labels)

    def on(self, device: str) -> LmHead:
        moved = [None if x is None else x.to(device) for x in (self.hidden, self.weight, self.bias)]
        hidden, weight, bias = moved
        assert hidden is not None
        assert weight is not None
        return LmHead(hidden, weight, bias, self.labels.to(device))

    def leaves(self) -> LmHead:
        bias = None if self.bias is None else self.bias.detach().clone().requires_grad_()
        hidden, weight = (x.detach().clone().requires_grad_() for x in (self.hidden, self.weight))
        return LmHead(hidden, weight, bias, self.labels)

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def run(self, op: Callable[..., Any] = linear_logprob, **options: Any) -> Any:
        return op(self.hidden, self.weight, self.labels, bias=self.bias, **options)

    def with_labels(self, labels: Tensor) -> LmHead:
        return replace(self, labels=labels)


def make_head(
    n: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float32, *, bias: bool = True, ignore: bool = True,
    seed: int = 0, size: float = 2.0,
) -> LmHead:  # fmt: skip
    """Logits with a standard deviation of about ``size``; every third label ignored."""
    g = torch.Generator().manual_seed(1000 * n + 10 * width + vocabulary + seed)
    hidden = torch.randn(n, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64) * size / width**0.5
    b = torch.randn(vocabulary, generator=g, dtype=torch.float64) if bias else None
    labels = torch.randint(0, vocabulary, (n,), generator=g)
    if ignore and n > 1:
        labels[::3] = -100
    return LmHead(hidden, weight, b, labels).to(dtype)


def upstream(n: int, with_entropy: bool = True) -> Tensor:
    weights = torch.randn(5, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    if not with_entropy:
        weights[1] = 0
    return weights


def backward(rows: Sequence[Tensor], weights: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    total = sum((w.to(r) * r.reshape(-1)).sum() for w, r in zip(weights, rows))
    assert isinstance(total, Tensor)
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found)]


def differentiable(out: LogprobStatistics) -> list[Tensor]:
    rows = [getattr(out, name) for name in DIFFERENTIABLE]
    return [r for r in rows if r is not None]


def ours(
    head: LmHead, *, with_entropy: bool = True, **options: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The five statistics, the gradients with weights that are all different, and the argmax hits."""
    h = head.leaves()
    out = linear_logprob(h.hidden, h.weight, h.labels, bias=h.bias, statistics=OPTIONAL, **options)
    rows = differentiable(out)
    assert out.argmax_hit is not None
    return (
        rows,
        backward(rows, upstream(h.labels.numel(), with_entropy), h.tensors()),
        out.argmax_hit,
    )


def plain(
    head: LmHead, *, with_entropy: bool = True, ignore_index: int = -100, **options: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The same by plain torch: the truth for a float64 head, the contender for the others."""
    h = head.leaves()
    z = reference.logits_of(h.hidden.reshape(-1, h.hidden.shape[-1]), h.weight, h.bias, **options)
    found = reference.statistics(z, h.labels.reshape(-1).long(), ignore_index)
    rows = [found[name] for name in DIFFERENTIABLE]
    return (
        rows,
        backward(rows, upstream(h.labels.numel(), with_entropy), h.tensors()),
        found["argmax_hit"],
    )


def check(
    head: LmHead, call: Callable[..., tuple[list[Tensor], list[Tensor], Tensor]] = ours, *, impl: str = "cpu",
    ignore_index: int = -100, k: float = 2.0, with_entropy: bool = True, **options: Any,
) -> None:  # fmt: skip
    """Statistics and gradients of ``call`` are no worse than plain torch's at the dtype of the head."""
    options |= {"ignore_index": ignore_index, "with_entropy": with_entropy}
    rows, grads, _ = call(head, impl=impl, **options)
    other_rows, other_grads, _ = plain(head, **options)
    true_rows, true_grads, _ = plain(head.to(torch.float64), **options)
    dtype = head.weight.dtype
    # The entropy is lse - E[z], each rounded at its own size, which may be larger than that of the difference.
    size = max(1.0, float(true_rows[2].detach().abs().max())) if true_rows[2].numel() else 1.0
    for name, a, b, c in zip(DIFFERENTIABLE, rows, other_rows, true_rows):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
        floor = size if name == "entropy" else 1.0
        assert_no_worse_than_torch(a.reshape(-1), b, c.detach(), k, EPS[dtype], floor)
    for a, b, c in zip(grads, other_grads, true_grads):
        assert a.dtype == b.dtype
        # A result of a half type is rounded once; where torch happened to round well, half a spacing counts.
        half = torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else 0.0
        eps = EPS[dtype] * (size if with_entropy else 1.0) + half
        assert_no_worse_than_torch(
            a, b, c, k, eps, floor=float(c.abs().max()) if c.numel() else 1.0
        )
