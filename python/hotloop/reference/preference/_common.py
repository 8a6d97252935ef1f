"""What the references share: the dtype the maths is done in, and the reductions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Row = Tensor | float


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own returns x above 20, which is 2e-9 off in float64."""
    return -logsigmoid(-x)


def columns(
    differentiable: tuple[Row | None, ...], constants: tuple[Row | None, ...] = ()
) -> list[Tensor]:
    """Return all in float32, or float64 if any is; None as 0; no gradient reaches the constants."""
    rows = [0.0 if x is None else x for x in (*differentiable, *constants)]
    tensors = [x for x in rows if isinstance(x, Tensor)]
    double = any(x.dtype == torch.float64 for x in tensors)
    like = tensors[0].new_empty(0, dtype=torch.float64 if double else torch.float32)
    found = [x.to(like.dtype) if isinstance(x, Tensor) else like.new_tensor(float(x)) for x in rows]
    return found[: len(differentiable)] + [x.detach() for x in found[len(differentiable) :]]


def count(tokens: Row | None) -> Row:
    """A number of tokens: at least 1; None is 1."""
    if tokens is None:
        return 1.0
    return tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(1.0, tokens)


def reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def reduce_with(losses: Tensor, term: Tensor, reduction: str) -> Tensor:
    """Reduce ``losses + term``; only a mean may be over different numbers of rows."""
    if reduction == "mean":
        return losses.mean() + term.mean()
    return reduce(losses + term, reduction)


def logistic(x: Tensor, label: Row) -> Tensor:
    return label * softplus(-x) + (1 - label) * softplus(x)
