# SPDX-License-Identifier: Apache-2.0
"""The cases of the room: row optimizers (call, state, the rule in plain torch, settings that reach every branch), and
samples for the error memory and its sketch with the op in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hotloop import table
from torch import Tensor
from torch.nn.functional import normalize

State = dict[str, Tensor]


def plain_sgd(w: Tensor, g: Tensor, s: State, *, lr: float, weight_decay: float = 0.0) -> Tensor:
    return w - lr * (g + weight_decay * w)


def decayed(w: Tensor, g: Tensor, lr: float, decay: float, mode: str) -> tuple[Tensor, Tensor]:
    return (w, g + decay * w) if mode == "l2" else (w * (1 - lr * decay), g)


def plain_rowwise_adagrad(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: float,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    weight_decay_mode: str = "l2",
) -> Tensor:
    w, g = decayed(w, g, lr, weight_decay, weight_decay_mode)
    s["state_sum"].add_(g.pow(2).mean(dim=1))
    return w - lr * g / (s["state_sum"].sqrt() + eps)[:, None]


def plain_adagrad(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    weight_decay_mode: str = "l2",
) -> Tensor:
    w, g = decayed(w, g, lr, weight_decay, weight_decay_mode)
    s["state_sum"].addcmul_(g, g)
    return w - lr * g / (s["state_sum"].sqrt() + eps)


def plain_adam(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_mode: str = "torch",
    weight_decay: float = 0.0,
    weight_decay_mode: str = "l2",
    nesterov: bool = False,
) -> Tensor:
    b1, b2 = betas
    w, g = decayed(w, g, lr, weight_decay, weight_decay_mode)
    s["step"].add_(1)
    c1, c2 = ((1 - b ** s["step"].double()).to(w.dtype)[:, None] for b in betas)
    m, v = s["exp_avg"], s["exp_avg_sq"]
    m.lerp_(g, 1 - b1)
    if v.ndim == 1:
        v.lerp_(g.pow(2).mean(dim=1), 1 - b2)
        v = v[:, None]
    else:
        v.mul_(b2).addcmul_(g, g, value=1 - b2)
    u = (1 - b1) * g + b1 * m if nesterov else m
    if eps_mode == "torch":
        return w - lr / c1 * u / (v.sqrt() / c2.sqrt() + eps)
    return w - lr * c2.sqrt() / c1 * u / (v.sqrt() + eps)


def plain_ftrl(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: float = 0.05,
    beta: float = 1.0,
    l1: float = 0.0,
    l2: float = 1.0,
    group: bool = False,
) -> Tensor:
    z, n = s["z"], s["n"]
    z.add_(g - ((n + g * g).sqrt() - n.sqrt()) / lr * w)
    n.addcmul_(g, g)
    scale = (beta + n.sqrt()) / lr + l2
    if group:
        norm = z.norm(dim=1, keepdim=True)
        return torch.where(norm <= l1, torch.zeros_like(w), -(1 - l1 / norm) * z / scale)
    return torch.where(z.abs() <= l1, torch.zeros_like(w), -(z - z.sign() * l1) / scale)


def plain_group_adagrad(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: float,
    beta: float = 0.0,
    l2: float = 0.0,
    weight_decay: float = 0.0,
) -> Tensor:
    g = g + weight_decay * w
    s["state_sum"].add_(g.pow(2).amax(dim=1))
    eta = (lr / (beta + s["state_sum"].sqrt()))[:, None]
    z = g - w / eta
    norm = z.norm(dim=1, keepdim=True)
    return torch.where(norm < l2, torch.zeros_like(w), -eta * (1 - l2 / norm) * z)


RULES = {
    "sparse_sgd_update": table.SGD,
    "rowwise_adagrad_update": table.RowwiseAdagrad,
    "sparse_adagrad_update": table.Adagrad,
    "sparse_adam_update": table.Adam,
    "ftrl_proximal_update": table.FTRL,
    "group_adagrad_update": table.GroupAdagrad,
}


@dataclass(frozen=True)
class Case:
    name: str
    op: str
    plain: Callable[..., Tensor]
    columns: tuple[str, ...]  # state arrays in the order of the call
    settings: dict[str, Any]
    scalars: tuple[str, ...] = ()
    start: float = 0.0  # of sums
    eps: float = (
        1e-6  # beside the error of plain torch: states whose differences cancel ask for more
    )

    @property
    def rule(self) -> Any:
        """The row optimizer of these settings, for a table and for whole batches."""
        sums = {"state_sum", "n"} & set(self.columns)
        first = {"initial_accumulator_value": self.start} if sums else {}
        rowwise = {"rowwise": True} if "exp_avg_sq" in self.scalars else {}
        return RULES[self.op](**self.settings, **first, **rowwise)

    def state(self, rows: int, dim: int, dtype: torch.dtype = torch.float32) -> State:
        shape = {c: (rows,) if c in self.scalars else (rows, dim) for c in self.columns}
        sums = {c: self.start if c in ("state_sum", "n") else 0.0 for c in self.columns}
        return {c: torch.full(shape[c], sums[c], dtype=dtype) for c in self.columns}

    def call(self, weight: Any, grad: Any, state: dict[str, Any], **more: Any) -> None:
        arrays = (state[c] for c in self.columns)
        assert getattr(table, self.op)(weight, grad, *arrays, **self.settings, **more) is None

    def plain_call(self, weight: Tensor, grad: Tensor, state: State) -> Tensor:
        """The new weight, rounded once to the dtype of ``weight``."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return self.plain(weight.to(wide), grad, state, **self.settings).to(weight.dtype)


