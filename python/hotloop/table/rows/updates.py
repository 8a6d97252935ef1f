# SPDX-License-Identifier: Apache-2.0
"""Updates of gathered rows, in place."""

from __future__ import annotations

from typing import Any

from ...core import rules
from ...core.rules import FTRL, SGD, Adagrad, Adam, GroupAdagrad, RowOptimizer, RowwiseAdagrad
from ...front import arrays
from ...front.impl import Impl, choose
from ...reference.table import rows as _reference
from .. import _words
from . import engine


def _move(op: str, kind: type[RowOptimizer], given: dict[str, Any]) -> None:
    """Check the arguments of an update, by name, and run the rule."""
    rule, state, step = rules.of_arguments(op, kind, given)
    weight, grad, seed = given["weight"], given["grad"], given["rounding_seed"]
    engine.check_rows(op, weight, grad)
    for name, column in state.items():
        engine.check_state(op, name, column, weight, scalar=name in rule._scalars())
    engine.check_seed(op, seed)
    loops = engine.loops(arrays.dtype(weight))
    if choose(op, given["impl"], "weight", weight, loops) == "reference":
        _reference.move(rule, weight, grad, state, seed, step=step)
    else:
        engine.update(rule, weight, grad, state, rounding_seed=seed, step=step)


@_words.documented_rows
def sparse_sgd_update(
    weight: Any,
    grad: Any,
    *,
    lr: float = SGD.lr,
    weight_decay: float = SGD.weight_decay,
    rounding_seed: int | None = None,
    impl: Impl = "auto",
) -> None:
    """Move rows by plain gradient descent, in place.

    w <- w - lr (g + weight_decay w).

    Examples:
        >>> import numpy as np
        >>> w = np.ones((1, 2), np.float32)
        >>> sparse_sgd_update(w, np.array([[1, 2]], np.float32), lr=0.5)
        >>> w.tolist()
        [[0.5, 0.0]]

    Reference:
        Robbins and Monro 1951, doi:10.1214/aoms/1177729586. No momentum.
    """
    _move("sparse_sgd_update", SGD, locals())


@_words.documented_rows
def rowwise_adagrad_update(
    weight: Any,
    grad: Any,
    state_sum: Any,
    *,
    lr: float = RowwiseAdagrad.lr,
    eps: float = RowwiseAdagrad.eps,
    weight_decay: float = RowwiseAdagrad.weight_decay,
    weight_decay_mode: str = RowwiseAdagrad.weight_decay_mode,
    rounding_seed: int | None = None,
    impl: Impl = "auto",
) -> None:
    """Move rows by Adagrad with one number of state per row, in place.

    "l2": g = grad + weight_decay w; state_sum <- state_sum + mean_j g_j^2; w <- w - lr g / (sqrt(state_sum) + eps).
    "decoupled": g = grad, and w is scaled by 1 - lr weight_decay first. Where the denominator is 0 (no eps, no gradient
    so far) the step is 0 instead of NaN.

    Examples:
        >>> import numpy as np
        >>> w, s = np.zeros((1, 2), np.float32), np.zeros(1, np.float32)
        >>> rowwise_adagrad_update(w, np.array([[1, 7]], np.float32), s, lr=0.5)
        >>> w.tolist(), s.tolist()
        ([[-0.10000000149011612, -0.699999988079071]], [25.0])

    Reference:
        Duchi et al. 2011, JMLR 12, "Adaptive Subgradient Methods"; one sum per row as TorchRec (rowwise_adagrad.py) and
        FBGEMM have it.
    """
    _move("rowwise_adagrad_update", RowwiseAdagrad, locals())


@_words.documented_rows
def sparse_adagrad_update(
    weight: Any,
    grad: Any,
    state_sum: Any,
    *,
    lr: float = Adagrad.lr,
    eps: float = Adagrad.eps,
    weight_decay: float = Adagrad.weight_decay,
    weight_decay_mode: str = Adagrad.weight_decay_mode,
    rounding_seed: int | None = None,
    impl: Impl = "auto",
) -> None:
    """Move rows by Adagrad, in place.

    "l2": g = grad + weight_decay w; state_sum <- state_sum + g^2; w <- w - lr g / (sqrt(state_sum) + eps), per element.
    "decoupled": g = grad, and w is scaled by 1 - lr weight_decay first. Where the denominator is 0 (no eps, no gradient
    so far) the step is 0 instead of NaN. Monolith's rule is eps=0 with a state_sum that starts at 0.1.

    Args:
        state_sum: (U, D) float32, >= 0, written in place.

    Examples:
        >>> import numpy as np
        >>> w, s = np.zeros((1, 2), np.float32), np.zeros((1, 2), np.float32)
        >>> sparse_adagrad_update(w, np.array([[1, -8]], np.float32), s, lr=0.5)
        >>> w.tolist(), s.tolist()
        ([[-0.5, 0.5]], [[1.0, 64.0]])

    Reference:
        Duchi et al. 2011, JMLR 12, "Adaptive Subgradient Methods".
    """
    _move("sparse_adagrad_update", Adagrad, locals())


