# SPDX-License-Identifier: Apache-2.0
"""One answer at a time, marked good or bad: KTO, BCO, and the running mean that shifts BCO."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import pointwise
from ..core.columns import check_rows, exact, marks
from ..core.pointwise import Reduction, Row, given, softplus
from ..front import check, declare
from ..front.impl import Impl
from ..front.ranges import above, at_least
from ._pair import PAIR, REF


@declare.composed(
    ranges={
        "beta": above(0),
        "desirable_weight": at_least(0),
        "undesirable_weight": at_least(0),
        "is_desirable": marks,
    },
    together=(("policy_kl_logps", "ref_kl_logps"),),
)
def kto_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    is_desirable: Tensor,
    policy_kl_logps: Tensor | None = None,
    ref_kl_logps: Tensor | None = None,
    *,
    kl: Row | None = None,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Kahneman-Tversky optimization: single answers, marked desirable or not.

    u = policy - ref; desirable: loss_i = desirable_weight * (1 - sigma(beta * (u_i - z0)));
    undesirable: loss_i = undesirable_weight * (1 - sigma(beta * (z0 - u_i))). z0 estimates the KL
    of policy and reference and carries no gradient: it is ``kl`` as given, or max(0,
    mean(policy_kl_logps - ref_kl_logps)). That mean is over this rank's rows: with data parallelism
    average it over ranks yourself and pass ``kl``. kl=0 is TRL's ``apo_zero_unpaired``.

    Args:
        is_desirable: True or 1 for a good answer, False or 0 for a bad one, bool, integer or float,
            shape (n,).
        policy_kl_logps: log-probability under the policy of mismatched answers (each prompt with
            the answer of another), any shape, not empty. No gradient flows into it. Default None.
        ref_kl_logps: the same under the reference, given together with policy_kl_logps. Default
            None.
        kl: z0 itself, a number or a tensor with one element. Give either this or the two above.
        desirable_weight: weight of good answers, >= 0; the paper keeps the ratio of the two
            classes' total weights between 1 and 4/3. Default 1.
        undesirable_weight: weight of bad answers, >= 0. Default 1.

    Examples:
        >>> logps, good = torch.tensor([-3.0, -5.0]), torch.tensor([True, False])
        >>> float(kto_loss(logps, logps, good, kl=0.0))
        0.5

    Reference:
        Ethayarajh et al. 2024, arXiv:2402.01306, eq. 7.
    """
    op = "kto_loss"
    with_rows = policy_kl_logps is not None
    if with_rows == (kl is not None):
        raise ValueError(
            f"[{op}] kl: expected either kl or policy_kl_logps with ref_kl_logps, got "
            f"{'both' if with_rows else 'neither'}. Pass kl=0.0 to go without."
        )
    z0 = kl
    if policy_kl_logps is not None and ref_kl_logps is not None:
        check_rows(op, ndim=None, policy_kl_logps=policy_kl_logps, ref_kl_logps=ref_kl_logps)
        if policy_kl_logps.numel() == 0:
            raise ValueError(
                f"[{op}] policy_kl_logps: expected at least one row, got shape {tuple(policy_kl_logps.shape)}. "
                "Pass kl=0.0 to go without."
            )
        with torch.no_grad():
            z0 = (exact(policy_kl_logps) - exact(ref_kl_logps)).mean().clamp(min=0)
    assert z0 is not None

    def body(l: Tensor, r: Tensor, good: Tensor, z0: Tensor) -> Tensor:
        x = beta * (l - r - z0)
        pull = desirable_weight * torch.sigmoid(-x)
        return torch.where(good == 1, pull, undesirable_weight * torch.sigmoid(x))

    return pointwise.run(
        op,
        "preference.kto",
        {"policy_logps": policy_logps},
        {"ref_logps": ref_logps, "is_desirable": is_desirable, "kl": z0},
        (beta, desirable_weight, undesirable_weight),
        reduction,
        impl,
        body,
    )


