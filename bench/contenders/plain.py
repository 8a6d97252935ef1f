# SPDX-License-Identifier: Apache-2.0
"""Plain torch, as one writes it without a library, eager and under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .._case import Contender, Inputs
from .._heads import IGNORE


def logprob(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    picked = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return picked.masked_fill(labels == IGNORE, 0.0)


def logprob_plus_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logps = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    picked = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return (picked + entropy).masked_fill(labels == IGNORE, 0.0)


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORE)


def divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    beta: float,
) -> Tensor:
    """Mean over tokens of the generalised JSD; 0 is KL(teacher || student), 1 the reverse."""
    q = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    p = torch.log_softmax((teacher_hidden @ teacher_weight.T).float(), dim=-1)
    if beta in (0.0, 1.0):
        rows = F.kl_div(
            *((q, p) if beta == 0.0 else (p, q)), reduction="none", log_target=True
        ).sum(-1)
    else:
        m = torch.log((1 - beta) * q.exp() + beta * p.exp())
        to_p = F.kl_div(m, p, reduction="none", log_target=True).sum(-1)
        to_q = F.kl_div(m, q, reduction="none", log_target=True).sum(-1)
        rows = beta * to_p + (1 - beta) * to_q
    valid = labels != IGNORE
    return rows.masked_fill(~valid, 0.0).sum() / valid.sum()


def dpo(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    beta: float,
) -> Tensor:
    policy = logprob(hidden, weight, labels).sum(-1)
    with torch.no_grad():
        ref = logprob(ref_hidden, ref_weight, labels).sum(-1)
    chosen, rejected = (policy - ref).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def eager_and_compiled(
    function: Callable[..., Tensor], arguments: Callable[[Inputs], tuple[object, ...]]
) -> list[Contender]:
    """Contenders "torch" and "torch.compile" of ``function(*arguments(inputs))``.

    Compiled with fixed shapes, each case anew: the best that torch.compile does for this case.
    """
    fast = torch.compile(function, dynamic=False)
    return [
        Contender("torch", "plain", lambda inputs: function(*arguments(inputs))),
        Contender(
            "torch.compile",
            "compiled",
            lambda inputs: fast(*arguments(inputs)),
            compiles=True,
        ),
    ]
