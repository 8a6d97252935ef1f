# SPDX-License-Identifier: Apache-2.0
"""The arguments that most losses of this room take, in the order of the heads."""

from __future__ import annotations

from torch import Tensor

from ..core.pointwise import Row

PAIR = ("policy_chosen_logps", "policy_rejected_logps")
REF = ("ref_chosen_logps", "ref_rejected_logps")


def named(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Row, ref_rejected: Row
) -> tuple[dict[str, Tensor | None], dict[str, Row]]:
    """The columns of a pair by name, differentiable ones and constants, as ``pointwise.run`` takes them."""
    pair = (policy_chosen, policy_rejected)
    return dict(zip(PAIR, pair)), dict(zip(REF, (ref_chosen, ref_rejected)))
