# SPDX-License-Identifier: Apache-2.0
"""The pass over rows written again as in the papers: a loop over tokens and slots, and the norms of torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hotloop import moe
from hotloop.moe import AdamState, Dispatch, Norm
from torch import Tensor
from torch.nn import functional

Given = dict[str, Any]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=g).to(dtype)


# -- orders of expert rows -----------------------------------------------------------------------------------


def routed(tokens: int, k: int, experts: int = 5, **options: Any) -> Dispatch:
    """The order that a choice of experts gives; about one slot in six goes nowhere."""
    g = torch.Generator().manual_seed(tokens)
    ids = torch.rand((tokens, experts + 1), generator=g).argsort(1)[:, :k] - 1
    return moe.dispatch(ids, experts, **options)


def shuffled(tokens: int, k: int, empty: int = 2, dropped: int = 3) -> Dispatch:
    """Rows in any order, some of them of nothing and in the middle; some slots without a row."""
    g = torch.Generator().manual_seed(tokens + k)
    slots = torch.randperm(tokens * k, generator=g)[: max(0, tokens * k - dropped)]
    rows = torch.randperm(len(slots) + empty, generator=g)[: len(slots)]
    slot_of_row = torch.full((len(slots) + empty,), -1).scatter(0, rows, slots)
    row_of_slot = torch.full((tokens * k,), -1).scatter(0, slots, rows)
    n = torch.tensor(len(slots) + empty)
    return Dispatch(slot_of_row, row_of_slot, torch.stack((n * 0, n)), n.view(1) - empty)


ORDERS = {
    "routed": lambda t, k: routed(t, k),
    "capacity": lambda t, k: routed(t, k, capacity=2),
    "align": lambda t, k: routed(t, k, align=4),
    "shuffled": shuffled,
    "nowhere": lambda t, k: shuffled(t, k, empty=1, dropped=t * k),
}


# -- formulas ------------------------------------------------------------------------------------------------


def mixture(z: Tensor, topk_weights: Any = None, dispatch: Any = None, shared: Any = None) -> Tensor:  # fmt: skip
    if topk_weights is None:
        return z if shared is None else z + shared
    t, k = topk_weights.shape
    sums = []
    for token in range(t):
        total = z.new_zeros(z.shape[1])
        for j in range(k):
            row = int(dispatch.row_of_slot[token * k + j])
            if row >= 0:
                total = total + topk_weights[token, j] * z[row]
        sums.append(total if shared is None else total + shared[token])
    return torch.stack(sums) if sums else z.new_zeros((0, z.shape[1]))


def normalized(h: Tensor, norm: Norm) -> Tensor:
    columns = (h.shape[-1],)
    if norm.kind == "layer":
        return functional.layer_norm(h, columns, norm.weight, norm.bias, norm.eps)
    out = functional.rms_norm(h, columns, norm.weight, norm.eps)
    return out if norm.bias is None else out + norm.bias


def residual(x: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    return (x + z,)


def momentum(x: Tensor, z: Tensor, m: Any, mu: Any, gamma: Any) -> tuple[Tensor, ...]:
    m = gamma * z if m is None else mu * m + gamma * z
    return x - m, m


def adam(
    x: Tensor, z: Tensor, state: Any, mu: Any, gamma2: Any, betas: Any = (0.9, 0.999), gamma1: float = 1.0,
    kappa: float = 1.0, eps: float = 1e-8, is_first: bool = True,
) -> tuple[Tensor, ...]:  # fmt: skip
    p, v, m = (torch.zeros_like(z) if s is None else s for s in state or (None, None, None))
    m = mu * m + gamma2 * z
    if not is_first:
        return x - m, p, v, m
    p = betas[0] * p + (1 - betas[0]) * z
    v = betas[1] * v + (1 - betas[1]) * z * z
    return x - (gamma1 * p / (v + eps).sqrt() + kappa * x), p, v, m


def robust(x: Tensor, z: Tensor, d: Any, mu: Any, gamma: Any) -> tuple[Tensor, ...]:
    d = -gamma * z if d is None else mu * d - gamma * z
    return x + d, d


class Rule(NamedTuple):
    op: Any
    state: str
    """The argument that holds the state, or ""."""
    numbers: tuple[str, ...]
    """Those that may be tensors."""
    options: dict[str, Any]


RULES = {
    "residual": Rule(moe.residual_smoe_layer, "", (), {}),
    "momentum": Rule(moe.momentum_smoe_layer, "m", ("mu", "gamma"), {}),
    "adam": Rule(
        moe.adam_smoe_layer,
        "state",
        ("mu", "gamma2"),
        {"is_first": True, "gamma1": 0.8, "kappa": 0.3, "betas": (0.8, 0.9), "eps": 1e-2},
    ),
    "robust": Rule(moe.robust_momentum_smoe_layer, "d", ("mu", "gamma", "alpha"), {}),
}
FORMULAS: dict[str, Any] = {
    "residual": residual,
    "momentum": momentum,
    "adam": adam,
    "robust": robust,
}


def layer(rule: str, given: Given) -> list[Tensor]:
    """x', the states and the norm of x', in the dtype of the arguments."""
    rest = dict(given)
    z = mixture(*(rest.pop(name, None) for name in ("z", "topk_weights", "dispatch", "shared")))
    norm, post, alpha = (rest.pop(*pair) for pair in (("norm", None), ("post_norm", 0), ("alpha", 0)))  # fmt: skip
    out, *states = FORMULAS[rule](z=z, **rest)
    if norm is None:
        return [out, *states]
    if post:
        return [normalized(out, norm), *states]
    ahead = out + alpha * states[0] if rule == "robust" else out
    return [out, *states, normalized(ahead, norm)]


def results(step: Any) -> list[Tensor]:
    """What a layer of ours returns, in the same order."""
    flat: list[Any] = []
    for part in step:
        flat += list(part) if isinstance(part, AdamState) else [part]
    return [x for x in flat if x is not None]


# -- arguments -----------------------------------------------------------------------------------------------


def arguments(
    rule: str, tokens: int, columns: int, *, k: int = 3, order: str = "shuffled", norm: str = "layer",
    dtype: torch.dtype = torch.float32, state: Any = torch.float32, shared: bool = True, tensors: bool = True,
    slots: bool = True, **more: Any,
) -> Given:  # fmt: skip
    """A call in which everything that can have a gradient has one; ``state`` None: there is none before."""
    found = RULES[rule]
    given: Given = {"x": normal(tokens, columns, seed=1, dtype=dtype), **found.options, **more}
    if slots:
        given["dispatch"] = ORDERS[order](tokens, k)
        rows = len(given["dispatch"].slot_of_row)
        given["z"] = normal(rows, columns, seed=2, dtype=dtype)
        given["topk_weights"] = normal(tokens, k, seed=3)
    else:
        given["z"] = normal(tokens, columns, seed=2, dtype=dtype)
    if shared:
        given["shared"] = normal(tokens, columns, seed=4, dtype=dtype)
    if found.state:
        given[found.state] = None
    if found.state and state is not None:
        p, v, m = (normal(tokens, columns, seed=5 + i, dtype=state) for i in range(3))
        given[found.state] = AdamState(p, v.square(), m) if rule == "adam" else m
    for name, value in zip(found.numbers, (0.6, 0.8, 0.3)):
        given[name] = torch.tensor(value) if tensors else value
    if norm:
        bias = normal(columns, seed=9) if norm == "layer" else None
        given["norm"] = Norm(norm, normal(columns, seed=8) + 1, bias, 1e-3)  # type: ignore[arg-type]
    return mapped(given, lambda x: x.requires_grad_() if x.is_floating_point() else x)


def mapped(given: Any, change: Any) -> Any:
    """The same arguments, every tensor changed."""
    if isinstance(given, Tensor):
        return change(given)
    if isinstance(given, dict):
        return {k: mapped(v, change) for k, v in given.items()}
    if isinstance(given, tuple) and hasattr(given, "_fields"):
        return type(given)(*(mapped(v, change) for v in given))
    return given


def converted(given: Given, dtype: torch.dtype) -> Given:
    """Leaves with the same values in another dtype."""
    return mapped(
        given, lambda x: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
    )


def leaves(given: Given) -> dict[str, Tensor]:
    """By name, what has a gradient."""
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        parts = value._asdict() if isinstance(value, (AdamState, Norm)) else {"": value}
        for part, x in parts.items():
            if isinstance(x, Tensor) and x.requires_grad:
                found[f"{name}.{part}".rstrip(".")] = x
    return found


def gradients(out: list[Tensor], given: Given) -> dict[str, Tensor]:
    """Of the sum of all results, each element with a weight of its own."""
    wide = out[0].dtype if out[0].dtype == torch.float64 else torch.float32
    total = torch.zeros((), dtype=wide)
    for i, x in enumerate(out):
        if x.requires_grad:
            weights = torch.linspace(-1 - i, 1.5, x.numel(), dtype=wide).view(x.shape)
            total = total + (x.to(wide) * weights).sum()
    named = leaves(given)
    if not total.requires_grad:
        return {name: torch.zeros_like(x) for name, x in named.items()}
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(named.items(), found)
    }
