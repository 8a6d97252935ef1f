# SPDX-License-Identifier: Apache-2.0
"""Losses of unlearning beside what their authors' code computes, in eager torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..core.pointwise import Row


def npo(policy: Tensor, ref: Tensor, beta: float) -> Tensor:
    return -F.logsigmoid(-beta * (policy - ref)).mean() * 2 / beta


ROWS = (Row("npo_loss", npo, ("pc",), ("rc",), {"beta": 0.1}, quick=True),)
