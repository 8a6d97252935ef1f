# SPDX-License-Identifier: Apache-2.0
"""``MoE`` as its users meet it: values, gradients, states, copies, dtypes, checkpoints, compile, DDP, errors."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import plain_networks
import pytest
import torch
from helpers import assert_no_worse_than_torch
from hotloop.moe import (
    Activation,
    MoE,
    load_balance_loss,
    router_z_loss,
)
from processes import printed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

D, I, E, K = 8, 6, 5, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "shared": {"shared_hidden_dim": 7, "renormalize": False},
    "shared-bias": {"shared_hidden_dim": 7, "bias": True, "activation": "gelu"},
    "sigmoid": {"scoring": "sigmoid", "routed_scale": 2.5, "bias_rate": 1e-3},
    "fastmoe": {"order": "topk_then_softmax", "activation": "relu"},
    "relu2": {"activation": "relu2"},
    "geglu": {"activation": "geglu"},
}


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> MoE:
    torch.manual_seed(0)
    made = MoE(D, I, E, K, **options).to(dtype)
    if made.routing_bias is not None:
        made.routing_bias.copy_(torch.linspace(-0.2, 0.2, E))
    return made


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D, generator=g).to(dtype)


def step(made: Any, x: Tensor, run: Any = None) -> list[Tensor]:
    """The output, and the gradients of the input and of every parameter."""
    x = x.clone().requires_grad_()
    out = (run or (lambda m, v: m(v).output))(made, x)
    above = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    leaves = [x, *made.parameters()]
    grads = torch.autograd.grad(out, leaves, above, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, grads))]


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_the_sum_over_the_chosen_experts(variant: str) -> None:
    options, x = VARIANTS[variant], tokens(13)
    ours = step(layer(**options), x)
    theirs = step(layer(**options), x, plain_networks.mixture)
    truth = step(layer(torch.float64, **options), x.double(), plain_networks.mixture)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_no_worse_than_torch(a, b, c, k=3)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3)])
def test_tokens_of_any_shape(shape: tuple[int, ...]) -> None:
    made, x = layer(shared_hidden_dim=4), tokens(*shape)
    found = made(x)
    assert found.output.shape == x.shape
    assert int(found.routing.num_tokens) == math.prod(shape)
    flat = made(x.reshape(-1, D)).output
    assert torch.equal(found.output.reshape(-1, D), flat)


def test_padding_visits_no_expert() -> None:
    made, x = layer(load_balance_weight=0.1, z_loss_weight=0.01), tokens(2, 6)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]])
    x[mask == 0] = math.nan
    found, alone = made(x, mask), made(x[mask == 1])
    assert torch.equal(found.output[mask == 1], alone.output)
    assert not found.output[mask == 0].any()
    torch.testing.assert_close(found.aux_loss, alone.aux_loss)
    assert int(found.routing.expert_counts.sum()) == 6 * K


def test_the_losses_are_those_of_the_routing() -> None:
    x = tokens(20)
    made = layer(load_balance_weight=0.1, z_loss_weight=0.01, convention="mixtral")
    found = made(x)
    load, z = load_balance_loss(found.routing, "mixtral"), router_z_loss(found.routing)
    assert torch.equal(found.load_balance, load)
    assert torch.equal(found.z, z)
    torch.testing.assert_close(found.aux_loss, 0.1 * load + 0.01 * z)
    (slope,) = torch.autograd.grad(found.aux_loss, made.router.weight)
    assert bool(slope.any())
    none = layer()(x)
    assert none.load_balance is None
    assert none.z is None
    assert float(none.aux_loss) == 0


def test_capacity_drops_the_last_tokens_or_the_lightest() -> None:
    x = tokens(30)
    for drop in ("position", "weight"):
        made = layer(capacity_factor=0.5, drop=drop)
        found = made(x)
        order = found.routing.dispatch
        assert order is not None
        most = math.ceil(0.5 * 30 * K / E)
        assert int(order.expert_counts.max()) <= most
        assert int((order.row_of_slot < 0).sum()) > 0
    everyone = layer(capacity_factor=float(E))(x).output
    assert torch.equal(everyone, layer()(x).output)


# -- states ---------------------------------------------------------------------------------------------------


def test_state_is_named_as_in_transformers() -> None:
    made = layer(shared_hidden_dim=4, bias=True, bias_rate=1e-3)
    assert list(made.state_dict()) == [
        "routing_bias",
        "router.weight",
        "experts.gate_up_proj",
        "experts.down_proj",
        "experts.gate_up_proj_bias",
        "experts.down_proj_bias",
        "shared.gate_up_proj",
        "shared.down_proj",
        "shared.gate_up_proj_bias",
        "shared.down_proj_bias",
    ]
    assert "experts.up_proj" in layer(activation="gelu").state_dict()


def test_state_and_copies_and_files() -> None:
    options = {"shared_hidden_dim": 4, "scoring": "sigmoid", "bias_rate": 1e-3}
    made, x = layer(**options), tokens(9)
    made(x)
    wanted = made.eval()(x).output
    other = MoE(D, I, E, K, **options).eval()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(x).output, wanted)
    assert torch.equal(copy.deepcopy(made)(x).output, wanted)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x).output, wanted)


def test_experts_of_transformers_can_be_loaded() -> None:
    """Two projections of Mixtral under the names of its block."""
    made = layer()
    state = {"gate.weight": torch.randn(E, D), "experts.gate_up_proj": torch.randn(E, 2 * I, D)}
    state["experts.down_proj"] = torch.randn(E, D, I)
    made.load_state_dict({k.replace("gate.weight", "router.weight"): v for k, v in state.items()})
    assert torch.equal(made.experts.down_proj, state["experts.down_proj"])


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_it_starts_from_a_trained_layer(activation: str) -> None:
    """Renormalised weights sum to 1: the mixture of copies is the layer itself, and twice that with a shared one."""
    biased = activation == "gelu"
    width = I if biased else 2 * I
    g = torch.Generator().manual_seed(2)
    parts = [torch.randn(s, generator=g) for s in ((width, D), (D, I), (width,), (D,))]
    given = parts if biased else parts[:2]
    x = tokens(7)
    h = torch.nn.functional.linear(x, parts[0], parts[2] if biased else None)
    h = torch.nn.functional.gelu(h) if biased else torch.nn.functional.silu(h[:, :I]) * h[:, I:]
    wanted = torch.nn.functional.linear(h, parts[1], parts[3] if biased else None)
    for shared, times in ((0, 1), (I, 2), (3, 1)):
        made = layer(activation=activation, bias=biased, shared_hidden_dim=shared)
        made.load_dense(*given)
        if shared == 3:  # of another size: left alone
            made.shared = None
        torch.testing.assert_close(made(x).output, times * wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_of_another_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^\[MoE\] down: expected shape \(8, 6\) of one expert, got"
    ):
        layer().load_dense(torch.zeros(2 * I, D), torch.zeros(D, 5))
    with pytest.raises(
        ValueError, match=r"^\[MoE\] gate_up_bias: expected None in a layer with bias=False"
    ):
        layer().load_dense(torch.zeros(2 * I, D), torch.zeros(D, I), torch.zeros(2 * I))
    with pytest.raises(
        ValueError, match=r"^\[MoE\] down_bias: expected a tensor in a layer with bias=True"
    ):
        layer(bias=True).load_dense(torch.zeros(2 * I, D), torch.zeros(D, I), torch.zeros(2 * I))


def test_reset_parameters_starts_anew() -> None:
    made = layer(bias_rate=1e-3, shared_hidden_dim=4)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    made.train()(tokens(9))
    made.reset_parameters()
    after = made.state_dict()
    assert all(not torch.equal(v, after[k]) for k, v in before.items())
    assert not after["routing_bias"].any()
    assert made.pending_counts is not None
    assert not made.pending_counts.any()
    assert float(made.experts.down_proj.detach().abs().max()) <= I**-0.5


def test_made_without_memory_first() -> None:
    made = MoE(D, I, E, K, bias_rate=1e-3, device="meta")
    assert made.experts.down_proj.is_meta
    made = made.to_empty(device="cpu")
    made.reset_parameters()
    assert made(tokens(3)).output.shape == (3, D)


def test_memory_that_nobody_filled_is_not_counted() -> None:
    trained, x = layer(bias_rate=0.5), tokens(7)
    made = MoE(D, I, E, K, bias_rate=0.5, device="meta").to_empty(device="cpu")
    made.load_state_dict(trained.state_dict())
    made.update_bias()
    assert torch.equal(made.routing_bias, trained.routing_bias)
    assert torch.equal(made(x).output, trained(x).output)
    made.update_bias()
    trained.update_bias()
    assert torch.equal(made.routing_bias, trained.routing_bias)


def test_counts_go_with_the_layer() -> None:
    made = layer(bias_rate=0.5)
    counts = made(tokens(7)).routing.expert_counts
    for moved in (copy.deepcopy(made), made.double(), made.to("cpu"), made.to_empty(device="cpu")):
        assert torch.equal(moved.pending_counts, counts)
    assert not any("counts" in name for name, _ in made.named_buffers())  # DDP would broadcast them


def test_it_says_what_it_is() -> None:
    text = repr(layer(scoring="sigmoid"))
    assert (
        "dim=8, hidden_dim=6, num_experts=5, top_k=2, scoring='sigmoid', activation='swiglu'"
        in text
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    made, x = layer(dtype, bias_rate=1e-3, scoring="sigmoid"), tokens(9, dtype=dtype)
    ours = step(made, x)
    truth = step(copy.deepcopy(made).double(), x.double(), plain_networks.mixture)
    theirs = step(made, x, plain_networks.mixture)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype == dtype
        assert_no_worse_than_torch(a, b, c, k=3, eps=1e-12 if dtype == torch.float64 else 8e-3)
    assert made(x).routing.topk_weights.dtype == torch.promote_types(dtype, torch.float32)


def test_the_bias_stays_float32_in_a_layer_of_bfloat16() -> None:
    made = layer(bias_rate=1e-3)
    made.routing_bias.fill_(0.1234567)
    kept = made.routing_bias.clone()
    for cast in (made.bfloat16(), made.half(), made.to(torch.float64)):
        assert cast.router.weight.dtype != torch.float32
        assert torch.equal(cast.routing_bias, kept)


def test_router_logits_are_float32_under_autocast() -> None:
    """In bfloat16 these two experts would be equal, and the lower one would be chosen."""
    x = torch.tensor([[1.0] + [0.0] * (D - 1)])
    narrow, wide = layer(router_float32=False), layer()
    for made in (narrow, wide):
        with torch.no_grad():
            made.router.weight.zero_()
            made.router.weight[:, 0] = torch.tensor([1.0, 1.0001, -1, -1, -1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wide(x).routing.topk_ids[0, 0] == 1
        assert narrow(x).routing.topk_ids[0, 0] == 0
        assert wide(x).output.dtype == x.dtype


# -- balance without a loss ----------------------------------------------------------------------------------


def test_the_bias_moves_towards_balance() -> None:
    made = layer(bias_rate=1e-2, scoring="sigmoid").train()
    made.routing_bias.zero_()
    x = tokens(64)
    counts = made(x).routing.expert_counts
    assert torch.equal(made.pending_counts, counts)
    made(x)
    assert torch.equal(made.pending_counts, 2 * counts)
    made.update_bias()
    wanted = 1e-2 * torch.sign(counts.double().mean() - counts)
    torch.testing.assert_close(made.routing_bias, wanted.float())
    assert not made.pending_counts.any()
    first = int(counts.max() - counts.min())
    for _ in range(200):
        made(x)
        made.update_bias()
    last = made(x).routing.expert_counts
    assert int(last.max() - last.min()) < first


def test_only_training_counts() -> None:
    made = layer(bias_rate=1e-3)
    made.eval()(tokens(4))
    assert not made.pending_counts.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_counts_once(reentrant: bool) -> None:
    made, x = layer(bias_rate=1e-3, load_balance_weight=0.1), tokens(16)
    plain = copy.deepcopy(made)
    found = checkpoint(made, x.clone().requires_grad_(), use_reentrant=reentrant)
    (found[0].square().sum() + found[1]).backward()  # a reentrant one makes a plain tuple of it
    wanted = plain(x)
    (wanted.output.square().sum() + wanted.aux_loss).backward()
    assert torch.equal(made.pending_counts, plain.pending_counts)
    for a, b in zip(made.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_without_a_rate_there_is_no_bias_to_update() -> None:
    with pytest.raises(
        ValueError, match=r"^\[MoE\] bias_rate: expected a rate .* Pass bias_rate=1e-3"
    ):
        layer().update_bias()


# -- graphs and processes ------------------------------------------------------------------------------------


def test_training_learns() -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(D, D), layer(activation="gelu", load_balance_weight=0.01))
    x, y = tokens(256), torch.tanh(tokens(256).flip(1))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        found = made(x)
        loss = (found.output - y).square().mean()
        optimizer.zero_grad()
        (loss + found.aux_loss).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


RANKS = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from hotloop.moe import MoE

def rank(r, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=r, world_size=2)
    torch.manual_seed(0)
    made = MoE(8, 6, 5, 2, bias_rate=1e-3, load_balance_weight=0.1)
    alone = MoE(8, 6, 5, 2, bias_rate=1e-3, load_balance_weight=0.1)
    alone.load_state_dict(made.state_dict())
    wrapped = torch.nn.parallel.DistributedDataParallel(made, find_unused_parameters=False)
    x = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(3))
    found = wrapped(x[r])
    (found.output.square().mean() + found.aux_loss).backward()
    parts = [alone(part) for part in x]
    (sum(p.output.square().mean() + p.aux_loss for p in parts) / 2).backward()
    for a, b in zip(made.parameters(), alone.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    wrapped(2 * x[r]).output.sum().backward()  # of a second batch before the update
    parts += [alone(2 * part) for part in x]
    made.update_bias()
    counts = sum(p.routing.expert_counts for p in parts)
    torch.testing.assert_close(made.routing_bias, 1e-3 * torch.sign(counts.double().mean() - counts).float())
    dist.barrier()
    if r == 0:
        print("equal", flush=True)
    # Without destructors: that of DDP's reducer waits for a thread of gloo which may wait for the interpreter's lock.
    os._exit(0)

if __name__ == "__main__":
    mp.start_processes(rank, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


def test_ranks_have_one_gradient_and_one_bias(tmp_path: Any) -> None:
    assert printed(RANKS, str(tmp_path / "store")) == "equal\n"


# -- what is refused -----------------------------------------------------------------------------------------

SIZES = {"dim": D, "hidden_dim": I, "num_experts": E, "top_k": K}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dim": 0}, "dim: expected an integer >= 1, got 0"),
        ({"hidden_dim": 0}, "hidden_dim: expected an integer >= 1, got 0"),
        ({"num_experts": 4097}, "num_experts: expected an integer >= 1 and <= 4096, got 4097"),
        ({"top_k": 6}, "top_k: expected an integer >= 1 and <= 5, got 6"),
        ({"shared_hidden_dim": -1}, "shared_hidden_dim: expected an integer >= 0, got -1"),
        ({"bias_rate": 0.0}, "bias_rate: expected a number > 0, got 0"),
        ({"load_balance_weight": -1.0}, "load_balance_weight: expected a number >= 0, got -1"),
        ({"z_loss_weight": math.nan}, "z_loss_weight: expected a number >= 0, got nan"),
        ({"convention": "own"}, "convention: expected one of switch, mixtral, fastmoe, got 'own'"),
        ({"drop": "all"}, "drop: expected one of position, weight, got 'all'"),
        ({"capacity_factor": 0.0}, "capacity_factor: expected a number > 0, got 0"),
        ({"scoring": "tanh"}, "scoring: expected one of softmax, sigmoid, got 'tanh'"),
        (
            {"order": "any"},
            "order: expected one of softmax_then_topk, topk_then_softmax, got 'any'",
        ),
        ({"n_group": 2}, "n_group: expected"),
        ({"routed_scale": 0.0}, "routed_scale: expected a number > 0, got 0"),
        ({"activation": "tanh"}, "activation"),
        ({"activation": Activation("swiglu", limit=-1.0)}, "activation"),
    ],
)
def test_settings_are_checked_when_it_is_made(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"^\[MoE\] " + text):
        MoE(**{**SIZES, **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"router_float32": 1}, "router_float32: expected True or False, got int"),
        ({"renormalize": "yes"}, "renormalize: expected True or False, got str"),
        ({"dim": 8.0}, "dim: expected an integer, got float"),
        ({"bias": 1}, "bias: expected True or False, got int"),
        ({"activation": 3}, "activation"),
    ],
)
def test_types_of_settings(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=r"^\[MoE\] " + text):
        MoE(**{**SIZES, **changes})


def test_input_is_checked() -> None:
    made = layer()
    with pytest.raises(ValueError, match=r"^\[MoE\] x: expected shape \(..., 8\), got \(3, 7\)"):
        made(torch.zeros(3, 7))
    with pytest.raises(TypeError, match=r"^\[MoE\] x: expected a torch.Tensor, got list"):
        made([1.0])
    with pytest.raises(TypeError, match=r"^\[MoE\] x: expected dtype .*, got int64"):
        made(torch.zeros(3, D, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"^\[MoE\] x: expected device cpu like the parameters, got"
    ):
        made(torch.zeros(3, D, device="meta"))
    with pytest.raises(
        ValueError, match=r"^\[MoE\] token_mask: expected shape \(2, 3\) like x, got"
    ):
        made(tokens(2, 3), torch.ones(3))
