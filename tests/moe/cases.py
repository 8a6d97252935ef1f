# SPDX-License-Identifier: Apache-2.0
"""Valid calls of the ops of this room."""

import torch
from catalog_cases import Arguments, Call, D, generator, normal
from hotloop import moe
from hotloop.moe import AdamState, Dispatch, Norm


def primitives(n: int) -> Arguments:
    """What a policy of three components says of n states: all differentiable."""
    return {
        "mixing_weights": normal(n, 3).softmax(-1).requires_grad_(),
        "action_values": normal(n, 3, leaf=True),
        "component_logps": (normal(n, 3) - 2).requires_grad_(),
    }


E, K = 6, 2


def ids(n: int) -> torch.Tensor:
    """(n, 2): two experts of each token, of which the first may be none."""
    first = torch.randint(-1, E, (n, 1), generator=generator(n), device="cpu")
    return torch.cat((first, (first + 1) % E), 1)


def logits(n: int) -> Arguments:
    return {"router_logits": normal(n, E, leaf=True), "top_k": K}


def grouped(n: int) -> Arguments:
    bias = normal(E) / 10
    mask = torch.arange(n, device="cpu") % 3 > 0
    return {
        **logits(n),
        "scoring": "sigmoid",
        "n_group": 3,
        "topk_group": 2,
        "bias": bias,
        "routed_scale": 2.5,
        "token_mask": mask,
    }


def late(n: int) -> Arguments:
    return {**logits(n), "order": "topk_then_softmax", "dispatch": False}


def routed(n: int) -> moe.Routing:
    """A choice, with gradients for what the losses read."""
    found = moe.route(normal(n, E), K)
    return found._replace(
        prob_sums=found.prob_sums.clone().requires_grad_(),
        logsumexp=found.logsumexp.clone().requires_grad_(),
    )


def limited(n: int) -> Arguments:
    weights = {"topk_weights": normal(n, K), "drop": "weight", "capacity": 2}
    return {"topk_ids": ids(n), "num_experts": E, "align": 4, **weights}


def balanced(n: int) -> Arguments:
    return {"routing": routed(n)._replace(logsumexp=normal(n))}


def global_batch(n: int) -> Arguments:
    counts = torch.arange(E, device="cpu") + n
    layers = [x._replace(logsumexp=normal(n)) for x in (routed(n), routed(n))]
    return {"routing": layers, "convention": "mixtral", "expert_counts": counts, "num_tokens": 40}


def sequences(n: int) -> Arguments:
    return {"router_logits": normal(2, n, E, leaf=True), "top_k": K}


