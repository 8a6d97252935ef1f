"""Unlearning losses in plain torch. Arguments as in ``hotloop.unlearn``."""

from __future__ import annotations

from ..front.needs import torch_for

torch_for("reference.unlearn")

from torch import Tensor

from .preference._common import Row, columns, count, reduce, softplus

__all__ = ["npo_loss"]


def npo_loss(
    policy_logps: Tensor,
    ref_logps: Row | None = None,
    sequence_lengths: Row | None = None,
    retain_nll: Tensor | None = None,
    retain_kl: Tensor | None = None,
    *,
    beta: float = 0.1,
    gamma: float = 0.0,
    retain_nll_weight: float = 1.0,
    retain_kl_weight: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    l, nll, kl, r, n = columns(
        (policy_logps, retain_nll, retain_kl), (ref_logps, count(sequence_lengths))
    )
    loss = 2 / beta * softplus(beta * (l - r) / n + gamma)
    if reduction == "mean":
        return loss.mean() + retain_nll_weight * nll.mean() + retain_kl_weight * kl.mean()
    return reduce(loss + retain_nll_weight * nll + retain_kl_weight * kl, reduction)
