# SPDX-License-Identifier: Apache-2.0
"""The router: 8 of E experts for 8192 tokens, with the order of expert rows, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hotloop import moe
from hotloop.reference import moe as reference
from torch import Tensor

from .. import _roofs
from .._case import Bench, Case, Contender, Cost, Inputs, Target, on_cpu
from .._options import Options
from ..contenders import ours, plain

K = 8
ALIKE = 256
"""The number of experts whose time per logit that of others is held against."""


def _inputs(seed: int, tokens: int, experts: int, dtype: str, device: str, train: bool) -> Inputs:
    """Logits of every token are the quantiles of a normal law in an order of its own: rounding decides no choice."""
    g = torch.Generator("cpu").manual_seed(seed)

    def logits(experts: int) -> Tensor:
        each = (torch.arange(experts) + 0.5) / experts
        order = torch.rand((tokens, experts), generator=g).argsort(-1)
        scale = 1 + 0.2 * torch.rand((tokens, 1), generator=g)
        x = torch.special.ndtri(each)[order] * scale
        return x.to(getattr(torch, dtype)).to(device)

    made = {"logits": logits(experts), "alike": logits(ALIKE)}
    # Of one sign: a sum over both would be near 0, and its relative error that of the terms many times over.
    made["upstream"] = (0.5 + torch.rand((tokens, K), generator=g)).to(device)
    if train:
        made["logits"].requires_grad_()
    return Inputs(made, ("logits",) if train else ())


# -- the same in torch -------------------------------------------------------------------------------------


def _choice(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    p = x.softmax(-1, dtype=torch.float32)
    weights, ids = p.topk(K, dim=-1)
    return weights / weights.sum(-1, keepdim=True), ids, p


def _torch(x: Tensor) -> tuple[Tensor, Tensor]:
    return _choice(x)[:2]


def _torch_ordered(x: Tensor) -> tuple[Tensor, ...]:
    weights, ids, _ = _choice(x)
    flat = ids.flatten()
    counts = flat.bincount(minlength=x.shape[1])
    return weights, ids, flat.argsort(stable=True), counts, counts.cumsum(0)


def _torch_loss(x: Tensor, upstream: Tensor) -> Tensor:
    """What a layer adds, in short, and both auxiliary losses."""
    weights, ids, p = _choice(x)
    experts = x.shape[1]
    share = ids.flatten().bincount(minlength=experts) / ids.numel()
    balance = experts * (share * p.mean(0)).sum()
    z = x.float().logsumexp(-1).square().mean()
    return (weights * upstream).sum() / len(x) + 0.01 * balance + 0.001 * z


def _torch_weights(x: Tensor, upstream: Tensor) -> Tensor:
    return (_choice(x)[0] * upstream).sum() / len(x)


# -- ours --------------------------------------------------------------------------------------------------


def _chosen(route: ours.Function, x: Inputs) -> Any:
    found = route(x["logits"], K, dispatch=False)
    return found.topk_weights, found.topk_ids


def _ordered(route: ours.Function, x: Inputs) -> Any:
    found = route(x["logits"], K)
    order = found.dispatch
    return (
        found.topk_weights,
        found.topk_ids,
        order.slot_of_row,
        order.expert_counts,
        order.expert_offsets[1:],
    )


def _loss(route: ours.Function, x: Inputs) -> Tensor:
    found = route(x["logits"], K, dispatch=False)
    weights = (found.topk_weights * x["upstream"]).sum() / len(x["logits"])
    total: Tensor = weights + 0.01 * moe.load_balance_loss(found)
    return total + 0.001 * moe.router_z_loss(found)


def _weights(route: ours.Function, x: Inputs) -> Tensor:
    found = route(x["logits"], K, dispatch=False)
    total: Tensor = (found.topk_weights * x["upstream"]).sum() / len(x["logits"])
    return total


# -- cases -------------------------------------------------------------------------------------------------


def _case(
    label: str,
    forward: Callable[[ours.Function, Inputs], Any],
    rivals: list[Contender],
    tokens: int,
    experts: int,
    options: Options,
    *,
    formula: str,
    train: bool = False,
    dtype: str = "float32",
    targets: tuple[Target, ...] = (),
) -> Case:
    def truth(x: Inputs) -> list[Tensor]:
        wide = x["logits"].detach().double().requires_grad_(train)
        value = forward(reference.route, Inputs(x.tensors | {"logits": wide}, x.wrt))
        if not train:
            return list(value)
        return [value, *torch.autograd.grad(value, wide)]

    item = torch.finfo(getattr(torch, dtype)).bits // 8
    cost = Cost("bytes", formula, {"t": tokens, "e": experts, "k": K, "item": item})
    device = options.device
    return Case(
        op="moe.route",
        mode="fwd+bwd" if train else "fwd",
        label=label,
        shape=(tokens, experts),
        dtype=dtype,
        device=device,
        make_inputs=lambda seed: _inputs(seed, tokens, experts, dtype, device, train),
        truth=truth,
        contenders=(
            *ours.contenders("hotloop.moe", "route", ours.loop_impls(device), forward),
            *rivals,
        ),
        cost=cost,
        roof=_roofs.copy(int(cost.amount), device),
        targets=targets,
    )


_READ, _CHOSEN = "t*e*item", "t*k*12"


def _forward(tokens: int, experts: int, options: Options, dtype: str = "float32") -> Case:
    return _case(
        "", _chosen, plain.eager_and_compiled(_torch, lambda x: x.pick("logits")),  # type: ignore[arg-type]
        tokens, experts, options, formula=f"{_READ} + {_CHOSEN}", dtype=dtype,
        targets=(Target("route.eager", "torch", 0.20), Target("route.compile", "torch.compile", 0.25)),
    )  # fmt: skip


def _with_order(tokens: int, experts: int, options: Options) -> Case:
    return _case(
        "with dispatch", _ordered, plain.eager_and_compiled(_torch_ordered, lambda x: x.pick("logits")),  # type: ignore[arg-type]
        tokens, experts, options, formula=f"{_READ} + {_CHOSEN} + t*k*16",
        targets=(Target("route.dispatch", "torch", 0.20),),
    )  # fmt: skip


def _training(tokens: int, experts: int, options: Options, losses: bool) -> Case:
    of_torch, of_ours = (_torch_loss, _loss) if losses else (_torch_weights, _weights)
    return _case(
        "with both losses" if losses else "weights",
        of_ours, plain.eager_and_compiled(of_torch, lambda x: x.pick("logits", "upstream")),
        tokens, experts, options, formula=f"3*{_READ} + 3*{_CHOSEN}", train=True,
        targets=(Target("route.backward", "torch", 0.35),),
    )  # fmt: skip


def _per_logit(tokens: int, experts: int, options: Options) -> Case:
    def alike(x: Inputs) -> None:
        moe.route(x["alike"], K, dispatch=False)

    name = f"{ALIKE} experts"
    rivals = [
        Contender("torch", "plain", lambda x: _torch(x["logits"])),
        Contender(name, "floor", alike),
    ]
    return _case(
        f"against {name}", _chosen, rivals,
        tokens, experts, options, formula=f"{_READ} + {_CHOSEN}",
        targets=(Target("route.per_logit", name, 1.25 * experts / ALIKE),),
    )  # fmt: skip


def _forwards(options: Options) -> list[Case]:
    if options.quick:
        return [_forward(64, 32, options), _per_logit(64, 60, options)]
    cases = [_forward(8192, experts, options) for experts in (128, 256)]
    cases += [_per_logit(8192, experts, options) for experts in (60, 160, 384, 1000)]
    if options.sweep:
        cases += [_forward(8192, experts, options) for experts in (8, 64, 512, 4096)]
        cases += [_forward(8192, 256, options, "bfloat16"), _forward(1, 256, options)]
    return cases


def _orders(options: Options) -> list[Case]:
    if options.quick:
        return [_with_order(64, 32, options)]
    return [_with_order(8192, experts, options) for experts in (128, 256)]


def _steps(options: Options) -> list[Case]:
    if options.quick:
        return [_training(64, 32, options, losses) for losses in (False, True)]
    sizes = (128, 256)
    return [_training(8192, e, options, losses) for losses in (False, True) for e in sizes]


BENCHES = (
    Bench("moe.route", "8 of E experts for every token", on_cpu(_forwards)),
    Bench("moe.route_with_dispatch", "and the order of expert rows", on_cpu(_orders)),
    Bench("moe.route_training", "forward and backward of the router", on_cpu(_steps)),
)