_ADAM = ("exp_avg", "exp_avg_sq", "step")


def _adam(name: str, *, rowwise: bool = False, **settings: Any) -> Case:
    scalars = ("step", "exp_avg_sq") if rowwise else ("step",)
    return Case(name, "sparse_adam_update", plain_adam, _ADAM, settings, scalars)


def _sum(
    name: str, op: str, plain: Callable[..., Tensor], *, rowwise: bool, start: float = 0.0, **s: Any
) -> Case:
    return Case(name, op, plain, ("state_sum",), s, ("state_sum",) if rowwise else (), start)


def _rowwise(name: str, **s: Any) -> Case:
    return _sum(name, "rowwise_adagrad_update", plain_rowwise_adagrad, rowwise=True, **s)


def _adagrad(name: str, **s: Any) -> Case:
    return _sum(name, "sparse_adagrad_update", plain_adagrad, rowwise=False, **s)


def _group(name: str, **s: Any) -> Case:
    return _sum(name, "group_adagrad_update", plain_group_adagrad, rowwise=True, start=0.1, **s)


def _ftrl(name: str, **s: Any) -> Case:
    return Case(name, "ftrl_proximal_update", plain_ftrl, ("z", "n"), s, start=0.1)


CASES = (
    Case("sgd", "sparse_sgd_update", plain_sgd, (), {"lr": 0.1}),
    Case("sgd_decay", "sparse_sgd_update", plain_sgd, (), {"lr": 0.1, "weight_decay": 0.3}),
    _rowwise("rowwise_adagrad", lr=0.1),
    _rowwise("rowwise_adagrad_l2", lr=0.1, weight_decay=0.3, start=0.1),
    _rowwise("rowwise_adagrad_decoupled", lr=0.1, weight_decay=0.3, weight_decay_mode="decoupled"),
    _adagrad("adagrad", lr=0.1),
    _adagrad("adagrad_monolith", lr=0.1, eps=0.0, start=0.1),
    _adagrad("adagrad_l2", lr=0.1, weight_decay=0.3),
    _adagrad("adagrad_decoupled", lr=0.1, weight_decay=0.3, weight_decay_mode="decoupled"),
    _adam("adam", lr=0.1),
    _adam("adam_tensorflow", lr=0.1, betas=(0.9, 0.99), eps=0.01, eps_mode="tensorflow"),
    _adam("adam_l2", lr=0.1, weight_decay=0.3),
    _adam("adamw", lr=0.1, weight_decay=0.3, weight_decay_mode="decoupled"),
    _adam("adam_nesterov", lr=0.1, nesterov=True, weight_decay=0.3),
    _adam("adam_rowwise", lr=0.1, rowwise=True, weight_decay=0.3),
    _adam("adam_no_momentum", lr=0.1, betas=(0.0, 0.5)),
    _ftrl("ftrl", lr=0.5, beta=1.0, l1=0.5, l2=1.0),
    _ftrl("ftrl_monolith", lr=0.1, beta=0.0, l2=0.0),
    _ftrl("ftrl_group", lr=0.5, beta=0.5, l1=2.0, l2=0.1, group=True),
    _group("group_adagrad", lr=0.1),
    _group("group_adagrad_l2", lr=0.1, beta=0.1, l2=1.5, weight_decay=0.3),
)
BY_NAME = {case.name: case for case in CASES}
by_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def inputs(rows: int, dim: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Weights, and gradients of three steps whose sizes run over four powers of ten."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, dim, generator=g)
    grads = [
        torch.randn(rows, dim, generator=g) * 10 ** torch.linspace(-2, 2, max(rows, 1))[:rows, None]
        for _ in range(3)
    ]
    return weight, grads


@dataclass
class Samples:
    query: np.ndarray
    base: np.ndarray
    keys: np.ndarray
    labels: np.ndarray
    stored_base: np.ndarray

    def arguments(self, dtype: Any = np.float32) -> tuple[np.ndarray, ...]:
        """In the order of ``error_memory_compensate``, hidden vectors of this dtype."""
        return (
            self.query.astype(dtype),
            self.base,
            self.keys.astype(dtype),
            self.labels,
            self.stored_base,
        )


def samples(batch: int, slots: int, dim: int, seed: int = 0) -> Samples:
    rng = np.random.default_rng([seed, batch, slots, dim])
    return Samples(
        rng.normal(size=(batch, dim)),
        rng.random(batch).astype(np.float32),
        rng.normal(size=(slots, dim)),
        rng.integers(0, 2, slots).astype(np.float32),
        rng.random(slots).astype(np.float32),
    )


def plain_error_memory(
    query: Tensor,
    base: Tensor,
    keys: Tensor,
    labels: Tensor,
    stored_base: Tensor,
    *,
    k: int = 180,
    temperature: float = 0.1,
    gamma: float = 1.0,
    lam: float = 0.9,
) -> Tensor:
    """With the whole matrix of similarities, as one writes it in torch."""
    if keys.shape[0] == 0:
        return base.clamp(0, 1)
    similarity = normalize(query, dim=-1) @ normalize(keys, dim=-1).T
    s, at = similarity.topk(min(k, keys.shape[0]), dim=-1)
    a = (s / temperature).softmax(-1)
    label, stored = (a * labels[at]).sum(-1), (a * stored_base[at]).sum(-1)
    error = gamma * (label - base) + (1 - gamma) * (label - stored)
    return (base + lam * error).clamp(0, 1)


def tensors(arguments: tuple[np.ndarray, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(x).to(dtype) for x in arguments)