def packed(n: int) -> Arguments:
    offsets = torch.tensor([0, n // 2, n // 2, n], device="cpu")
    return {**logits(n), "cu_seqlens": offsets, "token_mask": grouped(n)["token_mask"]}


def order(n: int) -> Dispatch:
    """Of K slots of n tokens; every fifth goes nowhere, and the last two rows hold nothing."""
    slots = torch.arange(n * K, device="cpu")
    kept = slots[slots % 5 != 3].flip(0)
    rows = torch.full((n * K,), -1, device="cpu").scatter(
        0, kept, torch.arange(len(kept), device="cpu")
    )
    filled = torch.cat((kept, torch.full((2,), -1, device="cpu")))
    offsets = torch.tensor([0, len(filled)], device="cpu")
    return Dispatch(filled, rows, offsets, torch.tensor([len(kept)], device="cpu"))


def expert_rows(n: int, name: str = "z") -> Arguments:
    dispatch = order(n)
    rows = normal(len(dispatch.slot_of_row), D, leaf=True)
    return {name: rows, "topk_weights": normal(n, K, leaf=True), "dispatch": dispatch}


def shared(n: int) -> Arguments:
    return {"shared": (normal(n, D) + 1).requires_grad_()}


def stream(n: int) -> Arguments:
    return {"x": (normal(n, D) - 2).requires_grad_()}


def state(n: int) -> torch.Tensor:
    """Numbers that are not those of the stream, in rows with a stride."""
    return normal(n, 2 * D)[:, D:].requires_grad_()


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, device="cpu", dtype=torch.float32, requires_grad=True)


def norm(kind: str = "layer") -> Arguments:
    bias = normal(D, leaf=True) if kind == "layer" else None
    return {"norm": Norm(kind, (normal(D) + 1).requires_grad_(), bias)}


def momentum(n: int) -> Arguments:
    return {**stream(n), "m": state(n), **expert_rows(n), **shared(n), **norm()}


def adam(n: int) -> Arguments:
    before = AdamState(state(n), state(n).detach().square().requires_grad_(), state(n))
    return {**stream(n), "state": before, **expert_rows(n), **norm("rms"), "is_first": True}


def robust(n: int) -> Arguments:
    numbers = {"mu": number(0.4), "gamma": number(0.7), "alpha": number(0.2)}
    return {**stream(n), "d": state(n), "z": normal(n, D, leaf=True), **numbers, **norm()}


def anchored(n: int) -> Arguments:
    """Two experts of two inner numbers beside an anchor of three."""
    return {
        "x": normal(n, D, leaf=True),
        "router_weight": normal(2, D),
        "gate_up": normal(2, 4, D, leaf=True),
        "down": normal(2, D, 2, leaf=True),
        "anchor_gate_up": normal(6, D, leaf=True),
        "anchor_down": normal(D, 3, leaf=True),
        "top_k": 1,
    }


def experts(n: int, *names: str) -> Arguments:
    """Five experts of three inner numbers, one of them without a token."""
    chosen = torch.where(ids(n) == 2, 1, ids(n)).clamp(max=4)
    chosen[:, 1:].masked_fill_(chosen[:, :1] == chosen[:, 1:], -1)
    every = {
        **stream(n),
        "gate_up": normal(5, 6, D, leaf=True),
        "down": normal(5, D, 3, leaf=True),
        "topk_weights": normal(n, K, leaf=True),
        "gate_up_bias": normal(5, 6, leaf=True),
        "down_bias": normal(5, D, leaf=True),
        **shared(n),
    }
    given = {name: every[name] for name in (names or every)}
    return {**given, "dispatch": moe.dispatch(chosen, 5, impl="reference")}


def few_kept(n: int) -> Arguments:
    """Of the first product two rows."""
    rows = experts(n, "x", "gate_up", "down", "gate_up_bias")
    return {**rows, "activation_budget": 2 * 6 * 4}


def grouped_rows(n: int) -> Arguments:
    offsets = torch.tensor([0, 0, n, n, n, n], device="cpu")
    weight = normal(5, D, 6, leaf=True)
    return {"x": normal(n + 1, D, leaf=True), "weight": weight, "dispatch": offsets, "transposed": True}  # fmt: skip


CALLS = [
    Call("grouped_linear", grouped_rows),
    Call("expert_mlp", experts),
    Call("expert_rows", few_kept),
    Call("anchor_reconcile_moe", anchored),
    Call("pmoe_routing_loss", primitives),
    Call("route", logits),
    Call("route", grouped, "route, groups"),
    Call("route", late, "route, late softmax"),
    Call("dispatch", lambda n: {"topk_ids": ids(n), "num_experts": E}),
    Call("dispatch", limited, "dispatch, capacity"),
    Call("load_balance_loss", balanced),
    Call("load_balance_loss", global_batch, "load_balance_loss, layers"),
    Call("router_z_loss", lambda n: {"routing": routed(n)._replace(prob_sums=normal(E))}),
    Call("sequence_balance_loss", sequences),
    Call("sequence_balance_loss", packed, "sequence_balance_loss, packed"),
    Call(
        "update_routing_bias",
        lambda n: {"bias": normal(E), "expert_counts": torch.arange(E, device="cpu") % (n + 2)},
    ),
    Call("permute", lambda n: {**stream(n), "dispatch": order(n)}),
    Call("combine", lambda n: {**expert_rows(n, "expert_rows"), **shared(n)}),
    Call("residual_smoe_layer", lambda n: {**stream(n), **expert_rows(n), **norm("rms")}),
    Call("momentum_smoe_layer", momentum),
    Call("momentum_smoe_layer", lambda n: {**momentum(n), "post_norm": True}, "momentum-post"),
    Call("adam_smoe_layer", adam),
    Call("robust_momentum_smoe_layer", robust),
    Call("lookahead", lambda n: {**stream(n), "d": state(n), "alpha": number(0.2), **norm()}),
]
