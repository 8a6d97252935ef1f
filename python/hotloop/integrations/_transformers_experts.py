# SPDX-License-Identifier: Apache-2.0
"""The experts implementation "hotloop" of transformers: ``model.set_experts_implementation("hotloop")``.

transformers keeps a register of functions that compute the experts of a layer, (module, hidden states, chosen experts,
weights) to the sum over the chosen. Classes say how their weights lie: ``is_transposed``, ``has_bias``, ``has_gate``,
``has_post_expert_norm``, and ``_apply_gate`` computes the activation. Where that is one that the fused op knows, the
experts are one op; any other one is called between two grouped products. So every class of the register is served.
"""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..front import check
from ..front.autocast import as_linear_takes
from ..front.called import as_defined
from ..moe import (
    Activation,
    Dispatch,
    combine,
    dispatch,
    expert_mlp,
    expert_rows,
    grouped_linear,
    permute,
)
from ..reference.moe.experts import activate

NAME = "hotloop"
_OP = "transformers experts"
_SAYS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def register() -> None:
    """Enter the implementation into transformers' register; where it has none, do nothing."""
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:
        return
    ExpertsInterface.register(NAME, experts_forward)
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
    except ImportError:
        return
    FP8ExpertsInterface.register(NAME, _refuse_quantized)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers' "eager" computes of the experts module ``self``.

    Args:
        hidden_states: (T, D), a float dtype.
        top_k_index: (T, k) integers, 0 to num_experts - 1; num_experts for a choice that lies on another rank.
        top_k_weights: (T, k).

    Returns:
        (T, D), the dtype of ``hidden_states``.
    """
    weights = _weights(self)
    check.float_tensor(_OP, "hidden_states", hidden_states, ndim=2)
    x, *narrow = as_linear_takes(hidden_states, *weights)
    up, down, *biases = narrow
    options = {**dict(zip(("gate_up_bias", "down_bias"), biases)), "transposed": self.is_transposed}
    ids = top_k_index.to(torch.int64)
    # -1, which goes nowhere in a dispatch, is out of range here.
    ids = torch.where(ids == self.num_experts, -1, torch.where(ids < 0, -2, ids))
    order = dispatch(ids, self.num_experts)
    activation = _activation(self)
    if activation is not None and not self.has_post_expert_norm:
        options["activation"] = activation
        return expert_mlp(x, up, down, top_k_weights, order, **options).to(hidden_states.dtype)
    if activation is not None:
        rows = expert_rows(x, up, down, order, activation=activation, **options)
    else:
        rows = _own_activation(self, permute(x, order), order, up, down, *biases)
    if self.has_post_expert_norm:
        rows = self.post_expert_norm(rows)
    return combine(rows, top_k_weights, order, out_dtype=hidden_states.dtype)


def _own_activation(
    self: Any,
    rows: Tensor,
    order: Dispatch,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """Expert rows with the activation of the module between two products."""
    transposed = self.is_transposed
    h = grouped_linear(rows, up, order, up_bias, transposed=transposed)
    h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
    return grouped_linear(h.to(rows.dtype), down, order, down_bias, transposed=transposed)


# -- the activation of a module ------------------------------------------------------------------------------

_KINDS = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
"""Activations of torch and transformers that the fused op knows, by class."""
_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_WITH_GATE = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}


def _activation(self: Any) -> Activation | None:
    """The activation of a module as the fused op knows it; None for any other."""
    act = getattr(self, "act_fn", None)
    kind = "silu" if act is None or act is functional.silu else _kind(act)
    if kind is None or "_apply_gate" in self.__dict__:
        return None
    if not self.has_gate:
        return Activation(kind)
    limit = getattr(self, "limit", getattr(self, "swiglu_limit", None))
    alpha = getattr(self, "alpha", getattr(self, "swiglu_alpha", None))
    numbers = [float(x) if isinstance(x, (int, float)) else None for x in (limit, alpha)]
    return _recognised(type(self)._apply_gate, kind, *numbers)


def _kind(act: Any) -> str | None:
    """The name of an activation that is one of torch or transformers: not a namesake, and without hooks."""
    cls = type(act)
    known = cls.__module__ in _HOMES and isinstance(act, torch.nn.Module) and as_defined(act, cls)
    return _KINDS.get(cls.__name__) if known else None


@torch.compiler.assume_constant_result
def _recognised(
    gate: Any, kind: str, limit: float | None, alpha: float | None
) -> Activation | None:
    return _tried(gate, kind, limit, alpha)


@functools.cache
def _tried(gate: Any, kind: str, limit: float | None, alpha: float | None) -> Activation | None:
    """The activation that gives the numbers of ``gate``, a function of a module and the rows of the first product.

    It is tried, since its name says nothing: a class may change its formula from one version to the next.
    """
    if kind not in _WITH_GATE:
        return None
    act = functools.partial(activate, activation=Activation(kind))
    numbers = {"limit": limit, "swiglu_limit": limit, "alpha": alpha, "swiglu_alpha": alpha}
    rows = torch.linspace(-3, 3, 64, dtype=torch.float64, device="cpu").view(4, 16)
    rows = rows[
        :, torch.randperm(16, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    ]
    rows = rows * max(1.0, abs(limit or 1.0))
    try:
        wanted = gate(SimpleNamespace(**numbers, act_fn=act), rows).double()
    except Exception:  # it reads what only the module has
        return None
    for interleaved, shift, scale, cut in itertools.product(
        (False, True), (0.0, 1.0), {alpha or 1.0, 1.0}, {limit, None}
    ):
        found = Activation(_WITH_GATE[kind], interleaved, cut, scale, shift)
        if wanted.shape == (4, 8) and torch.allclose(activate(rows, found), wanted):
            return found
    return None


# -- the weights of a module ---------------------------------------------------------------------------------


def _weights(self: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The parameters of both products: weights, then biases."""
    if missing := [name for name in _SAYS if not hasattr(self, name)]:
        raise NotImplementedError(
            f"[{_OP}] {type(self).__name__}: expected a class under @use_experts_implementation, got one that does not "
            f"say {', '.join(missing)}. Use set_experts_implementation('eager')."
        )
    first = "gate_up_proj" if self.has_gate else "up_proj"
    names = (first, "down_proj", f"{first}_bias", "down_proj_bias")
    found: list[Any] = [
        getattr(self, name) if "bias" not in name or self.has_bias else None for name in names
    ]
    for name, x in zip(names, found):
        if x is not None:
            _check_weight(self, name, x)
    up, down, up_bias, down_bias = found
    return up, down, up_bias, down_bias


def _check_weight(self: Any, name: str, value: Any) -> None:
    where = f"{type(self).__name__}.{name}"
    try:
        check.float_tensor(_OP, where, value, ndim=2 if "bias" in name else 3)
    except (TypeError, ValueError) as error:
        raise NotImplementedError(f"{error} Use set_experts_implementation('eager').") from None
    if value.shape[0] != self.num_experts:
        raise NotImplementedError(
            f"[{_OP}] {where}: expected {self.num_experts} experts, got shape {tuple(value.shape)}. "
            "Use set_experts_implementation('eager')."
        )


def _refuse_quantized(self: Any, *_args: Any, **_kwargs: Any) -> Tensor:
    raise NotImplementedError(
        f"[{_OP}] {type(self).__name__}: expected weights of a float dtype, got quantized ones, which hotloop does not "
        "read. Use set_experts_implementation('grouped_mm')."
    )
