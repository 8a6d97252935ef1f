# SPDX-License-Identifier: Apache-2.0
"""A lower bound on mutual information for distillation of representations."""

from __future__ import annotations

from torch import Tensor

from ..front import check
from ..front.impl import Impl, choose, everywhere


def mi_alpha_bound(
    scores: Tensor, log_baseline: Tensor, *, alpha: float = 0.7, impl: Impl = "auto"
) -> Tensor:
    """Interpolated lower bound I_alpha on the mutual information of two views, from a matrix of critic scores.

    With f_ij the score of student row i and teacher column j (the diagonal holds the true pairs) and q the log
    baseline of the teacher's samples: n_ij = log mean over k != j of exp(f_ik), a_ij = log(alpha e^n_ij +
    (1 - alpha) e^q_i), I = 1 + mean over i, j != i of (f_ii - a_ij) - mean over i, j != i of exp(f_ij - a_ii).
    alpha = 1 is InfoNCE with n - 1 samples (at most log(n - 1)), alpha = 0 the single-sample bound. The loss is -I.
    The published code takes the logit of alpha as its argument; here alpha is alpha. Only in plain torch so far.

    Args:
        scores: shape (n, n), n >= 2. Differentiable.
        log_baseline: shape (n,). Differentiable.
        alpha: in [0, 1]. Default 0.7.
        impl: "auto" or "reference". Default "auto".

    Returns:
        Scalar, nats; float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.
        NotImplementedError: another impl is forced.

    Examples:
        >>> import torch
        >>> round(float(mi_alpha_bound(torch.zeros(4, 4), torch.zeros(4))), 4)
        0.0

    Reference:
        He et al. 2021 (Distiller), arXiv:2109.11105; the bound: Poole et al. 2019, arXiv:1905.06922.
    """
    from ..reference import logprob as reference

    op = "mi_alpha_bound"
    scores = check.float_tensor(op, "scores", scores, ndim=2)
    if scores.shape[0] != scores.shape[1] or scores.shape[0] < 2:
        raise ValueError(
            f"[{op}] scores: expected shape (n, n) with n >= 2, got {tuple(scores.shape)}."
        )
    log_baseline = check.float_tensor(op, "log_baseline", log_baseline, ndim=1)
    if log_baseline.shape[0] != scores.shape[0]:
        raise ValueError(
            f"[{op}] log_baseline: expected shape ({scores.shape[0]},), got {tuple(log_baseline.shape)}."
        )
    check.number(op, "alpha", alpha, at_least=0, at_most=1)
    choose(op, impl, "scores", scores, {"reference": everywhere})
    result: Tensor = reference.mi_alpha_bound(scores, log_baseline, alpha=alpha)
    return result
