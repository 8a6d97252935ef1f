# SPDX-License-Identifier: Apache-2.0
"""Sparse layers of a residual stream in one pass: combine the expert rows, move a state across depth, add, normalise.

The state travels along the layers of one forward pass, not along training steps: attention layers between leave it as
it is.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..front import arrays, check, environment
from ..front import impl as _impl
from ..front.impl import Impl
from ..reference.moe import depth as reference
from ..vocabulary import like
from . import _arguments as arguments
from . import _row_operator
from ._row_pass import Config
from .results import (
    AdamState,
    AdamStep,
    Dispatch,
    MomentumStep,
    Norm,
    ResidualStep,
    RobustMomentumCoefficients,
    RobustMomentumStep,
)

CANDIDATES = {"cuda": _impl.on_cuda, "cpu": _impl.on_cpu, "reference": _impl.everywhere}
MUCH = 10.0
"""A lookahead above this is warned of: it multiplies rounding errors and noise of the increments as much."""


def residual_smoe_layer(
    x: Tensor,
    z: Tensor,
    topk_weights: Tensor | None = None,
    dispatch: Dispatch | None = None,
    *,
    shared: Tensor | None = None,
    norm: Norm | None = None,
    post_norm: bool = False,
    impl: Impl = "auto",
) -> ResidualStep:
    """x' = x + z: a sparse layer with a plain residual, its expert rows and the next norm in one pass.

    With ``topk_weights`` and ``dispatch``, z holds expert rows and the mixture of token t is
    sum_j topk_weights[t, j] * z[row_of_slot[t * k + j]], as in ``combine``; then a ``shared`` row is added. Everything
    is computed in float32 (float64 for float64) and rounded when it is stored; the norm is that of the stored x'.

    Args:
        x: residual stream, (T, D) float32, float64, float16 or bfloat16. Differentiable.
        z: output of the mixture, (T, D); or expert rows (R, D) beside topk_weights and dispatch. Differentiable.
        topk_weights: (T, k), a float dtype; given together with dispatch. Differentiable. Default None.
        dispatch: of these T * k slots and R rows. Default None.
        shared: output of a shared expert, (T, D), added with weight 1. Differentiable. Default None.
        norm: of the new residual stream, for the next layer: ``Norm("layer", weight, bias, eps)`` or
            ``Norm("rms", weight)``. Its weight and bias are differentiable. Default None.
        post_norm: the norm is part of the residual stream, x' = norm(x + z). Default False.
        impl: "auto", "cpu", "cuda" or "reference".

    Returns:
        ``ResidualStep``: x' in the dtype of ``x``, and its norm or None.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device, float64 beside a narrower dtype; only one of
            topk_weights and dispatch; post_norm without a norm; on the CPU, or with HOTLOOP_CHECK=1, numbers of a
            dispatch that are out of range or not inverse to each other.
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import torch
        >>> x, z = torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, -1.0]])
        >>> step = residual_smoe_layer(x, z, norm=Norm("rms"))
        >>> step.x.tolist(), step.normed.round(decimals=4).tolist()
        ([[2.0, 2.0]], [[1.0, 1.0]])

    Reference:
        Definition; the baseline of Teo and Nguyen 2024, arXiv:2410.14574.
    """
    op = "residual_smoe_layer"
    if _check(op, x, z, topk_weights, dispatch, shared, norm, post_norm, impl) != "reference":
        return ResidualStep(
            *_run(op, "residual", (), (), x, (), z, topk_weights, dispatch, shared, norm, post_norm)
        )
    return reference.residual_smoe_layer(
        x, z, topk_weights, _looked_at(op, dispatch), shared=shared, norm=norm, post_norm=post_norm
    )


@like(residual_smoe_layer)
def momentum_smoe_layer(
    x: Tensor,
    m: Tensor | None,
    z: Tensor,
    topk_weights: Tensor | None = None,
    dispatch: Dispatch | None = None,
    *,
    mu: float | Tensor = 0.7,
    gamma: float | Tensor = 1.0,
    shared: Tensor | None = None,
    norm: Norm | None = None,
    post_norm: bool = False,
    impl: Impl = "auto",
) -> MomentumStep:
    """m' = mu * m + gamma * z and x' = x - m': heavy-ball momentum across the sparse layers of one forward pass.

    The minus sign is that of the released code; trained experts absorb it. mu = 0 and gamma = -1 give the bits of
    ``residual_smoe_layer``. With linear experts z = lambda x the stream follows x_{t+1} = (1 + mu - gamma lambda) x_t -
    mu x_{t-1}, which is stable for -1 <= mu < 1 and 0 < gamma lambda < 2 + 2 mu.

    Args:
        m: momentum of the sparse layer before, (T, D), in the dtype of ``x`` or float32 (float64 for float64); None
            before the first one: zeros, which are then not read. bfloat16 loses small increments over depth.
            Differentiable.
        mu: how much of the momentum is kept: a number, or a tensor of shape () with a gradient. Default 0.7.
        gamma: step along z, likewise. Default 1.
        post_norm: the norm is part of the residual stream, x' = norm(x - m'). Default False.

    Returns:
        ``MomentumStep``: x' in the dtype of ``x``; m' in that of ``m``, without one in float32 (float64 for float64);
        the norm of x' or None.

    Examples:
        >>> x, z = torch.zeros(1, 1), torch.ones(1, 1)
        >>> first = momentum_smoe_layer(x, None, z, mu=0.5)
        >>> second = momentum_smoe_layer(first.x, first.m, z, mu=0.5)
        >>> first.x.item(), second.m.item(), second.x.item()
        (-1.0, 1.5, -2.5)

    Reference:
        Teo and Nguyen 2024, arXiv:2410.14574, with the signs of their code.
    """
    op = "momentum_smoe_layer"
    chosen = _check(op, x, z, topk_weights, dispatch, shared, norm, post_norm, impl, m=m)
    mu, gamma = arguments.number(op, "mu", mu, "x", x), arguments.number(op, "gamma", gamma, "x", x)
    if chosen != "reference":
        return MomentumStep(
            *_run(
                op, "momentum", (mu, gamma), (), x, (m,), z, topk_weights, dispatch, shared, norm, post_norm
            )
        )  # fmt: skip
    return reference.momentum_smoe_layer(
        x, m, z, topk_weights, _looked_at(op, dispatch), mu=mu, gamma=gamma,
        shared=shared, norm=norm, post_norm=post_norm,
    )  # fmt: skip


@like(momentum_smoe_layer)
def adam_smoe_layer(
    x: Tensor,
    state: AdamState | None,
    z: Tensor,
    topk_weights: Tensor | None = None,
    dispatch: Dispatch | None = None,
    *,
    is_first: bool,
    betas: tuple[float, float] = (0.9, 0.999),
    gamma1: float = 1.0,
    mu: float | Tensor = 0.7,
    gamma2: float | Tensor = 1.0,
    kappa: float = 1.0,
    eps: float = 1e-8,
    shared: Tensor | None = None,
    norm: Norm | None = None,
    post_norm: bool = False,
    impl: Impl = "auto",
) -> AdamStep:
    """Adam in the first sparse layer, momentum in the others.

    m' = mu * m + gamma2 * z in every layer. In the first one p' = beta1 * p + (1 - beta1) * z, v' = beta2 * v + (1 -
    beta2) * z^2 and x' = x - (gamma1 * p' / sqrt(v' + eps) + kappa * x), without bias correction; eps is inside the
    root. In the others p' = p, v' = v and x' = x - m', which is ``momentum_smoe_layer``. With zero states and |z| well
    above sqrt(eps / (1 - beta2)) the first layer moves by gamma1 * 3.1623 * sign(z).

    Args:
        state: ``AdamState(p, v, m)`` of the sparse layer before, (T, D) each, in the dtype of ``x`` or float32
            (float64 for float64); None, or None in it, before the first one: zeros. Differentiable.
        is_first: whether this is the layer with Adam. True everywhere is Adam everywhere.
        betas: decay of p and v, each >= 0 and < 1. Default (0.9, 0.999).
        gamma1: step along p' / sqrt(v' + eps). Default 1; the authors take 0.8 for GLaM.
        gamma2: step along z in m: a number, or a tensor of shape () with a gradient. Default 1.
        kappa: decay of x in the first layer. At the authors' 1 the residual cancels, x' = -gamma1 * p' / sqrt(v' +
            eps); 0 keeps it. Default 1.
        eps: > 0. Default 1e-8.
        post_norm: the norm is part of the residual stream. Default False.

    Returns:
        ``AdamStep``: x' in the dtype of ``x``, the new state, and the norm of x' or None. A state keeps its dtype; one
        that was None becomes float32 (float64 for float64).

    Examples:
        >>> x, z = torch.zeros(1, 2), torch.tensor([[2.0, -0.5]])
        >>> adam_smoe_layer(x, None, z, is_first=True).x.round(decimals=3).tolist()
        [[-3.1619999408721924, 3.1619999408721924]]

    Reference:
        Teo and Nguyen 2024, arXiv:2410.14574, with the settings of their code.
    """
    op = "adam_smoe_layer"
    if state is not None and not isinstance(state, AdamState):
        raise TypeError(
            f"[{op}] state: expected an AdamState or None, got {type(state).__name__}. Pass step.state."
        )
    names = {} if state is None else {f"state.{k}": v for k, v in state._asdict().items()}
    chosen = _check(op, x, z, topk_weights, dispatch, shared, norm, post_norm, impl, **names)
    is_first = check.flag(op, "is_first", is_first)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"[{op}] betas: expected two numbers, got {betas!r}. Pass (0.9, 0.999).")
    betas = (
        check.number(op, "betas", betas[0], at_least=0, below=1),
        check.number(op, "betas", betas[1], at_least=0, below=1),
    )
    gamma1, kappa = (check.number(op, k, v) for k, v in (("gamma1", gamma1), ("kappa", kappa)))
    eps = check.number(op, "eps", eps, above=0)
    mu, gamma2 = (
        arguments.number(op, "mu", mu, "x", x),
        arguments.number(op, "gamma2", gamma2, "x", x),
    )
    if chosen != "reference":
        before = AdamState(None, None, None) if state is None else state
        more = (z, topk_weights, dispatch, shared, norm, post_norm)
        if not is_first:
            out, m, normed = _run(op, "momentum", (mu, gamma2), (), x, (before.m,), *more)
            return AdamStep(out, before._replace(m=m), normed)
        rates = (gamma1, betas[0], 1 - betas[0], betas[1], 1 - betas[1], 1 - kappa, eps)
        out, *kept, normed = _run(op, "adam", (mu, gamma2), rates, x, before, *more)
        return AdamStep(out, AdamState(*kept), normed)
    return reference.adam_smoe_layer(
        x, state, z, topk_weights, _looked_at(op, dispatch), is_first=is_first, betas=betas, gamma1=gamma1,
        mu=mu, gamma2=gamma2, kappa=kappa, eps=eps, shared=shared, norm=norm, post_norm=post_norm,
    )  # fmt: skip


@like(momentum_smoe_layer)
def robust_momentum_smoe_layer(
    x: Tensor,
    d: Tensor | None,
    z: Tensor,
    topk_weights: Tensor | None = None,
    dispatch: Dispatch | None = None,
    *,
    mu: float | Tensor,
    gamma: float | Tensor,
    alpha: float | Tensor = 0.0,
    shared: Tensor | None = None,
    norm: Norm | None = None,
    post_norm: bool = False,
    impl: Impl = "auto",
) -> RobustMomentumStep:
    """d' = mu * d - gamma * z and x' = x + d', where z is the mixture at the lookahead point y = x + alpha * d.

    Router and experts take ``lookahead(x, d, alpha)``, or its norm, in the place of x; mu, gamma and alpha come from
    ``robust_momentum_coefficients``. d = -m of ``momentum_smoe_layer``, whose bits this gives.

    Args:
        d: increment of the sparse layer before, (T, D), in the dtype of ``x`` or float32 (float64 for float64); None
            before the first one: zeros, which are then not read. Differentiable.
        mu: how much of the increment is kept: a number, or a tensor of shape () with a gradient. No default.
        gamma: step along z, likewise. No default.
        alpha: the norm is that of x' + alpha * d', for a sparse layer that follows at once. With attention between
            leave it at 0 and call ``lookahead`` behind the attention. A number, or a tensor of shape () with a
            gradient. Without effect with ``post_norm``. Default 0.
        norm: of x' + alpha * d', for the next layer. Default None.
        post_norm: the norm is part of the residual stream, x' = norm(x + d'). Default False.

    Returns:
        ``RobustMomentumStep``: x' in the dtype of ``x``; d' in that of ``d``, without one in float32 (float64 for
        float64); the norm or None.

    Examples:
        >>> c = robust_momentum_coefficients(L=1.0, k=4.0, lam=0.0)
        >>> x, d = torch.ones(1, 1), None
        >>> for _ in range(3):
        ...     z = lookahead(x, d, c.alpha)  # experts f(y) = y
        ...     x, d, _ = robust_momentum_smoe_layer(x, d, z, mu=c.mu, gamma=c.gamma)
        >>> round(x.item(), 4)
        -0.125

    Reference:
        Teo and Nguyen 2024, arXiv:2410.14574; coefficients of Cyrus et al. 2018, arXiv:1710.04753.
    """
    op = "robust_momentum_smoe_layer"
    chosen = _check(op, x, z, topk_weights, dispatch, shared, norm, post_norm, impl, d=d)
    mu, gamma = arguments.number(op, "mu", mu, "x", x), arguments.number(op, "gamma", gamma, "x", x)
    alpha = arguments.number(op, "alpha", alpha, "x", x)
    if chosen != "reference":
        numbers = (mu, gamma, 0.0 if post_norm else alpha)
        return RobustMomentumStep(
            *_run(op, "robust", numbers, (), x, (d,), z, topk_weights, dispatch, shared, norm, post_norm)
        )  # fmt: skip
    return reference.robust_momentum_smoe_layer(
        x, d, z, topk_weights, _looked_at(op, dispatch), mu=mu, gamma=gamma, alpha=alpha,
        shared=shared, norm=norm, post_norm=post_norm,
    )  # fmt: skip


def lookahead(
    x: Tensor,
    d: Tensor | None,
    alpha: float | Tensor,
    *,
    norm: Norm | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """y = x + alpha * d, the point that router and experts of a robust momentum layer look at; or its norm.

    Args:
        x: residual stream, (T, D) float32, float64, float16 or bfloat16. Differentiable.
        d: increment of the sparse layer before, (T, D), in the dtype of ``x`` or float32 (float64 for float64); None
            for zeros. Differentiable.
        alpha: of ``robust_momentum_coefficients``: a number, or a tensor of shape () with a gradient.
        norm: what is returned is the norm of y, which is not stored itself. Default None.
        impl: "auto", "cpu", "cuda" or "reference".

    Returns:
        (T, D) in the dtype of ``x``.

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device.
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import torch
        >>> lookahead(torch.ones(1, 2), torch.tensor([[2.0, -2.0]]), 0.5).tolist()
        [[2.0, 0.0]]

    Reference:
        Cyrus et al. 2018, arXiv:1710.04753.
    """
    op = "lookahead"
    arguments.matrix(op, "x", x)
    _state(op, "d", d, x)
    alpha = arguments.number(op, "alpha", alpha, "x", x)
    arguments.norm_of(op, norm, False, "x", x)
    check.finite(op, x=x, d=d)
    if _impl.choose(op, impl, "x", x, CANDIDATES) == "reference" or norm is None:
        return reference.lookahead(x, d, alpha, norm=norm)
    *_, normed = _run(op, "lookahead", (alpha,), (), x, (d,), None, None, None, None, norm, False)
    return normed


def robust_momentum_coefficients(L: float, k: float, lam: float) -> RobustMomentumCoefficients:
    """mu, gamma and alpha of a robust momentum layer, from what is known of the mixture and one knob.

    p = lam (1 - 1/k) + (1 - lam) (1 - 1/sqrt(k)), gamma = k (1-p)^2 (1+p) / L, mu = k p^3 / (k-1), alpha = p^3 /
    ((k-1) (1-p)^2 (1+p)). On a quadratic with eigenvalues in [L/k, L] errors shrink by p per layer. lam = 0 is the
    triple momentum method, the fastest; lam = 1 is gradient descent in the lookahead point, the most robust. alpha
    grows fast towards lam = 1 (49 at k = 100): above 10 there is a warning.

    Args:
        L: smoothness of the mixture as a gradient map, > 0. The paper's own value is not known: there is no default.
        k: condition number, > 1.
        lam: 0 (fast) to 1 (robust).

    Returns:
        ``RobustMomentumCoefficients``: gamma, mu, alpha and p, Python floats.

    Raises:
        TypeError, ValueError: not a number, or out of range.

    Examples:
        >>> import torch
        >>> c = robust_momentum_coefficients(L=2.0, k=4.0, lam=0.0)
        >>> c.p, c.gamma, round(c.mu, 4), round(c.alpha, 4)
        (0.5, 0.75, 0.1667, 0.1111)

    Reference:
        Cyrus, Hu, Van Scoy and Lessard 2018, arXiv:1710.04753; triple momentum: Van Scoy, Freeman and Lynch 2018.
    """
    op = "robust_momentum_coefficients"
    L = check.number(op, "L", L, above=0)
    k = check.number(op, "k", k, above=1)
    lam = check.number(op, "lam", lam, at_least=0, at_most=1)
    found = reference.robust_momentum_coefficients(L, k, lam)
    if found.alpha > MUCH:
        warnings.warn(
            f"[{op}] lam: alpha is {found.alpha:.3g} at k = {k:g} and lam = {lam:g}, so the lookahead point multiplies "
            "the noise of increments by it. Take a smaller lam.",
            stacklevel=2,
        )
    return found


def _check(
    op: str,
    x: Any,
    z: Any,
    topk_weights: Any,
    dispatch: Any,
    shared: Any,
    norm: Any,
    post_norm: Any,
    impl: str,
    **states: Any,
) -> str:
    """Check what all layers take, and return the implementation."""
    arguments.matrix(op, "x", x)
    for name, state in states.items():
        _state(op, name, state, x)
    shape = tuple(x.shape)
    if topk_weights is None and dispatch is None:
        if not arguments.fits(z, arguments.alike(x), shape, x):
            _check_z(op, z, x)
            hint = "Pass topk_weights and dispatch beside expert rows."
            check.shape(op, "z", z, shape, "like x", hint)
    elif topk_weights is None or dispatch is None:
        name, other = ("topk_weights", "dispatch")[:: 1 if topk_weights is None else -1]
        raise ValueError(
            f"[{op}] {name}: expected a value beside {other}, got None. Pass both, or the combined z alone."
        )
    else:
        _check_z(op, z, x)
        arguments.weighted(op, z, "z", topk_weights, dispatch)
        if topk_weights.shape[0] != shape[0]:
            check.shape(
                op, "topk_weights", topk_weights, (shape[0], topk_weights.shape[1]), "(T, k)"
            )
        if z.shape[1] != shape[1]:
            check.shape(op, "z", z, (z.shape[0], shape[1]), "(R, D) like x")
    if shared is not None:
        arguments.beside(op, "shared", shared, shape, "x", x)
    arguments.norm_of(op, norm, post_norm, "x", x)
    if environment.checks_on():
        check.finite(op, x=x, z=z, topk_weights=topk_weights, shared=shared, **states)
    return _impl.choose(op, impl, "x", x, CANDIDATES)


def _check_z(op: str, z: Any, x: Tensor) -> None:
    """Of any shape."""
    arguments.matrix(op, "z", z)
    if z.device != x.device or z.dtype not in arguments.alike(x):
        check.same_place(op, "z", z, "x", x)
        arguments.same_width(op, "z", z, "x", x)


def _state(op: str, name: str, state: Any, x: Tensor) -> None:
    if state is None or (
        arguments.fits(state, (x.dtype, torch.float32), x.shape, x) and x.dtype is not torch.float64
    ):
        return
    arguments.beside(op, name, state, tuple(x.shape), "x", x)
    if state.dtype not in (x.dtype, torch.float32, torch.float64):
        raise TypeError(
            f"[{op}] {name}: expected {arrays.dtype(x)} like x, or float32, got {arrays.dtype(state)}. Convert it."
        )


def _looked_at(op: str, dispatch: Dispatch | None) -> Dispatch | None:
    return None if dispatch is None else arguments.looked_at(op, dispatch)


def _run(
    op: str,
    rule: str,
    slopes: tuple[float | Tensor, ...],
    others: tuple[float, ...],
    x: Tensor,
    states: tuple[Tensor | None, ...],
    z: Tensor | None,
    topk_weights: Tensor | None,
    dispatch: Dispatch | None,
    shared: Tensor | None,
    norm: Norm | None,
    post_norm: bool,
) -> Any:
    """The compiled pass: the new x, the states, the norm. ``slopes`` are the numbers that may be tensors."""
    numbers: Tensor | None = None
    values = [0.0 if isinstance(v, Tensor) else v for v in slopes]
    if any(isinstance(v, Tensor) for v in slopes):
        numbers = torch.stack(
            [
                v.double() if isinstance(v, Tensor) else x.new_full((), v, dtype=torch.float64)
                for v in slopes
            ]
        )
    kind, weight, bias, eps = ("", None, None, 0.0) if norm is None else norm
    slot_of_row, row_of_slot = (None, None) if dispatch is None else dispatch[:2]
    config = Config(
        op, rule, (*values, *others), kind, eps, post_norm, None, slot_of_row, row_of_slot
    )
    padding = (None,) * (3 - len(states))
    return _row_operator.run(
        config, (x, *states, *padding, z, topk_weights, shared, weight, bias, numbers)
    )
