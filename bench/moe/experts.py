# SPDX-License-Identifier: Apache-2.0
"""The experts of a layer: a training step of 1024 tokens over 64 experts, and decoding of one and of eight tokens."""

from __future__ import annotations

import torch
from hotloop import moe
from hotloop.reference import moe as reference
from torch import Tensor

from .. import _roofs
from .._case import Bench, Case, Contender, Cost, Inputs, Target
from .._options import Options
from ..contenders import experts as rivals
from ..contenders import ours

OP = "moe.expert_mlp"
Size = tuple[int, int, int, int, int]
"""Tokens, hidden, inner, experts, choices."""
LAYER: Size = (1024, 512, 256, 64, 8)


def _inputs(seed: int, size: Size, dtype: str, device: str, train: bool) -> Inputs:
    tokens, hidden, inner, experts, k = size
    g = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=g) * scale
        return drawn.to(device, getattr(torch, dtype)).requires_grad_(train)

    scores = torch.rand((tokens, experts), generator=g)
    weights = torch.rand((tokens, k), generator=g)
    weights = (weights / weights.sum(1, keepdim=True)).to(device, getattr(torch, dtype))
    made = {
        "x": normal(tokens, hidden),
        "gate_up": normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
        "down": normal(experts, hidden, inner, scale=inner**-0.5),
        "topk_weights": weights.requires_grad_(train),
        "ids": scores.topk(k, dim=1).indices.to(device),
    }
    upstream = normal(tokens, hidden).detach()
    return Inputs(made, ("x", "gate_up", "down", "topk_weights") if train else (), upstream)


def _forward(function: ours.Function, x: Inputs) -> Tensor:
    """With the order of rows, which the others find in their step too."""
    order = moe.dispatch(x["ids"], x["down"].shape[0])
    found: Tensor = function(*x.pick("x", "gate_up", "down", "topk_weights"), order)
    return found


def _case(
    size: Size, dtype: str, options: Options, *, train: bool, targets: tuple[Target, ...] = ()
) -> Case:
    tokens, hidden, inner, experts, k = size

    def truth(x: Inputs) -> list[Tensor]:
        made = dict(x.tensors)
        for name in ("x", "gate_up", "down", "topk_weights"):
            made[name] = x[name].detach().double().requires_grad_(train)
        wide = Inputs(made, x.wrt)
        value = _forward(reference.expert_mlp, wide)
        if not train:
            return [value]
        assert x.upstream is not None
        return [value, *torch.autograd.grad(value, wide.leaves(), x.upstream.double())]

    # A product of 3 * inner columns per row, three times in training; decoding reads the weights of some experts.
    busy = min(experts, tokens * k)
    item = torch.finfo(getattr(torch, dtype)).bits // 8
    dims = {"r": tokens * k, "d": hidden, "i": inner}
    if train:
        cost = Cost("flops", "3*2*r*d*3*i", dims)
        roof = _roofs.product(tokens * k, hidden, 3 * inner, dtype, options.device)
        roof_amount = cost.amount / 3
    else:
        cost = Cost("bytes", "e*d*3*i*item", {"e": busy, "d": hidden, "i": inner, "item": item})
        roof, roof_amount = _roofs.read(int(cost.amount), options.device), cost.amount
    return Case(
        op=OP,
        mode="fwd+bwd" if train else "fwd",
        label="training step" if train else "decoding",
        shape=size,
        dtype=dtype,
        device=options.device,
        make_inputs=lambda seed: _inputs(seed, size, dtype, options.device, train),
        truth=truth,
        contenders=(
            *ours.contenders(
                "hotloop.moe", "expert_mlp", ours.head_impls(options.device), _forward
            ),
            Contender("torch loop", "plain", lambda x: _forward(reference.expert_mlp, x)),
            *(rivals.transformers(name) for name in rivals.IMPLEMENTATIONS),
            rivals.bare_products(train),
        ),
        cost=cost,
        roof=roof,
        roof_amount=roof_amount,
        targets=targets,
        sets=2 if train else 3,
    )


def _ahead(case: str, eager: float, others: float) -> tuple[Target, ...]:
    limits = {"eager": eager, "grouped_mm": others, "batched_mm": others}
    return tuple(
        Target(f"{case}-{name}", f"transformers {name}", limit) for name, limit in limits.items()
    )


def cases(options: Options) -> list[Case]:
    if options.quick:
        small: Size = (48, 64, 32, 8, 2)
        return [_case(small, dtype, options, train=True) for dtype in ("float32", "bfloat16")] + [
            _case((1, *small[1:]), "float32", options, train=False)
        ]
    found = [
        _case(LAYER, "float32", options, train=True, targets=_ahead("layer", 0.5, 1.0)),
        _case(LAYER, "bfloat16", options, train=True),
    ]
    for dtype in ("float32", "bfloat16"):
        for tokens in (1, 8):
            size = (tokens, *LAYER[1:])
            targets = _ahead(f"decode-{tokens}", 1.0, 1.0) if dtype == "float32" else ()
            found.append(_case(size, dtype, options, train=False, targets=targets))
    return found


BENCHES = (Bench(OP, "the experts of a layer: training step, and decoding", cases),)
