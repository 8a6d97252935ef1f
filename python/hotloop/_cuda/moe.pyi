# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from typing import Any

def dispatch(
    ids: Any,
    num_experts: int,
    capacity: int,
    weights: Any,
    align: int,
    slot_of_row: Any,
    row_of_slot: Any,
    expert_offsets: Any,
    expert_counts: Any,
    workspace: Callable[..., Any],
    device: int,
    stream: int,
) -> None: ...
def route(
    router_logits: Any,
    selection: tuple[Any, ...],
    bias: Any,
    mask: Any,
    offsets: Any,
    ids: Any,
    weights: Any,
    counts: Any,
    prob_sums: Any,
    logsumexp: Any,
    num_tokens: Any,
    slot_of_row: Any,
    row_of_slot: Any,
    expert_offsets: Any,
    workspace: Callable[..., Any],
    device: int,
    stream: int,
) -> None: ...
def route_backward(
    router_logits: Any,
    selection: tuple[Any, ...],
    biased: bool,
    mask: Any,
    offsets: Any,
    ids: Any,
    d_weights: Any,
    d_prob_sums: Any,
    d_logsumexp: Any,
    result: Any,
    device: int,
    stream: int,
) -> None: ...
