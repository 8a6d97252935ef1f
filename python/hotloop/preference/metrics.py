# SPDX-License-Identifier: Apache-2.0
"""What trainers log about a batch of pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.columns import check_rows, exact
from ..front import check


@torch.no_grad()
def preference_metrics(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
) -> dict[str, Tensor]:
    """Compute the means that TRL's DPO trainer logs, under its names.

    Rewards are beta * (policy - reference). "rewards/chosen" and "rewards/rejected" are their
    means, "rewards/accuracies" the share of pairs with chosen reward > rejected reward (ties count
    as wrong), "rewards/margins" the mean of chosen minus rejected reward, "logps/chosen" and
    "logps/rejected" the means of the policy's log-probabilities. TRL's "logits/..." need logits and
    are not here. Means are over this rank.

    Args:
        policy_chosen_logps: log-probability of the preferred answer under the policy, summed over
            its tokens, shape (n,), nats.
        policy_rejected_logps: the same of the other answer, shape (n,).
        ref_chosen_logps: log-probability of the preferred answer under the reference, shape (n,).
        ref_rejected_logps: the same of the other answer, shape (n,).
        beta: inverse temperature, > 0. Default 0.1.

    Returns:
        Six tensors without dimensions, without gradient, on the device of the inputs: nothing is
        read back to the host. float32, or float64 if any input is float64; NaN for n = 0.

    Raises:
        TypeError: an argument is not a float tensor.
        ValueError: shapes or devices differ, or beta is out of range.

    Examples:
        >>> import torch
        >>> chosen, rejected = torch.tensor([-3.0, -5.0]), torch.tensor([-4.0, -2.0])
        >>> z = torch.zeros(2)
        >>> metrics = preference_metrics(chosen, rejected, z, z, beta=0.5)
        >>> {name: float(value) for name, value in metrics.items() if name.startswith("rewards/c")}
        {'rewards/chosen': -2.0}
        >>> float(metrics["rewards/accuracies"]), float(metrics["rewards/margins"])
        (0.5, -0.5)

    Reference:
        TRL 1.16.0, DPOTrainer.
    """
    op = "preference_metrics"
    beta = check.number(op, "beta", beta, above=0)
    check_rows(
        op,
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    pc, pr = exact(policy_chosen_logps), exact(policy_rejected_logps)
    chosen = beta * (pc - exact(ref_chosen_logps))
    rejected = beta * (pr - exact(ref_rejected_logps))
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype).mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": pc.mean(),
        "logps/rejected": pr.mean(),
    }
