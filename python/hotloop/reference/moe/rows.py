# SPDX-License-Identifier: Apache-2.0
"""Expert rows in plain torch: tokens to rows, and their weighted sum per token."""

from __future__ import annotations

import torch
from torch import Tensor

from .results import Dispatch


def permute(x: Tensor, dispatch: Dispatch) -> Tensor:
    k = dispatch.row_of_slot.shape[0] // max(x.shape[0], 1)
    slots = dispatch.slot_of_row
    return _with_nothing(x)[torch.where(slots < 0, x.shape[0], slots // max(k, 1))]


def combine(
    expert_rows: Tensor,
    topk_weights: Tensor,
    dispatch: Dispatch,
    *,
    shared: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    z = weighted_sum(expert_rows, topk_weights, dispatch)
    if shared is not None:
        z = z + shared.to(z.dtype)
    return z.to(expert_rows.dtype if out_dtype is None else out_dtype)


def weighted_sum(expert_rows: Tensor, topk_weights: Tensor, dispatch: Dispatch) -> Tensor:
    """(T, D) in float32, float64 for float64 rows: of each token the rows of its slots, times their weights."""
    wide = torch.float64 if expert_rows.dtype == torch.float64 else torch.float32
    rows = dispatch.row_of_slot.view(topk_weights.shape)
    nowhere = rows < 0
    # Slots that go nowhere have a weight too, and a NaN times 0 is NaN.
    weights = torch.where(nowhere, 0.0, topk_weights.to(wide))
    found = _with_nothing(expert_rows.to(wide))[torch.where(nowhere, expert_rows.shape[0], rows)]
    return (weights.unsqueeze(-1) * found).sum(1)


def _with_nothing(rows: Tensor) -> Tensor:
    """The rows, and one of zeros behind them."""
    return torch.cat((rows, rows.new_zeros((1, rows.shape[1]))))