@_words.documented_rows
def sparse_adam_update(
    weight: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    step: Any,
    *,
    lr: float = Adam.lr,
    betas: tuple[float, float] = Adam.betas,
    eps: float = Adam.eps,
    eps_mode: str = Adam.eps_mode,
    weight_decay: float = Adam.weight_decay,
    weight_decay_mode: str = Adam.weight_decay_mode,
    nesterov: bool = Adam.nesterov,
    rounding_seed: int | None = None,
    impl: Impl = "auto",
) -> None:
    """Move rows by Adam, in place; only rows that are passed age.

    "l2": g = grad + weight_decay w ("decoupled": g = grad, and w is scaled by 1 - lr weight_decay first);
    t <- t + 1; m <- m + (1 - b1)(g - m); v <- v + (1 - b2)(g^2 - v); u = m, with ``nesterov`` (1 - b1) g + b1 m;
    "torch": w <- w - lr u / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps);
    "tensorflow": w <- w - lr sqrt(1 - b2^t) / (1 - b1^t) u / (sqrt(v) + eps).
    t is the row's own count. torch.optim.SparseAdam is an int ``step``, which counts for all rows, and "tensorflow".

    Args:
        exp_avg: m, (U, D) float32, written in place.
        exp_avg_sq: v, (U, D) float32, written in place; or (U,) or (U, 1): one per row, of mean_j g_j^2.
        step: t before this step, (U,) or (U, 1) float32, advanced in place (it counts to 2^24, where no correction is
            left); or an int >= 1: the t of this step for all rows.
        betas: b1 and b2, each in [0, 1). Default (0.9, 0.999).
        eps_mode: "torch" or "tensorflow" (also that of Monolith and of torch.optim.SparseAdam). Default "torch".
        weight_decay_mode: "l2" or "decoupled" (AdamW). Default "l2".
        nesterov: Monolith's form, without the schedule of torch.optim.NAdam. Default False.

    Examples:
        >>> import numpy as np
        >>> w, m, v = (np.zeros((1, 2), np.float32) for _ in range(3))
        >>> step = np.zeros(1, np.float32)
        >>> sparse_adam_update(w, np.array([[3, -4]], np.float32), m, v, step, lr=0.5)
        >>> w.round(4).tolist(), step.tolist()
        ([[-0.5, 0.5]], [1.0])

    Reference:
        Kingma and Ba 2015, arXiv:1412.6980, algorithm 1; Loshchilov and Hutter 2019, arXiv:1711.05101 ("decoupled").
    """
    _move("sparse_adam_update", Adam, locals())


@_words.documented_rows
def ftrl_proximal_update(
    weight: Any,
    grad: Any,
    z: Any,
    n: Any,
    *,
    lr: float = FTRL.lr,
    beta: float = FTRL.beta,
    l1: float = FTRL.l1,
    l2: float = FTRL.l2,
    group: bool = FTRL.group,
    rounding_seed: int | None = None,
    impl: Impl = "auto",
) -> None:
    """Move rows by FTRL-proximal, in place.

    g = grad; s = (sqrt(n + g^2) - sqrt(n)) / lr; z <- z + g - s w; n <- n + g^2;
    w <- 0 if abs(z) <= l1, else -(z - sign(z) l1) / ((beta + sqrt(n)) / lr + l2), per element. With ``group`` over the
    norm of the row: w <- 0 if norm(z) <= l1, else -(1 - l1 / norm(z)) z / ((beta + sqrt(n)) / lr + l2).
    The weight is a function of z and n: one that does not start at 0 needs z = -w ((beta + sqrt(n)) / lr + l2) to begin
    with. Monolith's sign of z (0 or 1, wrong for l1 > 0) is not copied.

    Args:
        z, n: (U, D) float32, n >= 0, written in place.
        lr: alpha of the paper, > 0. Default 0.05.
        group: Default False.

    Examples:
        >>> import numpy as np
        >>> w, z, n = (np.zeros((1, 2), np.float32) for _ in range(3))
        >>> ftrl_proximal_update(w, np.array([[3, 0.5]], np.float32), z, n, lr=1, beta=0, l1=1, l2=1)
        >>> w.tolist()
        [[-0.5, 0.0]]

    Reference:
        McMahan et al. 2013, KDD, "Ad Click Prediction: a View from the Trenches", algorithm 1; ``group``: the same
        proximal step on the norm of the row, l1 not scaled by sqrt(D).
    """
    _move("ftrl_proximal_update", FTRL, locals())


@_words.documented_rows
def group_adagrad_update(
    weight: Any,
    grad: Any,
    state_sum: Any,
    *,
    lr: float = GroupAdagrad.lr,
    beta: float = GroupAdagrad.beta,
    l2: float = GroupAdagrad.l2,
    weight_decay: float = GroupAdagrad.weight_decay,
    rounding_seed: int | None = None,
    impl: Impl = "auto",
) -> None:
    """Move rows by Adagrad with one number of state per row and a penalty that zeroes whole rows, in place.

    g = grad + weight_decay w; state_sum <- state_sum + max_j g_j^2; eta = lr / (beta + sqrt(state_sum));
    y = w - eta g; w <- 0 if norm(y) <= l2 eta, else (1 - l2 eta / norm(y)) y. This is Monolith's rule on
    z = g - w / eta = -y / eta, written so that l2 = 0 leaves y exact.

    Args:
        state_sum: (U,) or (U, 1) float32, >= 0, written in place; Monolith starts it at 0.1.
        lr: learning rate, > 0. Default 0.01.
        l2: strength of the penalty on the norm, >= 0. Default 0.

    Examples:
        >>> import numpy as np
        >>> w, s = np.ones((2, 2), np.float32), np.ones(2, np.float32)
        >>> group_adagrad_update(w, np.zeros((2, 2), np.float32), s, lr=1, l2=5)
        >>> w.tolist()
        [[0.0, 0.0], [0.0, 0.0]]

    Reference:
        Monolith, Liu et al. 2022, arXiv:2209.07663 (the rule is in its code, group_adagrad_optimizer.cc).
    """
    _move("group_adagrad_update", GroupAdagrad, locals())
