# SPDX-License-Identifier: Apache-2.0
"""Combine, momentum, residual and the next norm in one pass: the pass alone, and what momentum adds to a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hotloop import moe
from hotloop.reference import moe as reference
from torch import Tensor, nn
from torch.nn import functional

from .. import _roofs
from .._case import Bench, Case, Contender, Cost, Inputs, Target, on_cpu
from .._options import Options
from ..contenders import ours, plain

OP, LAYER = "moe.momentum_smoe_layer", "moe.MomentumMoE"
K, MU, GAMMA = 8, 0.7, 1.0
COPY, RESIDUAL = "copy", "without momentum"


@dataclass(frozen=True)
class Size:
    tokens: int
    columns: int
    experts: int = 64
    hidden: int = 0
    """Inner numbers of an expert, of a whole layer."""


# -- the pass alone ----------------------------------------------------------------------------------------


def _inputs(seed: int, size: Size, dtype: str, device: str, train: bool) -> Inputs:
    """A choice of 8 experts for every token, what the experts made of it, a stream and its momentum."""
    g = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int, like: str = "float32") -> Tensor:
        made = torch.randn(shape, generator=g).to(getattr(torch, like)).to(device)
        return made.requires_grad_(train)

    ids = torch.rand((size.tokens, size.experts), generator=g).argsort(-1)[:, :K]
    t, d = size.tokens, size.columns
    made: dict[str, Any] = {
        "x": normal(t, d, like=dtype),
        "m": normal(t, d),
        "z": normal(t * K, d, like=dtype),
        "weights": normal(t, K),
        "norm_weight": normal(d),
        "norm_bias": normal(d),
    }
    wrt = tuple(made) if train else ()
    made["dispatch"] = moe.dispatch(ids.to(device), size.experts)
    made["above"] = [normal(t, d).detach() for _ in range(3)]
    return Inputs(made, wrt)


def _results(x: Inputs, step: Any) -> tuple[Tensor, ...]:
    """x', m' and the norm; of a training step the gradients of all arguments too."""
    out = tuple(v for v in step if v is not None)
    if not x.wrt:
        return out
    above = [g.to(v.dtype) for g, v in zip(x["above"], out)]
    slopes = torch.autograd.grad(out, x.leaves(), above, allow_unused=True)
    return (*out, *(g for g in slopes if g is not None))


def _momentum(function: ours.Function, x: Inputs) -> tuple[Tensor, ...]:
    norm = moe.Norm("layer", x["norm_weight"], x["norm_bias"])
    step = function(*x.pick("x", "m", "z", "weights", "dispatch"), mu=MU, gamma=GAMMA, norm=norm)
    return _results(x, step)


def _residual(x: Inputs) -> None:
    norm = moe.Norm("layer", x["norm_weight"], x["norm_bias"])
    _results(x, moe.residual_smoe_layer(*x.pick("x", "z", "weights", "dispatch"), norm=norm))


def _behind(x: Tensor, m: Tensor, mixed: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    m = MU * m + GAMMA * mixed
    x = (x - m).to(x.dtype)
    return x, m, functional.layer_norm(x.float(), x.shape[1:], weight, bias).to(x.dtype)


def _torch(
    x: Tensor, m: Tensor, z: Tensor, weights: Tensor, order: Tensor, *norm: Tensor
) -> tuple[Tensor, ...]:
    rows = z[order].view(x.shape[0], K, x.shape[1])
    return _behind(x, m, (weights.unsqueeze(-1) * rows).sum(1), *norm)


def _torch_product(
    x: Tensor, m: Tensor, z: Tensor, weights: Tensor, order: Tensor, *norm: Tensor
) -> tuple[Tensor, ...]:
    """The sum over the experts as a batched product."""
    rows = z[order].view(x.shape[0], K, x.shape[1])
    mixed = torch.bmm(weights.to(z.dtype).unsqueeze(1), rows).squeeze(1)
    return _behind(x, m, mixed.float(), *norm)


def _arguments(x: Inputs) -> tuple[Any, ...]:
    order = x["dispatch"].row_of_slot
    return (*x.pick("x", "m", "z", "weights"), order, *x.pick("norm_weight", "norm_bias"))


def _with_results(contender: Contender) -> Contender:
    """The contender whose forward takes the gradients too."""
    run = contender.forward
    return Contender(
        contender.name,
        contender.role,
        lambda x: _results(x, run(x)),
        contender.k,
        contender.why,
        contender.compiles,
    )


def _truth(x: Inputs) -> list[Tensor]:
    wide = {
        k: v.detach().double().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v
        for k, v in x.tensors.items()
    }
    return list(_momentum(reference.momentum_smoe_layer, Inputs(wide, x.wrt)))


def _copied(nbytes: int, device: str) -> Contender:
    made: list[Callable[[], object]] = []

    def run(x: Inputs) -> None:
        if not made:
            made.append(_roofs.copy(nbytes, device)())
        made[0]()

    return Contender(COPY, "floor", run)


def _case(size: Size, dtype: str, options: Options, train: bool) -> Case:
    device = options.device
    # Forward: rows of the experts, the stream and the momentum in; the stream, the momentum and the norm out. Backward:
    # rows of the experts again and their gradients; what was normed, three gradients in and two out.
    formula = "(k+3)*t*d*item + 2*t*d*4 + 20*t*k"
    if train:
        formula += " + (2*k+4)*t*d*item + 2*t*d*4 + 24*t*k"
    item = torch.finfo(getattr(torch, dtype)).bits // 8
    cost = Cost("bytes", formula, {"t": size.tokens, "d": size.columns, "k": K, "item": item})
    product = Contender(
        "torch bmm", "rival", lambda x: _torch_product(*_arguments(x)),
        k=2.0 if dtype == "float32" else 20.0,
        why="" if dtype == "float32" else "it rounds weights and mixture to 16 bits",
    )  # fmt: skip
    rivals = [_with_results(c) for c in (*plain.eager_and_compiled(_torch, _arguments), product)]
    floors = [Contender(RESIDUAL, "floor", _residual), _copied(int(cost.amount), device)]
    targets = (Target("depth.eager", "torch", 0.35), Target("depth.compile", "torch.compile", 0.60))
    if not train:
        targets += (Target("depth.copy", COPY, 1.3), Target("depth.momentum", RESIDUAL, 1.03))
    return Case(
        op=OP,
        mode="step" if train else "fwd",
        label="forward and backward" if train else "",
        shape=(size.tokens, size.columns),
        dtype=dtype,
        device=device,
        make_inputs=lambda seed: _inputs(seed, size, dtype, device, train),
        truth=_truth,
        contenders=(
            *ours.contenders("hotloop.moe", OP.partition(".")[2], ours.loop_impls(device), _momentum),  # type: ignore[arg-type]
            *rivals,
            *floors,
        ),
        cost=cost,
        targets=targets,
        sets=2,
    )  # fmt: skip


def _cases(options: Options) -> list[Case]:
    dtypes = ("float32", "bfloat16")
    sizes = [Size(64, 48) if options.quick else Size(4096, 1024)]
    if options.sweep and not options.quick:
        sizes += [Size(512, 512), Size(16384, 1024)]
    return [
        _case(size, dtype, options, train)
        for size in sizes
        for dtype in dtypes
        for train in (False, True)
    ]


# -- a whole layer -----------------------------------------------------------------------------------------


class _Plain(nn.Module):
    """The layer with a plain residual, the rest alike: x' = x + SMoE(norm(x)), and the norm of x'."""

    def __init__(self, layer: moe.MomentumMoE) -> None:
        super().__init__()
        self.mixture, self.norm = layer.mixture, layer.norm

    def forward(self, x: Tensor, normed: Tensor, norm: Any) -> Any:
        rows, routing, shared = self.mixture.expert_rows(normed)
        after = moe.Norm("layer", norm.weight, norm.bias, norm.eps)
        return moe.residual_smoe_layer(
            x, rows, routing.topk_weights, routing.dispatch, shared=shared, norm=after, impl=self.mixture.impl
        )  # fmt: skip


def _layer_inputs(seed: int, size: Size, device: str, train: bool) -> Inputs:
    torch.manual_seed(seed)
    d = size.columns
    layer = moe.MomentumMoE(moe.MoE(d, size.hidden, size.experts, K), nn.LayerNorm(d)).to(device)
    x, normed, m, *above = (torch.randn(size.tokens, d, device=device) for _ in range(5))
    made = {name: v.requires_grad_(train) for name, v in (("x", x), ("normed", normed), ("m", m))}
    following = nn.LayerNorm(d).to(device)
    for parameter in (*layer.parameters(), *following.parameters()):
        parameter.requires_grad_(train)
    modules = {"layer": layer, "plain": _Plain(layer), "following": following}
    return Inputs({**made, **modules, "above": above}, ())


def _taken(x: Inputs, *out: Tensor) -> tuple[Tensor, ...]:
    """The stream and its norm; in training also the gradients of all that both layers have."""
    if not out[0].requires_grad:
        return out
    given = [*x.pick("x", "normed"), *x["layer"].mixture.parameters()]
    return (*out, *torch.autograd.grad(out, given, x["above"]))


def _through(x: Inputs, impl: str) -> tuple[Tensor, ...]:
    x["layer"].mixture.impl = impl
    stream = moe.ResidualStream(x["x"], x["normed"], x["m"])
    found = x["layer"](stream, x["following"])
    return _taken(x, found.x, found.normed)


def _without(x: Inputs) -> None:
    x["layer"].mixture.impl = "auto"
    found = x["plain"](x["x"], x["normed"], x["following"])
    _taken(x, found.x, found.normed)


def _layer_truth(x: Inputs) -> list[Tensor]:
    given = {name: x[name] for name in ("x", "normed", "m")}
    wide = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in given.items()}
    modules = {name: copy.deepcopy(x[name]).double() for name in ("layer", "following")}
    above = [g.double() for g in x["above"]]
    return list(_through(Inputs({**wide, **modules, "above": above}, ()), "reference"))


def _layer_case(size: Size, options: Options, train: bool) -> Case:
    products = 3 if train else 1
    dims = {"t": size.tokens, "k": K, "d": size.columns, "i": size.hidden, "products": products}
    return Case(
        op=LAYER,
        mode="step" if train else "fwd",
        label="forward and backward" if train else "",
        shape=(size.tokens, size.columns, size.hidden, size.experts),
        device=options.device,
        make_inputs=lambda seed: _layer_inputs(seed, size, options.device, train),
        truth=_layer_truth,
        contenders=(
            Contender("hotloop", "ours", lambda x: _through(x, "auto")),
            Contender("hotloop reference", "plain", lambda x: _through(x, "reference")),
            Contender(RESIDUAL, "floor", _without),
        ),
        cost=Cost("flops", "products*2*3*t*k*d*i", dims),
        targets=(Target("depth.layer", RESIDUAL, 1.03),),
        sets=1,
    )


def _layer_cases(options: Options) -> list[Case]:
    if options.quick:
        return [_layer_case(Size(32, 48, 8, 24), options, train) for train in (False, True)]
    sizes = [Size(1024, 512, 64, 256)]
    if options.sweep:
        sizes.append(Size(4096, 1024, 64, 512))
    return [_layer_case(size, options, train) for size in sizes for train in (False, True)]


BENCHES = (
    Bench(OP, "combine, momentum, residual and the next norm in one pass", on_cpu(_cases)),
    Bench(LAYER, "a whole layer, with and without momentum", on_cpu(_layer_cases)),
)
