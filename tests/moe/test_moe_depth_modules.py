# SPDX-License-Identifier: Apache-2.0
"""Layers of a residual stream with a state across depth: networks against plain torch, laws, copies, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import plain_networks
import pytest
import torch
from helpers import assert_no_worse_than_torch
from hotloop.moe import (
    AdamMoE,
    AdamState,
    MoE,
    MomentumMoE,
    Norm,
    ResidualStream,
    RobustMomentumMoE,
    residual_smoe_layer,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, I, E, K, L = 8, 6, 5, 2, 4
ROBUST = {"L": 2.0, "k": 4.0, "lam": 0.5}
ADAM = {"gamma1": 0.5, "mu": 0.6, "gamma2": 0.8, "kappa": 0.25}


def mixture(top_k: int = K, **options: Any) -> MoE:
    return MoE(D, I, E, top_k, activation="gelu", bias=True, **options)


def network(
    kind: Any,
    norm: Any = nn.LayerNorm,
    dtype: torch.dtype = torch.float32,
    top_k: int = K,
    **options: Any,
) -> list[Any]:
    """Layers of one kind, each with a norm whose numbers are not all equal."""
    torch.manual_seed(0)
    layers = []
    for _ in range(L):
        own = None if norm is None else norm(D)
        if own is not None:
            for parameter in own.parameters():
                nn.init.normal_(parameter, 1.0, 0.2)
        layers.append(kind(mixture(top_k, shared_hidden_dim=3), own, **options).to(dtype))
    return layers


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D, generator=g).to(dtype)


def through(layers: list[Any], x: Tensor) -> Tensor:
    """The stream behind all layers; every layer computes the norm of the next one."""
    norms = [None if layer.post_norm else layer.norm for layer in [*layers[1:], layers[0]]]
    norms[-1] = None
    stream = ResidualStream.start(x)
    for layer, norm in zip(layers, norms):
        stream = layer(stream, norm)
    return stream.x


def alone(layers: list[Any], x: Tensor) -> Tensor:
    """The same, every layer computing its own norm."""
    stream = ResidualStream.start(x)
    for layer in layers:
        stream = layer(stream)
    return stream.x


class Plain:
    """Our parameters in a network of plain torch: a layer of ours seen as its mixture and its norm."""

    def __init__(self, layer: Any) -> None:
        self.norm = layer.norm
        self.mixture = layer.mixture

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mixture, name)


def step(layers: list[Any], run: Callable[[list[Any], Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The last stream, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = run(layers, x)
    above = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    leaves = [x, *nn.ModuleList(layers).parameters()]
    out.backward(above)
    return [out.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in leaves)]


def plain(run: Any, *args: Any, **kwargs: Any) -> Callable[[list[Any], Tensor], Tensor]:
    return lambda layers, x: run([Plain(layer) for layer in layers], x, *args, **kwargs)


NETWORKS: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "momentum": (MomentumMoE, {}, plain(plain_networks.momentum, 0.7, 1.0)),
    "momentum-rms": (MomentumMoE, {"norm": nn.RMSNorm}, plain(plain_networks.momentum, 0.7, 1.0)),
    "momentum-none": (MomentumMoE, {"norm": None, "mu": 0.3, "gamma": -0.5}, plain(plain_networks.momentum, 0.3, -0.5)),
    "momentum-post": (MomentumMoE, {"post_norm": True}, plain(plain_networks.momentum, 0.7, 1.0, True)),
    "adam": (AdamMoE, ADAM, plain(plain_networks.adam, beta1=0.9, beta2=0.999, **ADAM)),
    "robust": (RobustMomentumMoE, ROBUST, plain(plain_networks.robust, **ROBUST)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_that_of_plain_torch(name: str) -> None:
    kind, options, theirs = NETWORKS[name]
    x = tokens(11)
    ours = step(network(kind, **options), through, x)
    other = step(network(kind, **options), theirs, x)
    truth = step(network(kind, dtype=torch.float64, **options), theirs, x.double())
    for a, b, c in zip(ours, other, truth, strict=True):
        assert_no_worse_than_torch(a, b, c, k=3, eps=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_of_the_next_layer_and_of_its_own_are_the_same(name: str) -> None:
    kind, options, _ = NETWORKS[name]
    layers, x = network(kind, **options), tokens(2, 3)
    torch.testing.assert_close(through(layers, x), alone(layers, x))


def test_without_momentum_it_is_the_residual_network_to_the_last_bit() -> None:
    layers, x = network(MomentumMoE, mu=0.0, gamma=-1.0), tokens(9)
    wanted = x
    for layer in layers:
        read = layer._read(ResidualStream(wanted))
        rows, routing, shared = layer.mixture.expert_rows(read)
        wanted = residual_smoe_layer(
            wanted, rows, routing.topk_weights, routing.dispatch, shared=shared
        ).x
    assert torch.equal(alone(layers, x), wanted)
    other = x
    for layer in layers:
        other = other + layer.mixture(layer.norm(other)).output
    torch.testing.assert_close(wanted, other)


def test_adam_behind_the_first_layer_is_momentum() -> None:
    adam, momentum = AdamMoE(mixture(), is_first=False), MomentumMoE(mixture())
    momentum.load_state_dict(adam.state_dict())
    x, m = tokens(5), tokens(5).flip(0)
    a = adam(ResidualStream(x, state=AdamState(None, None, m)))
    b = momentum(ResidualStream(x, state=m))
    assert torch.equal(a.x, b.x)
    assert isinstance(a.state, AdamState)
    assert torch.equal(a.state.m, b.state)


def test_the_state_goes_along_depth_and_attention_leaves_it() -> None:
    """A decoder as one writes it: attention adds, experts step, every norm is computed in the pass before."""
    layers = network(MomentumMoE)
    attend, norms = [nn.Linear(D, D) for _ in layers], [nn.LayerNorm(D) for _ in layers]
    last, x = nn.LayerNorm(D), tokens(2, 7)
    stream = ResidualStream.start(x, norms[0])
    for layer, linear, norm in zip(layers, attend, [*norms[1:], last]):
        stream = stream.add(linear(stream.normed), layer.norm)
        stream = layer(stream, norm)
    want, m = x, torch.zeros_like(x)
    for layer, linear, norm in zip(layers, attend, norms):
        want = want + linear(norm(want))
        m = 0.7 * m + layer.mixture(layer.norm(want)).output
        want = want - m
    torch.testing.assert_close(stream.x, want)
    torch.testing.assert_close(stream.normed, last(want))
    torch.testing.assert_close(stream.state, m)
    assert len(stream.routings) == L


def test_losses_add_up_along_the_stream() -> None:
    layers = [MomentumMoE(mixture(load_balance_weight=0.1)) for _ in range(3)]
    stream, total = ResidualStream.start(tokens(6)), 0.0
    for layer in layers:
        total += float(layer.mixture(layer._read(stream)).aux_loss.detach())
        stream = layer(stream)
    assert stream.aux_loss is not None
    torch.testing.assert_close(float(stream.aux_loss.detach()), total)


def test_learnable_momentum() -> None:
    made = MomentumMoE(mixture(), mu=0.6, gamma=0.9, learnable=True)
    assert {"mu", "gamma"} <= made.state_dict().keys()
    stream = made(ResidualStream(tokens(5), state=tokens(5).flip(0)))
    mu, gamma = torch.autograd.grad(stream.x.square().sum(), (made.mu, made.gamma))
    assert float(mu) != 0
    assert float(gamma) != 0
    fixed = MomentumMoE(made.mixture, mu=0.6, gamma=0.9)
    assert torch.equal(fixed(ResidualStream(tokens(5), state=tokens(5).flip(0))).x, stream.x)
    assert list(fixed.state_dict()) == list(fixed.mixture.state_dict(prefix="mixture."))


@pytest.mark.parametrize("kind", ["momentum", "adam", "robust"])
def test_dropout_drops_in_training_only(kind: str) -> None:
    make, options, _ = NETWORKS[kind]
    layers = network(make, dropout=0.5, **options)
    x = tokens(40)
    trained = layers[0](ResidualStream.start(x)).x
    layers[0].eval()
    used = layers[0](ResidualStream.start(x)).x
    assert not torch.allclose(trained, used)
    free = copy.deepcopy(layers[0])
    free.dropout = 0.0
    assert torch.equal(free.train()(ResidualStream.start(x)).x, used)


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_and_states(name: str) -> None:
    kind, options, _ = NETWORKS[name]
    layers, x = network(kind, **options), tokens(6)
    again = copy.deepcopy(layers)
    assert torch.equal(through(layers, x), through(again, x))
    torch.manual_seed(7)
    rest = {key: value for key, value in options.items() if key != "norm"}
    other = nn.ModuleList(
        kind(mixture(shared_hidden_dim=3), copy.deepcopy(layer.norm), **rest) for layer in layers
    )
    other.load_state_dict(nn.ModuleList(layers).state_dict())
    assert torch.equal(through(list(other), x), through(layers, x))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(name: str, reentrant: bool) -> None:
    kind, options, _ = NETWORKS[name]
    x = tokens(2, 5)

    def pieces(layers: list[Any], x: Tensor) -> Tensor:
        return checkpoint(lambda v: through(layers, v), x, use_reentrant=reentrant)

    for a, b in zip(step(network(kind, **options), through, x), step(network(kind, **options), pieces, x)):  # fmt: skip
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16(name: str) -> None:
    """Every token visits every expert: rounding would choose other ones."""
    kind, options, theirs = NETWORKS[name]
    x = tokens(9).bfloat16()
    layers = network(kind, dtype=torch.bfloat16, top_k=E, **options)
    stream = ResidualStream.start(x)
    for layer in layers:
        stream = layer(stream)
    assert stream.x.dtype == torch.bfloat16
    states = stream.state if isinstance(stream.state, AdamState) else (stream.state,)
    assert all(s is None or s.dtype == torch.float32 for s in states)
    exact = copy.deepcopy(nn.ModuleList(layers)).double()
    truth = theirs(list(exact), x.double())
    other = theirs(layers, x)
    assert_no_worse_than_torch(stream.x, other, truth, k=3, eps=2e-2)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_implementation_of_the_mixture_is_that_of_the_layer(name: str) -> None:
    """So that impl="reference" differentiates twice, and inside a transform."""
    kind, options, _ = NETWORKS[name]
    layers = network(kind, dtype=torch.float64, **options)
    x = tokens(4, dtype=torch.float64).requires_grad_()
    expected = alone(layers, x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    for layer in layers:
        layer.mixture.impl = "reference"
    torch.testing.assert_close(alone(layers, x), expected)
    (once,) = torch.autograd.grad(alone(layers, x).sum(), x, create_graph=True)
    torch.testing.assert_close(once, slope)
    (twice,) = torch.autograd.grad(once.square().sum(), x)
    assert bool(twice.isfinite().all())
    torch.testing.assert_close(torch.func.grad(lambda v: alone(layers, v).sum())(x), slope)


def test_padding_keeps_its_stream() -> None:
    layer, x = MomentumMoE(mixture(), nn.LayerNorm(D)), tokens(2, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    found = layer(ResidualStream.start(x), None, mask)
    assert torch.equal(found.x[mask == 0], x[mask == 0])
    torch.testing.assert_close(found.x[mask == 1], layer(ResidualStream.start(x[mask == 1])).x)


def test_training_learns() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList(
        MomentumMoE(mixture(load_balance_weight=0.01), nn.LayerNorm(D)) for _ in range(3)
    )
    head = nn.Linear(D, D)
    x, y = tokens(256), torch.tanh(tokens(256).flip(1))
    optimizer = torch.optim.AdamW([*layers.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        stream = ResidualStream.start(x)
        for layer in layers:
            stream = layer(stream)
        assert stream.aux_loss is not None
        loss = (head(stream.x) - y).square().mean()
        optimizer.zero_grad()
        (loss + stream.aux_loss).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("norm", "theirs"),
    [
        (nn.LayerNorm(D), nn.LayerNorm(D)),
        (nn.LayerNorm(D, elementwise_affine=False), nn.LayerNorm(D)),
        (nn.LayerNorm(D, bias=False, eps=1e-2), nn.LayerNorm(D, eps=1e-2)),
        (nn.RMSNorm(D), nn.RMSNorm(D)),
        (nn.RMSNorm(D, eps=0.1, elementwise_affine=False), nn.RMSNorm(D, eps=0.1)),
        (Norm("rms", torch.ones(D), None, 0.1), nn.RMSNorm(D, eps=0.1)),
    ],
)
def test_norms_of_torch(norm: Any, theirs: Any) -> None:
    x = tokens(3, 2)
    torch.testing.assert_close(ResidualStream.start(x, norm).normed, theirs(x))
    torch.testing.assert_close(ResidualStream.start(x).add(x, norm).normed, theirs(2 * x))


def test_they_say_what_they_are() -> None:
    kinds = ((MomentumMoE, {"learnable": True}), (AdamMoE, {}), (RobustMomentumMoE, ROBUST))
    shown = [repr(kind(mixture(), nn.LayerNorm(D), **options)) for kind, options in kinds]
    assert "mu=0.699" in shown[0] or "mu=0.7" in shown[0]
    assert "is_first=None, betas=(0.9, 0.999)" in shown[1]
    assert "L=2.0, k=4.0, lam=0.5" in shown[2]


STREAM = ResidualStream(torch.zeros(3, D))
WIDE, NARROW = nn.LayerNorm(D), nn.LayerNorm(3)
ADAMS = AdamState(None, None, None)
MADE: dict[str, tuple[type[Exception], Any, tuple[Any, ...], dict[str, Any]]] = {
    r"mixture: expected MoE, got LayerNorm. Pass MoE\(": (TypeError, MomentumMoE, (NARROW,), {}),
    "norm: expected LayerNorm or RMSNorm or None, got": (TypeError, MomentumMoE, (nn.ReLU(),), {}),
    r"norm: expected normalized_shape \(8,\) like mixture.dim, got \(3,\)": (ValueError, MomentumMoE, (NARROW,), {}),
    "norm: expected a norm beside post_norm=True, got None. Pass nn.LayerNorm": (
        ValueError, MomentumMoE, (), {"post_norm": True}
    ),
    "post_norm: expected True or False, got int": (TypeError, MomentumMoE, (), {"post_norm": 1}),
    "dropout: expected a number >= 0 and < 1, got 1": (ValueError, MomentumMoE, (), {"dropout": 1.0}),
    "mu: expected a number, got nan": (ValueError, MomentumMoE, (), {"mu": math.nan}),
    "gamma: expected a number, got str": (TypeError, MomentumMoE, (), {"gamma": "1"}),
    "learnable: expected True or False, got int": (TypeError, MomentumMoE, (), {"learnable": 1}),
    "betas: expected two numbers, got 1": (ValueError, AdamMoE, (), {"betas": (0.9,)}),
    "betas: expected tuple, got float": (TypeError, AdamMoE, (), {"betas": 0.9}),
    "betas: expected a number >= 0 and < 1, got 1": (ValueError, AdamMoE, (), {"betas": (0.9, 1.0)}),
    "gamma1: expected a number > 0, got 0": (ValueError, AdamMoE, (), {"gamma1": 0.0}),
    "kappa: expected a number, got str": (TypeError, AdamMoE, (), {"kappa": "1"}),
    "is_first: expected True or False, got int": (TypeError, AdamMoE, (), {"is_first": 1}),
    "L: expected": (ValueError, RobustMomentumMoE, (), {**ROBUST, "L": 0.0}),
    "k: expected": (ValueError, RobustMomentumMoE, (), {**ROBUST, "k": 1.0}),
    "lam: expected": (ValueError, RobustMomentumMoE, (), {**ROBUST, "lam": 2.0}),
}  # fmt: skip


@pytest.mark.parametrize("text", MADE)
def test_settings_are_checked_when_a_layer_is_made(text: str) -> None:
    error, kind, args, options = MADE[text]
    given = args[0] if text.startswith("mixture") else mixture()
    rest = () if text.startswith("mixture") else args
    with pytest.raises(error, match=rf"^\[\w+\] {text}"):
        kind(given, *rest, **options)


CALLED: dict[str, tuple[type[Exception], Any]] = {
    r"MomentumMoE\] stream: expected a ResidualStream, got Tensor. Pass ResidualStream.start": (
        TypeError, lambda: MomentumMoE(mixture())(torch.zeros(3, D)),
    ),
    r"MomentumMoE\] stream.x: expected a torch.Tensor, got list": (
        TypeError, lambda: MomentumMoE(mixture())(ResidualStream([1.0])),
    ),
    r"MoE\] x: expected shape \(..., 8\), got \(3, 5\)": (
        ValueError, lambda: MomentumMoE(mixture())(ResidualStream(torch.zeros(3, 5))),
    ),
    r"MomentumMoE\] stream.state: expected Tensor or None, got AdamState": (
        TypeError, lambda: MomentumMoE(mixture())(STREAM._replace(state=ADAMS)),
    ),
    r"AdamMoE\] stream.state: expected AdamState or None, got Tensor": (
        TypeError, lambda: AdamMoE(mixture())(STREAM._replace(state=STREAM.x)),
    ),
    r"MomentumMoE\] norm: expected None with post_norm=True": (
        ValueError, lambda: MomentumMoE(mixture(), WIDE, post_norm=True)(STREAM, WIDE),
    ),
    r"MomentumMoE\] norm: expected an nn.LayerNorm, an nn.RMSNorm or a Norm, got ReLU": (
        TypeError, lambda: MomentumMoE(mixture())(STREAM, nn.ReLU()),
    ),
    r"MomentumMoE\] norm: expected normalized_shape \(8,\) like the stream, got \(3,\)": (
        ValueError, lambda: MomentumMoE(mixture())(STREAM, NARROW),
    ),
    r"MomentumMoE\] stream.state: expected shape \(3, 8\) like stream.x, got \(1, 3, 8\)": (
        ValueError, lambda: MomentumMoE(mixture())(STREAM._replace(state=STREAM.x[None])),
    ),
    r"MomentumMoE\] stream.normed: expected shape \(3, 8\) like stream.x, got \(2, 8\)": (
        ValueError, lambda: MomentumMoE(mixture())(STREAM._replace(normed=STREAM.x[:2])),
    ),
    r"AdamMoE\] stream.state: expected shape \(3, 8\) like stream.x, got \(3, 1, 8\)": (
        ValueError, lambda: AdamMoE(mixture())(STREAM._replace(state=ADAMS._replace(v=STREAM.x[:, None]))),
    ),
    r"ResidualStream\] x: expected a torch.Tensor, got list": (
        TypeError, lambda: ResidualStream.start([1.0]),
    ),
    r"ResidualStream\] update: expected shape \(3, 8\) like the stream, got \(2, 8\)": (
        ValueError, lambda: STREAM.add(torch.zeros(2, D)),
    ),
    r"ResidualStream\] update: expected a torch.Tensor, got NoneType": (
        TypeError, lambda: STREAM.add(None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", CALLED)
def test_what_a_layer_reads_is_checked(text: str) -> None:
    error, call = CALLED[text]
    with pytest.raises(error, match=rf"^\[{text}"):
        call()
