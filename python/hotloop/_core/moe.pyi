# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

def activate(activation: tuple[Any, ...], slots: Any, inner: Any, out: Any) -> None: ...
def activate_gradient(
    activation: tuple[Any, ...],
    slots: Any,
    inner: Any,
    above: Any,
    weights: Any,
    begin: Any,
    gradient: Any,
    out: Any,
    weight_gradient: Any,
) -> None: ...
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
) -> bool: ...
def expert_groups(
    slot_of_row: Any,
    row_of_slot: Any,
    expert_offsets: Any,
    expert_counts: Any,
    rows: int,
    groups: Any,
    most: int,
    border: int,
) -> Any: ...
def outer_product(left: tuple[Any, ...], right: tuple[Any, ...], groups: Any, out: Any) -> None: ...
def permute(x: Any, slot_of_row: Any, row_of_slot: Any, out: Any) -> bool: ...
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
) -> int: ...
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
) -> None: ...
def rows_product(
    rows: tuple[Any, ...], weight: Any, bias: Any, groups: Any, out: Any, out_first_row: int
) -> None: ...
def scatter_add(slots: Any, choices: int, rows: Any, weights: Any, out: Any) -> None: ...
def step(
    rule: str,
    numbers: Sequence[float],
    wide: bool,
    tokens: int,
    columns: int,
    x: Any,
    states: tuple[Any, ...],
    z: Any,
    weights: Any,
    slot_of_row: Any,
    row_of_slot: Any,
    shared: Any,
    norm: str,
    norm_weight: Any,
    norm_bias: Any,
    eps: float,
    out: Any,
    out_states: tuple[Any, ...],
    normed: Any,
    statistics: Any,
) -> bool: ...
def step_backward(
    rule: str,
    numbers: Sequence[float],
    wide: bool,
    tokens: int,
    columns: int,
    x: Any,
    states: tuple[Any, ...],
    z: Any,
    weights: Any,
    slot_of_row: Any,
    row_of_slot: Any,
    shared: Any,
    norm: str,
    norm_weight: Any,
    eps: float,
    after: Any,
    after_state: Any,
    statistics: Any,
    grad: Any,
    grad_states: tuple[Any, ...],
    grad_normed: Any,
    slope_x: Any,
    slope_states: tuple[Any, ...],
    slope_z: Any,
    slope_weights: Any,
    slope_shared: Any,
    slope_norm_weight: Any,
    slope_norm_bias: Any,
    slope_numbers: Any,
) -> None: ...
