# SPDX-License-Identifier: Apache-2.0
"""Recipes of the room: values in float64 by hand, gradients, laws, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import assert_no_worse_than_torch, strided
from hotloop.moe import MoE, anchor_reconcile_moe, pmoe_routing_loss
from hotloop.reference import moe as reference
from refusals import assert_refused, refused
from torch import Tensor

B, K = 7, 5


def policy(dtype: torch.dtype = torch.float64, b: int = B, k: int = K) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(b)
    w, q, logps = (torch.randn(b, k, generator=g, dtype=torch.float64) for _ in range(3))
    found = {"mixing_weights": w.softmax(-1), "action_values": q, "component_logps": logps - 1}
    return {name: x.to(dtype) for name, x in found.items()}


@pytest.mark.parametrize("components", ["mean", "sum"])
@pytest.mark.parametrize("backpropagate", ["max", "all"])
def test_pmoe_is_the_formula(components: Any, backpropagate: Any) -> None:
    x = {name: t.requires_grad_() for name, t in policy().items()}
    options = {"components": components, "backpropagate": backpropagate, "routing_weight": 2.0}
    found, wanted = (
        op(**x, temperature=0.3, **options)
        for op in (pmoe_routing_loss, reference.pmoe_routing_loss)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(result[0], tuple(x.values())) for result in (found, wanted))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("b", [1, 2, 257])
def test_pmoe_is_as_exact_as_float32(b: int, dtype: torch.dtype) -> None:
    x = policy(dtype, b)
    found = pmoe_routing_loss(**x)
    truth = pmoe_routing_loss(**{name: t.double() for name, t in x.items()})
    for ours, exact in zip((found.loss, found.routing), (truth.loss, truth.routing)):
        assert ours.dtype == torch.float32
        assert_no_worse_than_torch(ours, exact.float(), exact)
    views = pmoe_routing_loss(**{name: strided(t) for name, t in x.items()})
    assert torch.equal(views.loss, found.loss)


def test_pmoe_gradients() -> None:
    x = {name: t.requires_grad_() for name, t in policy(b=3, k=4).items()}

    def loss(*tensors: Tensor, **modes: Any) -> Tensor:
        return pmoe_routing_loss(*tensors, **modes).loss

    for modes in ({}, {"components": "sum"}, {"backpropagate": "all"}):
        assert torch.autograd.gradcheck(lambda *t, m=modes: loss(*t, **m), tuple(x.values()))
        assert torch.autograd.gradgradcheck(lambda *t, m=modes: loss(*t, **m), tuple(x.values()))


def test_pmoe_trains_the_winner_alone() -> None:
    x = {name: t.requires_grad_() for name, t in policy().items()}
    found = pmoe_routing_loss(**x, temperature=0.3)
    assert found.primitive is not None
    q, logps = torch.autograd.grad(
        found.primitive, (x["action_values"], x["component_logps"]), retain_graph=True
    )
    won = torch.nn.functional.one_hot(found.winners, K).bool()
    assert not q[~won].any()
    assert not logps[~won].any()
    torch.testing.assert_close(q, won.double() / -B)
    torch.testing.assert_close(logps, won.double() * (0.3 / B))
    (routing,) = torch.autograd.grad(found.routing, x["mixing_weights"])
    torch.testing.assert_close(routing, 2 * (x["mixing_weights"].detach() - won.double()) / (B * K))


def test_pmoe_of_one_component_is_the_loss_of_soft_actor_critic() -> None:
    x = policy(k=1)
    found = pmoe_routing_loss(**x, temperature=0.3)
    assert float(found.routing) == 0
    wanted = (0.3 * x["component_logps"] - x["action_values"]).mean()
    torch.testing.assert_close(found.loss, wanted)


def test_pmoe_router_learns_the_probability_of_being_best() -> None:
    """Actions whose best component is drawn with fixed probabilities: the router finds them by gradient descent."""
    g = torch.Generator().manual_seed(0)
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=1.0)
    best = torch.tensor([0.2, 0.5, 0.3])
    for step in range(1500):
        won = torch.multinomial(best, 256, replacement=True, generator=g)
        q = torch.nn.functional.one_hot(won, 3).float()
        loss = pmoe_routing_loss(logits.softmax(0).expand(256, 3), q, components="sum").loss
        optimizer.param_groups[0]["lr"] = 1.0 if step < 1000 else 0.05
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(logits.detach().softmax(0), best, atol=0.006, rtol=0)


def test_pmoe_without_log_probabilities_is_the_routing_loss() -> None:
    x = policy()
    x["action_values"].requires_grad_()
    x["mixing_weights"].requires_grad_()
    found = pmoe_routing_loss(x["mixing_weights"], x["action_values"], routing_weight=3.0)
    assert found.primitive is None
    assert found.winner_logps is None
    torch.testing.assert_close(found.loss, 3 * found.routing)
    (none,) = torch.autograd.grad(found.loss, x["action_values"], allow_unused=True)
    assert none is None


def test_pmoe_ties_go_to_the_lower_component() -> None:
    found = pmoe_routing_loss(torch.full((2, 3), 1 / 3), torch.tensor([[1.0, 1, 1], [0, 2, 2]]))
    assert found.winners.tolist() == [0, 1]


def test_pmoe_temperature_may_be_a_tensor_and_gets_no_gradient() -> None:
    x = policy()
    alpha = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    found = pmoe_routing_loss(**x, temperature=alpha)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, pmoe_routing_loss(**x, temperature=0.3).loss)


def test_pmoe_of_no_rows_is_a_mean_of_nothing() -> None:
    found = pmoe_routing_loss(**policy(b=0))
    assert math.isnan(float(found.loss))
    assert found.winners.shape == (0,)


NAN = torch.full((B, K), 1.0).index_fill(0, torch.tensor([2]), math.nan)


@refused(
    {
        r"mixing_weights: expected 2 dimension\(s\), got shape \(7,\)": torch.zeros(7),
        r"mixing_weights: expected at least one component, got shape \(7, 0\)": torch.zeros(7, 0),
        r"action_values: expected shape \(7, 5\) like mixing_weights, got \(7, 4\). Pass one per": torch.zeros(
            7, 4
        ),
        r"component_logps: expected shape \(7, 5\) like mixing_weights, got \(6, 5\)": torch.zeros(
            6, 5
        ),
        r"action_values: expected device cpu like mixing_weights, got meta": torch.zeros(
            7, 5, device="meta"
        ),
        r"action_values: expected numbers, got nan at \[2, 0\] \(5 of 35\)": NAN,
        "temperature: expected a number >= 0, got -1": -1.0,
        r"temperature: expected a tensor of one number, got shape \(2,\). Pass log_alpha": torch.ones(
            2
        ),
        "routing_weight: expected a number >= 0, got -2": -2.0,
        "components: expected one of mean, sum, got 'none'": "none",
        "backpropagate: expected one of max, all, got 'best'": "best",
    },
    {
        "mixing_weights: expected a torch.Tensor, got list": [[1.0]],
        "action_values: expected dtype .*, got int64": torch.zeros(7, 5, dtype=torch.int64),
        "component_logps: expected dtype .*, got bool": torch.zeros(7, 5, dtype=torch.bool),
        "temperature: expected a number >= 0, got str": "auto",
        "temperature: expected dtype .*, got int64": torch.tensor(1),
        "routing_weight: expected a number >= 0, got NoneType": None,
    },
)
def test_pmoe_refuses(text: str, changes: dict[str, Any], kind: type[Exception]) -> None:
    assert_refused(pmoe_routing_loss, {**policy(torch.float32), **changes}, kind, text)


def test_pmoe_looks_for_infinities_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    x = policy()
    x["mixing_weights"][1, 2] = math.inf
    assert_refused(
        pmoe_routing_loss, x, ValueError, r"mixing_weights: expected finite values, got inf"
    )


def test_pmoe_refuses_nan_when_a_compiled_graph_runs() -> None:
    torch.compiler.reset()
    compiled = torch.compile(pmoe_routing_loss, fullgraph=True, backend="aot_eager")
    x = policy(torch.float32)
    torch.testing.assert_close(compiled(**x).loss, pmoe_routing_loss(**x).loss)
    with pytest.raises(ValueError, match=r"\[pmoe_routing_loss\] action_values: expected numbers"):
        compiled(**{**x, "action_values": NAN})


# -- anchor_reconcile_moe ------------------------------------------------------------------------------------

T, D, I, S, E = 9, 6, 4, 5, 5


def anchored(dtype: torch.dtype = torch.float64, gated: bool = True) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    m = 2 if gated else 1
    shapes = {
        "x": (T, D),
        "router_weight": (E, D),
        "gate_up": (E, m * I, D),
        "down": (E, D, I),
        "anchor_gate_up": (m * S, D),
        "anchor_down": (D, S),
    }
    return {
        name: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def value_and_slopes(op: Any, x: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in x.items()}
    output, load, _ = op(**leaves, **options)
    above = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    total = (output * above).sum() + 3 * load.to(output.dtype)
    return [output.detach(), load.detach(), *torch.autograd.grad(total, tuple(leaves.values()))]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"renormalize": True},
        {"routed_scale": 2.5, "top_k": 3},
        {"activation": "gelu"},
        {"token_mask": torch.arange(T) % 3 > 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_anchor_is_the_sum_over_the_chosen_and_the_anchor(
    options: dict[str, Any], dtype: torch.dtype
) -> None:
    x = anchored(dtype, options.get("activation") != "gelu")
    ours = value_and_slopes(anchor_reconcile_moe, x, **options)
    theirs = value_and_slopes(reference.anchor_reconcile_moe, x, **options)
    wide = {name: t.double() for name, t in x.items()}
    truth = value_and_slopes(reference.anchor_reconcile_moe, wide, **options)
    eps = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3}[dtype]
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse_than_torch(a, b, c, k=3, eps=eps)


def test_anchor_with_every_expert_is_a_dense_mixture() -> None:
    x = anchored()
    found = anchor_reconcile_moe(**x, top_k=E, renormalize=True)
    shares = (x["x"] @ x["router_weight"].T).softmax(-1)

    def layer(up: Tensor, down: Tensor) -> Tensor:
        gate, value = (x["x"] @ up.T).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * value) @ down.T

    each = torch.stack([layer(*pair) for pair in zip(x["gate_up"], x["down"])], dim=1)
    wanted = (shares[..., None] * each).sum(1) + layer(x["anchor_gate_up"], x["anchor_down"])
    torch.testing.assert_close(found.output, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_anchor_computes_in_its_own_dtype_under_autocast(dtype: torch.dtype) -> None:
    x = anchored()
    with torch.autocast("cpu", dtype=dtype):
        found = anchor_reconcile_moe(**x)
    assert torch.equal(found.output, anchor_reconcile_moe(**x).output)


def test_anchor_of_a_nan_that_is_padding_has_a_router_with_a_gradient() -> None:
    x = anchored()
    mask = torch.arange(T) > 0
    x["x"] = x["x"].detach().masked_fill(~mask[:, None], torch.nan)
    weight = x["router_weight"] = x["router_weight"].detach().requires_grad_()
    out = anchor_reconcile_moe(**x, token_mask=mask).output[1:]
    (slope,) = torch.autograd.grad(out.sum(), weight)
    rest = {**x, "x": x["x"][1:]}
    (wanted,) = torch.autograd.grad(anchor_reconcile_moe(**rest).output.sum(), weight)
    torch.testing.assert_close(slope, wanted)


def test_anchor_of_copies_scales_the_layer() -> None:
    x = anchored()
    x["gate_up"] = x["anchor_gate_up"].expand(E, -1, -1)
    x["down"] = x["anchor_down"].expand(E, -1, -1)
    found = anchor_reconcile_moe(**x)
    alone = anchor_reconcile_moe(**x, token_mask=torch.zeros(T)).output
    sums = found.routing.topk_weights.sum(-1, keepdim=True)
    torch.testing.assert_close(found.output, (1 + sums) * alone)
    assert bool((sums < 1).all())


def test_anchor_balance_is_one_where_all_experts_are_alike() -> None:
    x = anchored()
    eye = {
        **x,
        "x": torch.eye(D, dtype=torch.float64)[:E],
        "router_weight": torch.zeros(E, D).double(),
    }
    eye["router_weight"][:, :E] = 9 * torch.eye(E)
    found = anchor_reconcile_moe(**eye, top_k=1)
    assert found.routing.expert_counts.tolist() == [1] * E
    torch.testing.assert_close(float(found.load_balance), 1.0)


def test_anchor_is_a_layer_with_a_shared_expert() -> None:
    x = anchored(torch.float32)
    layer = MoE(D, I, E, 2, renormalize=False, shared_hidden_dim=S, load_balance_weight=0.01)
    state = {
        "router.weight": x["router_weight"],
        "experts.gate_up_proj": x["gate_up"],
        "experts.down_proj": x["down"],
        "shared.gate_up_proj": x["anchor_gate_up"][None],
        "shared.down_proj": x["anchor_down"][None],
    }
    layer.load_state_dict(state)
    found, wanted = layer(x["x"]), anchor_reconcile_moe(**x)
    torch.testing.assert_close(found.output, wanted.output)
    torch.testing.assert_close(found.aux_loss, 0.01 * wanted.load_balance)


@refused(
    {
        r"x: expected shape \(..., 6\) like router_weight, got \(9, 4\)": torch.zeros(9, 4),
        "gate_up: expected device cpu like x, got meta": torch.zeros(E, 2 * I, D, device="meta"),
        r"anchor_gate_up: expected shape \(10, 6\) with D of x and S of anchor_down": torch.zeros(
            9, 6
        ),
        r"anchor_down: expected 2 dimension\(s\)": torch.zeros(6),
        r"anchor_down: expected shape \(6, 5\) with D of x": torch.zeros(7, 5),
        "routed_scale: expected 1 with renormalize=True, got 2.0. The published": {
            "routed_scale": 2.0,
            "renormalize": True,
        },
        r"token_mask: expected shape \(9,\) like x, got \(3,\)": torch.ones(3),
        "activation: expected one of": "tanh",
    },
    {
        "x: expected a torch.Tensor, got list": [1.0],
        "router_weight: expected dtype .*, got int64": torch.zeros(E, D, dtype=torch.int64),
        "anchor_down: expected dtype float32, got float64": torch.zeros(D, S).double(),
        "down: expected a torch.Tensor, got NoneType": None,
        "renormalize: expected True or False, got int": 1,
        "token_mask: expected a torch.Tensor, got list": [1],
    },
)
def test_anchor_refuses(text: str, changes: dict[str, Any], kind: type[Exception]) -> None:
    assert_refused(anchor_reconcile_moe, {**anchored(torch.float32), **changes}, kind, text)