@pointwise.loss(
    grad=("policy_logps",),
    row=("ref_logps", "is_desirable", "delta", "density_weights"),
    ranges={"beta": above(0), "is_desirable": marks},
)
def bco_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    is_desirable: Tensor,
    density_weights: Row = 1.0,
    *,
    delta: Row = 0.0,
    beta: float = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Binary classifier optimization: answers with thumbs up or down, told apart by their reward.

    R = beta * (policy - ref); up: loss_i = softplus(-(R_i - delta)); down: loss_i = rho_i *
    softplus(R_i - delta). delta carries no gradient; ``RunningRewardMean`` keeps either form of it
    that is in use, the paper's and TRL's. They differ where the classes are unbalanced.

    Args:
        is_desirable: True or 1 for thumbs up, False or 0 for down, bool, integer or float, shape
            (n,).
        density_weights: rho of answers with thumbs down (up ones ignore it), shape (n,) or a
            number: the ratio f / (1 - f) of a classifier of prompts, clamped to [0.5, 10], corrects
            for prompts that differ between the classes. Default 1.
        delta: shift of the reward, a number or a tensor with one element. Default 0.
        beta: inverse temperature, > 0; the paper uses 0.01 to 0.1. Default 0.1.

    Examples:
        >>> logps, up = torch.tensor([-3.0, -5.0]), torch.tensor([True, False])
        >>> round(float(bco_loss(logps, logps, up)), 4)
        0.6931

    Reference:
        Jung et al. 2024, arXiv:2404.04656.
    """
    x = beta * (policy_logps - ref_logps) - delta
    up = is_desirable == 1
    return torch.where(up, 1.0, given(density_weights)) * softplus(torch.where(up, -x, x))


@pointwise.loss(grad=PAIR, row=(*REF, "delta"), ranges={"beta": above(0)})
def bco_pair_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    delta: Row = 0.0,
    beta: float = 0.1,
    reduction: Reduction = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """Binary classifier optimization of a pair: the chosen answer up, the rejected one down.

    R = beta * (policy - ref) of each answer, loss_i = softplus(-(Rw_i - delta)) + softplus(Rl_i -
    delta), an upper bound of the DPO loss at any delta. TRL's ``bco_pair`` of today is delta = 0;
    earlier releases subtracted a running mean.

    Args:
        delta: shift of the reward, a number or a tensor with one element. Default 0.

    Examples:
        >>> z = torch.zeros(2)
        >>> round(float(bco_pair_loss(z, z, z, z)), 4)
        1.3863

    Reference:
        Jung et al. 2024, arXiv:2404.04656.
    """
    chosen = beta * (policy_chosen_logps - ref_chosen_logps) - delta
    rejected = beta * (policy_rejected_logps - ref_rejected_logps) - delta
    return softplus(-chosen) + softplus(rejected)


class RunningRewardMean:
    """The reward shift delta of BCO: a running mean of all rewards seen.

    balanced=False is the mean over all rewards, each counting once; TRL's trainer averaged batch
    means instead, which is the same for batches of one size. balanced=True is the paper's (mean of
    the rewards of good answers + mean of those of bad ones) / 2, which does not lean towards the
    larger class. Sums are kept in float64 on the rewards' device and nothing is read back to the
    host.

    Args:
        balanced: see above. Default False.
        all_ranks: add up over the ranks of the default process group of torch.distributed at each
            update. Default False.

    Examples:
        >>> import torch
        >>> running = RunningRewardMean()
        >>> running.update(torch.tensor([1.0, 3.0]))
        tensor([2.])
        >>> running.update(torch.tensor([5.0]))
        tensor([3.])

    Reference:
        Jung et al. 2024, arXiv:2404.04656; the pooled mean: TRL's BCO trainer.
    """

    def __init__(self, *, balanced: bool = False, all_ranks: bool = False) -> None:
        self.balanced = balanced
        self.all_ranks = all_ranks
        # Rows: bad answers, good answers. Columns: count, mean.
        self._counts = torch.zeros(2, dtype=torch.float64, device="cpu")
        self._means = torch.zeros(2, dtype=torch.float64, device="cpu")

    @property
    def delta(self) -> Tensor:
        """The shift, shape (1,), float32; 0 before the first update."""
        weights = (self._counts > 0).double() if self.balanced else self._counts
        total = (weights * self._means).sum() / weights.sum().clamp(min=1)
        return total.float().reshape(1)

    def update(self, rewards: Tensor, is_desirable: Tensor | None = None) -> Tensor:
        """Take in the rewards beta * (policy - ref) of a batch and return the new delta.

        Args:
            rewards: shape (n,), any n. No gradient flows.
            is_desirable: True or 1 for good answers, shape (n,). Required if balanced.
        """
        op = "RunningRewardMean"
        check.float_tensor(op, "rewards", rewards, ndim=1)
        values = rewards.detach().double()
        if is_desirable is None:
            if self.balanced:
                raise ValueError(
                    f"[{op}] is_desirable: expected a tensor for balanced=True, got None. "
                    "Pass the marks."
                )
            good = torch.zeros_like(values)
        else:
            good = marks(op, "is_desirable", is_desirable).double()
            if good.shape != values.shape:
                raise ValueError(
                    f"[{op}] is_desirable: expected shape {tuple(values.shape)} like rewards, "
                    f"got {tuple(good.shape)}. Pass one mark per reward."
                )
        classes = torch.stack((1 - good, good))
        batch = torch.stack((classes.sum(1), classes @ values))
        if self.all_ranks:
            torch.distributed.all_reduce(batch)
        counts, sums = batch
        self._counts = self._counts.to(values.device) + counts
        means = self._means.to(values.device)
        # Welford: the mean moves by its share of the difference, so old sums never grow.
        self._means = means + (sums - counts * means) / self._counts.clamp(min=1)
        return self.delta

    def state_dict(self) -> dict[str, Any]:
        return {
            "balanced": self.balanced,
            "counts": self._counts.clone(),
            "means": self._means.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["balanced"] != self.balanced:
            raise ValueError(
                f"[RunningRewardMean] balanced: expected {self.balanced}, got {state['balanced']} "
                "in the state. Construct it like the one that was saved."
            )
        counts, means = state["counts"].clone(), state["means"].clone()  # both or none
        self._counts, self._means = counts, means
