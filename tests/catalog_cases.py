"""Valid calls of the ops of the catalogue: the cases of the rooms where they have some, one entry per op where not."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hotloop
import numpy as np
import torch
from decode_calls import CALLS as DECODE
from hotloop.preference import LOSSES
from pointwise_cases import CASES
from torch import Tensor

V, D = 11, 4
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Call:
    id: str
    function: Callable[..., Any]
    arguments: Callable[[int], Arguments]
    """By name, for a batch of n; a tensor that has a gradient requires it."""

    def numbers(self, n: int) -> dict[str, float]:
        """Every number that the call leaves at its default, said out loud."""
        given = self.arguments(n)
        parameters = inspect.signature(self.function).parameters.values()
        return {
            p.name: p.default
            for p in parameters
            if type(p.default) in (int, float) and p.name not in given
        }


def generator(n: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(n)


def normal(*shape: int, leaf: bool = False) -> Tensor:
    seed = generator(sum(shape))
    x = torch.randn(shape, generator=seed, dtype=torch.float32, device="cpu")
    return x.requires_grad_() if leaf else x


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, V, shape, generator=generator(sum(shape) + 1), device="cpu")


def some_ignored(n: int) -> Tensor:
    labels = tokens(n)
    labels[::3] = -100
    return labels


def head(n: int) -> Arguments:
    weight = normal(V, D, leaf=True)
    return {"hidden": normal(n, D, leaf=True), "weight": weight, "labels": some_ignored(n)}


def two_heads(n: int) -> Arguments:
    return {
        "student_hidden": normal(n, D, leaf=True), "student_weight": normal(V, D, leaf=True),
        "teacher_hidden": normal(n, D + 1), "teacher_weight": normal(V, D + 1), "labels": some_ignored(n),
    }  # fmt: skip


def two_logits(n: int) -> Arguments:
    return {"student_logits": normal(n, V, leaf=True), "teacher_logits": normal(n, V + 1)[:, :V]}


def answers(loss: str, n: int) -> Arguments:
    """n answers of each role, three tokens each."""
    from hotloop.preference.linear import FORMS

    roles = len(FORMS[loss].roles) + (loss == "hypo")
    reference = (roles * n, 3) if FORMS[loss].tokens else (roles * n,)
    labels = tokens(roles * n, 3)
    labels[:, 0] = -100
    marks = torch.arange(n, device="cpu") % 2
    half = torch.full((n,), 0.5, dtype=torch.float32, device="cpu")
    options = {
        "sppo": {"win_rate": half},
        "kto": {"is_desirable": marks, "kl": 0.1},
        "bco": {"is_desirable": marks},
        "hypo": {"kl_weight": 0.1},
        "vpo": {"alpha": 0.1},
        "inpo": {"iterate_chosen_logps": -half, "iterate_rejected_logps": half},
        "srpo": {"beta": 0.1},
        "modpo": {
            "chosen_margin_rewards": normal(n, 1), "rejected_margin_rewards": normal(n, 1), "weights": (0.5, 0.5),
        },
        "dno": {"win_rate_gap": 0.7},
        "rpo_sft": {"alpha": 0.1},
        "ipo": {"length_normalized": True},
    }  # fmt: skip
    return {
        "hidden": normal(roles * n, 3, D, leaf=True), "weight": normal(V, D, leaf=True), "labels": labels,
        "loss": loss, "ref_logps": -4.0 + normal(*reference), "options": options.get(loss),
    }  # fmt: skip


# One entry per op whose room has no table of cases of its own.
def groups(n: int) -> Arguments:
    offsets = torch.tensor([0, n // 2, n // 2, n], device="cpu")
    return {"values": normal(n, D, leaf=True), "cu_seqlens": offsets}


def group_ids(n: int) -> Arguments:
    ids = torch.arange(n, device="cpu") * 7 % 3
    return {"values": normal(n, leaf=True), "segment_ids": ids, "num_segments": 3}


SAMPLES: dict[str, Callable[[int], Arguments]] = {
    "core.segment_sum": groups,
    "core.segment_mean": group_ids,
    "core.segment_max": groups,
    "core.segment_min": group_ids,
    "core.segment_logsumexp": groups,
    "core.counting_sort": lambda n: {"keys": torch.arange(n, device="cpu") * 7 % 5, "num_keys": 5},
    "logprob.linear_logprob": head,
    "logprob.token_logprob": lambda n: {
        "logits": normal(n, V, leaf=True),
        "labels": some_ignored(n),
    },
    "logprob.linear_cross_entropy": head,
    "logprob.linear_kl": two_heads,
    "logprob.linear_jsd": two_heads,
    "logprob.linear_distill": two_heads,
    "logprob.forward_kl_distill": two_logits,
    "logprob.reverse_kl_distill": two_logits,
    "logprob.generalized_jsd_distill": two_logits,
    "logprob.balanced_divergence_kd": two_logits,
    "logprob.log_cosh_logit_distill": two_logits,
    "logprob.bonsai_synthesis_loss": lambda n: {
        "head_logits": normal(2, n, V, leaf=True),
        "pseudo_labels": tokens(2, n),
    },
    "logprob.mi_alpha_bound": lambda n: {
        "scores": normal(n, n, leaf=True),
        "log_baseline": normal(n, leaf=True),
    },
    "preference.preference_metrics": lambda n: dict.fromkeys(
        (
            "policy_chosen_logps",
            "policy_rejected_logps",
            "ref_chosen_logps",
            "ref_rejected_logps",
        ),
        normal(n),
    ),
    "table.salted_hash_bucket": lambda n: {"keys": tokens(n), "num_buckets": 100},
    "table.multiplexed_embedding_lookup": lambda n: {
        "tables": normal(7, 3, leaf=True),
        "values": [tokens(n), (tokens(2 * n), 2 * torch.arange(n + 1, device="cpu"))],
        "chunks": [2, 1],
    },
    "table.expert_space_routing": lambda n: {
        "embeddings": normal(n, 3, D, leaf=True),
        "router_logits": normal(n, 3, leaf=True),
    },
    "table.multi_reward_embedding": lambda n: {
        "returns_to_go": normal(n, 2),
        "w1": normal(2, 5, leaf=True),
        "w2": normal(5, 5, leaf=True),
        "anchors": normal(5, 2, leaf=True),
        "bucket_weight": normal(2, D, leaf=True),
        "bucket_bias": normal(D, leaf=True),
    },
}


def from_cases(op: Any) -> list[Call]:
    def arguments(case: Any, n: int) -> Arguments:
        grad, const = case.inputs(n, seed=n)
        rest = {"reduction": "mean"} if case.only_mean else {}
        leaves = {name: x.requires_grad_() for name, x in grad.items()}
        return {**leaves, **const, **case.kwargs, **rest}

    return [
        Call(case.id, case.fn, lambda n, case=case: arguments(case, n))
        for case in CASES
        if (case.room, case.op) == (op.room, op.name)
    ]


def from_decode(op: Any) -> list[Call]:
    if op.room != "decode" or op.name not in DECODE:
        return []
    function, base = DECODE[op.name]

    def arguments(n: int) -> Arguments:
        """The arrays of the room's table, with their rows repeated to a batch of n."""
        return {
            name: torch.from_numpy(np.resize(x, (n, *x.shape[1:])).copy())
            if isinstance(x, np.ndarray) and name != "neighbors"
            else torch.from_numpy(x) if isinstance(x, np.ndarray) else x
            for name, x in base.items()
        }  # fmt: skip

    return [Call(op.name, function, arguments)]


def calls(op: Any) -> list[Call]:
    """Every call that is known of an op; none where its inputs are no tensors."""
    if op.name == "linear_preference_loss":
        return [
            Call(f"linear-{name}", op.load(), lambda n, name=name: answers(name, n))
            for name in LOSSES
        ]
    found = from_cases(op) + from_decode(op)
    if op.full_name in SAMPLES:
        found.append(Call(op.name, op.load(), SAMPLES[op.full_name]))
    return found


def calls_of(select: Callable[[Any], bool]) -> list[tuple[Any, Call]]:
    return [(op, call) for op in hotloop.catalog() if select(op) for call in calls(op)]
