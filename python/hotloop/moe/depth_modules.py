# SPDX-License-Identifier: Apache-2.0
"""Layers of experts in a residual stream with a state across depth: momentum, Adam in the first layer, robust momentum.

A ``ResidualStream`` goes through the layers of one forward pass: the numbers, their norm, the state, and the losses of
the routers so far.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..front import check
from ..front.called import as_defined
from ..front.impl import Impl
from . import depth
from .modules import Losses, MoE
from .results import AdamState, Norm, Routing


class ResidualStream(NamedTuple):
    """The residual stream between two layers, of tokens (..., D), and what goes through depth with it."""

    x: Tensor
    """(..., D), the stream itself."""
    normed: Tensor | None = None
    """(..., D), the norm of ``x`` that was asked for; what the next layer reads."""
    state: Tensor | AdamState | None = None
    """(..., D) each: what the layers of experts hand on. None before the first."""
    aux_loss: Tensor | None = None
    """(): the sum of the auxiliary losses so far. None before the first layer of experts."""
    routings: tuple[Routing, ...] = ()
    """Of the layers so far, for losses over all of them."""

    @classmethod
    def start(cls, x: Tensor, norm: Any = None) -> ResidualStream:
        """The stream before the first layer: x (..., D), and its norm if the layer reads one."""
        stream = cls(check.float_tensor("ResidualStream", "x", x))
        return stream if norm is None else stream._replace(normed=_normed("ResidualStream", x, norm))  # fmt: skip

    def add(self, update: Tensor, norm: Any = None) -> ResidualStream:
        """The stream behind a layer without a state, such as attention: x + update, and the next norm in the same pass.

        Args:
            update: what the layer computed, (..., D) like ``x``.
            norm: of the next layer: an ``nn.LayerNorm``, an ``nn.RMSNorm`` or a ``Norm``; None for none.
        """
        op, shape = "ResidualStream", self.x.shape
        check.float_tensor(op, "update", update)
        check.shape(op, "update", update, tuple(shape), "like the stream")
        chosen, behind = _norm(op, norm, self.x)
        step = depth.residual_smoe_layer(_flat(self.x), _flat(update), norm=chosen)
        x = step.x.view(shape)
        normed = _like(step.normed, shape) if behind is None else behind(x)
        return self._replace(x=x, normed=normed)


class _DepthMoE(nn.Module):
    """A mixture of experts and its norm, and the way into and out of the pass over the stream."""

    def __init__(self, mixture: MoE, norm: Any, post_norm: bool, dropout: float) -> None:
        super().__init__()
        op = type(self).__name__
        hint = "Pass MoE(dim, hidden_dim, num_experts, top_k)."
        check.instance(op, "mixture", mixture, MoE, hint=hint)
        check.instance(op, "norm", norm, nn.LayerNorm, nn.RMSNorm, type(None))
        self.mixture, self.norm = mixture, norm
        self.post_norm = check.flag(op, "post_norm", post_norm)
        if self.post_norm and norm is None:
            raise ValueError(
                f"[{op}] norm: expected a norm beside post_norm=True, got None. Pass nn.LayerNorm({mixture.dim})."
            )
        if norm is not None and tuple(norm.normalized_shape) != (mixture.dim,):
            raise ValueError(
                f"[{op}] norm: expected normalized_shape ({mixture.dim},) like mixture.dim, got "
                f"{tuple(norm.normalized_shape)}."
            )
        self.dropout = check.number(op, "dropout", dropout, at_least=0, below=1)

    def _pass(
        self,
        stream: ResidualStream,
        norm: Any,
        token_mask: Tensor | None,
        step: Any,
        read: Any = None,
    ) -> ResidualStream:
        """Read the stream, mix the experts, and take the step: a function of (x, parts of the pass) and its norm.

        Args:
            step: returns (x, state, normed), each (T, D), from x and the keywords of a depth op.
            read: makes what the router and the experts read, (..., D), from the stream; None: its norm.
        """
        op, shape = type(self).__name__, stream.x.shape
        x = _flat(stream.x)
        parts, losses = self._mix((read or self._read)(stream), token_mask)
        parts["norm"], behind = _norm(op, self.norm if self.post_norm else norm, stream.x)
        parts |= {"post_norm": self.post_norm and behind is None, "impl": self.mixture.impl}
        new, state, normed = step(x, parts)
        new, normed = new.view(shape), _like(normed, shape)
        if behind is not None:
            normed = behind(new)
            if self.post_norm:
                new, normed = normed, None
        aux = losses.aux_loss if stream.aux_loss is None else stream.aux_loss + losses.aux_loss
        routings = (*stream.routings, losses.routing)
        return ResidualStream(new, normed, _shaped(state, shape), aux, routings)

    def _checked(self, stream: Any, norm: Any, *states: type) -> None:
        op = type(self).__name__
        if not isinstance(stream, ResidualStream):
            raise TypeError(
                f"[{op}] stream: expected a ResidualStream, got {type(stream).__name__}. "
                "Pass ResidualStream.start(x), or what the layer before returned."
            )
        check.float_tensor(op, "stream.x", stream.x)
        if not isinstance(stream.state, (*states, type(None))):
            raise TypeError(
                f"[{op}] stream.state: expected {states[0].__name__} or None, got {type(stream.state).__name__}. "
                "Layers of one stream are of one class."
            )
        shape = tuple(stream.x.shape)
        kept = stream.state if isinstance(stream.state, AdamState) else (stream.state,)
        for name, value in (("normed", stream.normed), *(("state", part) for part in kept)):
            # Flattened, (2, 4, D) and (4, 2, D) are of one shape.
            if value is not None and tuple(value.shape) != shape:
                check.shape(op, f"stream.{name}", value, shape, "like stream.x")
        if self.post_norm and norm is not None:
            raise ValueError(
                f"[{op}] norm: expected None with post_norm=True, where the stream is normed itself, got one. "
                "Leave it out."
            )

    def _read(self, stream: ResidualStream) -> Tensor:
        if self.post_norm or (self.norm is None and stream.normed is None):
            return stream.x
        if stream.normed is not None:
            return stream.normed
        return _normed(type(self).__name__, stream.x, self.norm, self.mixture.impl)

    def _mix(self, read: Tensor, token_mask: Tensor | None) -> tuple[dict[str, Any], Losses]:
        """What the pass adds up: expert rows with their weights, or the whole mixture behind dropout."""
        if self.dropout and self.training:
            found = self.mixture(read, token_mask)
            losses = self.mixture.losses(found.routing)
            return {"z": functional.dropout(_flat(found.output), self.dropout)}, losses
        rows, routing, shared = self.mixture.expert_rows(read, token_mask)
        parts = {"z": rows, "topk_weights": routing.topk_weights, "dispatch": routing.dispatch}
        return {**parts, "shared": shared}, self.mixture.losses(routing)


class MomentumMoE(_DepthMoE):
    """A layer of experts whose outputs gather momentum across depth.

    m' = mu m + gamma SMoE(norm(x)); x' = x - m'. With ``post_norm``: x' = norm(x - m'), and the experts read x. The
    sign is absorbed by the experts; mu = 0 and gamma = -1 make the plain residual layer x + SMoE(norm(x)), to the last
    bit. Weights, sum over the experts, momentum, residual and the norm behind it are one pass.

    Args:
        mixture: the router and its experts.
        norm: ``nn.LayerNorm`` or ``nn.RMSNorm`` of D numbers: before the experts, used where the stream brings no norm
            along; with ``post_norm`` behind the residual. None: none. Default None.
        mu: momentum, a number. Default 0.7, the paper's.
        gamma: step, a number. Default 1.
        learnable: whether mu and gamma are parameters. Default False.
        post_norm: whether ``norm`` stands behind the residual. Default False.
        dropout: share of the mixture's numbers set to 0 in training, in [0, 1). With dropout the sum over the experts
            is a pass of its own. Default 0.

    Shape:
        a ``ResidualStream`` to the next one; ``forward(stream, norm=None, token_mask=None)``: ``norm`` is that of the
        next layer and comes back as ``normed``; ``token_mask`` (...) says which tokens count.

    Examples:
        >>> import torch
        >>> layers = [MomentumMoE(MoE(8, 16, num_experts=4, top_k=2), torch.nn.LayerNorm(8)) for _ in range(3)]
        >>> stream = ResidualStream.start(torch.randn(2, 5, 8))
        >>> for layer in layers:
        ...     stream = layer(stream)
        >>> stream.x.shape, len(stream.routings)
        (torch.Size([2, 5, 8]), 3)

    Reference:
        Teo and Nguyen 2024, arXiv:2410.14574.
    """

    def __init__(
        self,
        mixture: MoE,
        norm: nn.LayerNorm | nn.RMSNorm | None = None,
        *,
        mu: float = 0.7,
        gamma: float = 1.0,
        learnable: bool = False,
        post_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(mixture, norm, post_norm, dropout)
        self.mu, self.gamma = _numbers(self, learnable, mu=mu, gamma=gamma)

    def forward(
        self, stream: ResidualStream, norm: Any = None, token_mask: Tensor | None = None
    ) -> ResidualStream:
        self._checked(stream, norm, Tensor)
        return self._pass(stream, norm, token_mask, functools.partial(self._step, stream.state))

    def _step(self, m: Any, x: Tensor, parts: dict[str, Any]) -> Any:
        given = None if m is None else _flat(m)
        step = depth.momentum_smoe_layer(x, given, mu=self.mu, gamma=self.gamma, **parts)
        return step.x, step.m, step.normed

    def extra_repr(self) -> str:
        return _shown(self, "mu", "gamma", "post_norm", "dropout")


class AdamMoE(_DepthMoE):
    """``MomentumMoE`` whose first layer takes a step of Adam instead.

    In every layer m' = mu m + gamma2 z with z = SMoE(norm(x)). In the first, p' = beta1 p + (1 - beta1) z,
    v' = beta2 v + (1 - beta2) z^2 and x' = x - (gamma1 p' / sqrt(v' + eps) + kappa x); in the others x' = x - m'.
    There is no bias correction. With kappa = 1, as published, the first layer drops the residual.

    Args:
        mixture, norm, post_norm, dropout: as in ``MomentumMoE``.
        is_first: whether the layer takes the step of Adam. None: if the stream comes from no layer of experts.
            Default None.
        betas: beta1 and beta2, each in [0, 1). Default (0.9, 0.999).
        gamma1: > 0; the paper uses 1, and 0.8 for GLaM. Default 1.
        mu: momentum. Default 0.7.
        gamma2: step of the momentum. Default 1.
        kappa: 1 as published; 0 keeps the residual. Default 1.

    Shape:
        as in ``MomentumMoE``.

    Examples:
        >>> import torch
        >>> layer = AdamMoE(MoE(8, 16, num_experts=4, top_k=2), torch.nn.LayerNorm(8), kappa=0.0)
        >>> layer(ResidualStream.start(torch.randn(5, 8))).state._fields
        ('p', 'v', 'm')

    Reference:
        Teo and Nguyen 2024, arXiv:2410.14574.
    """

    def __init__(
        self,
        mixture: MoE,
        norm: nn.LayerNorm | nn.RMSNorm | None = None,
        *,
        is_first: bool | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        gamma1: float = 1.0,
        mu: float = 0.7,
        gamma2: float = 1.0,
        kappa: float = 1.0,
        post_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(mixture, norm, post_norm, dropout)
        op = type(self).__name__
        self.is_first = None if is_first is None else check.flag(op, "is_first", is_first)
        check.instance(op, "betas", betas, tuple)
        if len(betas) != 2:
            raise ValueError(f"[{op}] betas: expected two numbers, got {len(betas)}.")
        beta1, beta2 = (check.number(op, "betas", b, at_least=0, below=1) for b in betas)
        self.betas = (beta1, beta2)
        self.gamma1 = check.number(op, "gamma1", gamma1, above=0)
        self.mu, self.gamma2 = _numbers(self, False, mu=mu, gamma2=gamma2)
        self.kappa = check.number(op, "kappa", kappa)

    def forward(
        self, stream: ResidualStream, norm: Any = None, token_mask: Tensor | None = None
    ) -> ResidualStream:
        self._checked(stream, norm, AdamState)
        return self._pass(stream, norm, token_mask, functools.partial(self._step, stream.state))

    def _step(self, state: Any, x: Tensor, parts: dict[str, Any]) -> Any:
        first = state is None if self.is_first is None else self.is_first
        given = (
            None if state is None else AdamState(*(None if s is None else _flat(s) for s in state))
        )
        step = depth.adam_smoe_layer(
            x, given, is_first=first, betas=self.betas, gamma1=self.gamma1, mu=self.mu, gamma2=self.gamma2,
            kappa=self.kappa, **parts,
        )  # fmt: skip
        return step.x, step.state, step.normed

    def extra_repr(self) -> str:
        return _shown(self, "is_first", "betas", "gamma1", "mu", "gamma2", "kappa", "post_norm", "dropout")  # fmt: skip


class RobustMomentumMoE(_DepthMoE):
    """A layer of experts that looks ahead along the increment: the robust momentum method across depth.

    y = x + alpha d; d' = mu d - gamma SMoE(norm(y)); x' = x + d'. alpha, mu and gamma follow from L, k and lam
    (``robust_momentum_coefficients``): L is the smoothness of the mixture, k its condition number, and lam weighs
    robustness (1) against speed (0).

    Args:
        mixture, norm, dropout: as in ``MomentumMoE``. The norm stands before the experts, behind the look ahead.
        L: > 0.
        k: > 1.
        lam: in [0, 1].
        post_norm: whether ``norm`` stands behind the residual. Default False.

    Shape:
        as in ``MomentumMoE``. The experts read y, so the norm that a stream brings along is not used.

    Examples:
        >>> import torch
        >>> layer = RobustMomentumMoE(MoE(8, 16, num_experts=4, top_k=2), torch.nn.LayerNorm(8), L=1.0, k=4.0, lam=0.5)
        >>> layer(ResidualStream.start(torch.randn(5, 8))).x.shape
        torch.Size([5, 8])

    Reference:
        Teo and Nguyen 2024, arXiv:2410.14574; coefficients: Cyrus et al. 2018, arXiv:1710.04753.
    """

    def __init__(
        self,
        mixture: MoE,
        norm: nn.LayerNorm | nn.RMSNorm | None = None,
        *,
        L: float,
        k: float,
        lam: float,
        post_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(mixture, norm, post_norm, dropout)
        self.L, self.k, self.lam = L, k, lam
        self.coefficients = depth.robust_momentum_coefficients(L, k, lam)

    def forward(
        self, stream: ResidualStream, norm: Any = None, token_mask: Tensor | None = None
    ) -> ResidualStream:
        self._checked(stream, norm, Tensor)
        return self._pass(
            stream, norm, token_mask, functools.partial(self._step, stream.state), self._ahead
        )

    def _ahead(self, stream: ResidualStream) -> Tensor:
        op, x = type(self).__name__, stream.x
        norm, behind = _norm(op, None if self.post_norm else self.norm, x)
        d = None if stream.state is None else _flat(stream.state)
        alpha, impl = self.coefficients.alpha, self.mixture.impl
        ahead = depth.lookahead(_flat(x), d, alpha, norm=norm, impl=impl).view(x.shape)
        return ahead if behind is None else behind(ahead)

    def _step(self, d: Any, x: Tensor, parts: dict[str, Any]) -> Any:
        given = None if d is None else _flat(d)
        gamma, mu, *_ = self.coefficients
        step = depth.robust_momentum_smoe_layer(x, given, mu=mu, gamma=gamma, **parts)
        return step.x, step.d, step.normed

    def extra_repr(self) -> str:
        return _shown(self, "L", "k", "lam", "post_norm", "dropout")


def _numbers(module: nn.Module, learnable: bool, **numbers: float) -> list[Any]:
    """Numbers of a module, or parameters of one number each."""
    op = type(module).__name__
    check.flag(op, "learnable", learnable)
    found = [check.number(op, name, value) for name, value in numbers.items()]
    if not learnable:
        return list(found)
    device = next(module.parameters()).device
    return [nn.Parameter(torch.tensor(x, device=device)) for x in found]


def _shown(module: nn.Module, *names: str) -> str:
    values = ((name, getattr(module, name)) for name in names)
    return ", ".join(f"{k}={v.item() if isinstance(v, Tensor) else v}" for k, v in values)


def _flat(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


def _shaped(state: Any, shape: Any) -> Any:
    if isinstance(state, AdamState):
        return AdamState(*(_like(part, shape) for part in state))
    return state.view(shape)


def _like(x: Tensor | None, shape: Any) -> Tensor | None:
    return None if x is None else x.view(shape)


def _normed(op: str, x: Tensor, norm: Any, impl: Impl = "auto") -> Tensor:
    fused, behind = _norm(op, norm, x)
    if behind is None:
        return depth.lookahead(_flat(x), None, 0.0, norm=fused, impl=impl).view(x.shape)
    found: Tensor = behind(x)
    return found


def _norm(op: str, norm: Any, x: Tensor) -> tuple[Norm | None, Any]:
    """A norm as the argument of a pass; or None, and the module to be called behind the pass.

    Called is what is more than its numbers: a subclass with a formula of its own, a module with hooks.
    """
    if norm is None or isinstance(norm, Norm):
        return norm, None
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        raise TypeError(
            f"[{op}] norm: expected an nn.LayerNorm, an nn.RMSNorm or a Norm, got {type(norm).__name__}. "
            'Pass Norm("rms", norm.weight, None, eps) for a norm of another library.'
        )
    if tuple(norm.normalized_shape) != (x.shape[-1],):
        raise ValueError(
            f"[{op}] norm: expected normalized_shape ({x.shape[-1]},) like the stream, got "
            f"{tuple(norm.normalized_shape)}."
        )
    if not as_defined(norm, nn.LayerNorm, nn.RMSNorm):
        return None, norm
    if isinstance(norm, nn.LayerNorm):
        return Norm("layer", norm.weight, norm.bias, norm.eps), None
    eps = _DEFAULT_EPS[x.dtype] if norm.eps is None else norm.eps
    return Norm("rms", norm.weight, None, eps), None


def _tried_eps(dtype: torch.dtype) -> float:
    """What torch takes for eps=None: that of the dtype, or of the one it computes in, from version to version."""
    x = torch.full((1,), 2.0**-12, dtype=dtype, device="cpu")
    found = float(functional.rms_norm(x, (1,)))
    candidates = [torch.finfo(each).eps for each in (dtype, torch.float32)]
    return min(candidates, key=lambda eps: abs(2.0**-12 / math.sqrt(2.0**-24 + eps) - found))


# Here, since nothing is tried while a graph is traced.
_DEFAULT_EPS = {
    dtype: _tried_eps(dtype)
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
}
