# SPDX-License-Identifier: Apache-2.0
"""The router and its losses, and the order of expert rows, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .results import Dispatch, Routing

TINY = 1e-20
"""Beside a sum of scores that is divided by: scores of a row may all be 0."""


# -- choice ------------------------------------------------------------------------------------------------


def route(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    order: str = "softmax_then_topk",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int | None = None,
    group_score: str = "top2",
    bias: Tensor | None = None,
    routed_scale: float = 1.0,
    token_mask: Tensor | None = None,
    dispatch: bool = True,
) -> Routing:
    options = (scoring, order, renormalize, n_group, topk_group, group_score, bias, routed_scale)
    ids, weights, shares, logsumexp, counted = choice(router_logits, top_k, token_mask, *options)
    experts = shares.shape[1]
    return Routing(
        ids,
        weights,
        count(ids, experts),
        shares.double().sum(0).to(shares.dtype),
        logsumexp,
        counted.sum(),
        _dispatch(ids, experts) if dispatch else None,
    )


def choice(
    router_logits: Tensor,
    top_k: int,
    token_mask: Tensor | None,
    scoring: str,
    order: str = "softmax_then_topk",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int | None = None,
    group_score: str = "top2",
    bias: Tensor | None = None,
    routed_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids (T, k), weights (T, k), normalised scores (T, E), log-sum-exp (T,), and which tokens count (T,)."""
    x, scores, counted = logits_and_scores(router_logits, token_mask, scoring)
    # Where experts are in the order of their logits, no two of which are equal because they were rounded.
    rises = bias is None and (n_group == 1 or group_score == "max")
    ranked = x if order == "topk_then_softmax" or rises else scores
    if bias is not None:
        ranked = ranked + bias.detach().to(x.dtype)
    ids = choose(ranked.detach(), top_k, n_group, topk_group or n_group, group_score)
    numbers = values(x, scores, ids, counted, scoring, order, renormalize, routed_scale)
    return torch.where(counted[:, None], ids, -1), *numbers, counted


def values(
    x: Tensor,
    scores: Tensor,
    ids: Tensor,
    counted: Tensor,
    scoring: str,
    order: str,
    renormalize: bool,
    routed_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """What is differentiable of a choice: weights (T, k), normalised scores (T, E) and log-sum-exp (T,)."""
    if order == "topk_then_softmax":
        chosen = x.gather(1, ids)
        none = (chosen == -torch.inf).all(-1, keepdim=True)
        weights = torch.where(none, 0.0, torch.where(none, 0.0, chosen).softmax(-1))
    else:
        weights = scores.gather(1, ids)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
    shares = scores / (scores.sum(-1, keepdim=True) + TINY) if scoring == "sigmoid" else scores
    return (
        torch.where(counted[:, None], routed_scale * weights, 0.0),
        torch.where(counted[:, None], shares, 0.0),
        torch.where(counted, x.logsumexp(-1), 0.0),
    )


def logits_and_scores(
    router_logits: Tensor, token_mask: Tensor | None, scoring: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits as they are computed with, scores, and which tokens count."""
    x = router_logits if router_logits.dtype == torch.float64 else router_logits.float()
    counted = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    if token_mask is not None:
        counted = token_mask.bool()
        # Before everything else: behind it, 0 times the gradient of a NaN would be NaN.
        x = torch.where(counted[:, None], x, 0.0)
    return x, x.softmax(-1) if scoring == "softmax" else x.sigmoid(), counted


def choose(ranked: Tensor, top_k: int, n_group: int, topk_group: int, group_score: str) -> Tensor:
    """(T, k): experts in the order of ``ranked`` (T, E), largest first, of equal ones the lower index."""
    tokens, experts = ranked.shape
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    if topk_group < n_group:
        members = ranked.reshape(tokens, n_group, experts // n_group)
        best = members.topk(min(2 if group_score == "top2" else 1, members.shape[-1]), -1).values
        groups = best.sum(-1).sort(dim=-1, descending=True, stable=True).indices[:, :topk_group]
        kept = torch.zeros((tokens, n_group), dtype=torch.bool, device=ranked.device)
        kept = kept.scatter(1, groups, True).repeat_interleave(experts // n_group, dim=1)
        left_out = ~kept.gather(1, order)
        order = order.gather(1, left_out.byte().sort(dim=-1, stable=True).indices)
    return order[:, :top_k]


def count(ids: Tensor, experts: int) -> Tensor:
    """(E,) int64: how many ids name each expert; -1 names none."""
    flat = ids.reshape(-1).long()
    zeros = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    return zeros.index_add(0, torch.where(flat < 0, experts, flat), torch.ones_like(flat))[:experts]


# -- order of expert rows ----------------------------------------------------------------------------------


def dispatch(
    topk_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop: str = "position",
    topk_weights: Tensor | None = None,
    align: int = 1,
) -> Dispatch:
    return _dispatch(topk_ids, num_experts, capacity, topk_weights, align)


def rows_of(slots: int, num_experts: int, align: int) -> int:
    """Expert rows of a dispatch: enough for any ids."""
    most = slots + num_experts * (align - 1)
    return -(-most // align) * align


def _dispatch(
    ids: Tensor,
    experts: int,
    capacity: int | None = None,
    topk_weights: Tensor | None = None,
    align: int = 1,
) -> Dispatch:
    flat = ids.reshape(-1).long()
    slots, device = flat.shape[0], flat.device
    keys = torch.where(flat < 0, experts, flat)  # slots that go nowhere come last
    each = torch.arange(slots, device=device)
    if capacity is not None:
        order = each
        if topk_weights is not None:
            order = topk_weights.detach().reshape(-1).sort(descending=True, stable=True).indices
        order = order[keys[order].sort(stable=True).indices]
        rank = torch.zeros_like(flat).scatter(0, order, each)
        keys = torch.where(rank - _starts(keys, experts)[keys] < capacity, keys, experts)
    order = keys.sort(stable=True).indices
    starts = _starts(keys, experts)
    counts = starts.diff()
    padded = (counts + (align - 1)) // align * align
    offsets = torch.cat((torch.zeros_like(starts[:1]), padded.cumsum(0)))
    sorted_keys = keys[order]
    total = rows_of(slots, experts, align)
    row = torch.where(sorted_keys < experts, each - starts[sorted_keys] + offsets[sorted_keys], -1)
    row_of_slot = torch.zeros_like(flat).scatter(0, order, row)
    # A row more takes what goes nowhere.
    slot_of_row = torch.full((total + 1,), -1, dtype=torch.int64, device=device)
    slot_of_row = slot_of_row.scatter(0, torch.where(row < 0, total, row), order)[:total]
    return Dispatch(slot_of_row, row_of_slot, offsets, counts)


def _starts(keys: Tensor, experts: int) -> Tensor:
    """(E + 1,): where the run of each key begins in sorted keys; the last is that of key E."""
    ends = count(keys, experts).cumsum(0)
    return torch.cat((torch.zeros_like(ends[:1]), ends))


# -- balance -----------------------------------------------------------------------------------------------


def load_balance_loss(
    routing: Routing | Sequence[Routing],
    convention: str = "switch",
    *,
    expert_counts: Tensor | None = None,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    layers = [routing] if isinstance(routing, Routing) else routing
    k, experts = layers[0].topk_ids.shape[1], layers[0].prob_sums.shape[0]
    ids = torch.cat([x.topk_ids.reshape(-1) for x in layers])
    tokens = torch.cat([x.topk_ids[:, 0] for x in layers]).ge(0).sum().clamp(min=1)
    mean = torch.stack([x.prob_sums for x in layers]).sum(0) / tokens
    counts, of = count(ids, experts), tokens
    if expert_counts is not None:
        counts = expert_counts
        of = torch.as_tensor(
            counts.sum() / k if num_tokens is None else num_tokens, device=ids.device
        )
    share = counts / of.clamp(min=1) / k
    loss = experts * (share * mean).sum()
    return loss * {"switch": 1.0, "mixtral": k, "fastmoe": 1 / k}[convention]


def router_z_loss(routing: Routing | Sequence[Routing]) -> Tensor:
    layers = [routing] if isinstance(routing, Routing) else routing
    z = torch.cat([x.logsumexp for x in layers])
    counted = torch.cat([x.topk_ids[:, 0] for x in layers]) >= 0
    return torch.where(counted, z, 0.0).square().sum() / counted.sum().clamp(min=1)


def sequence_balance_loss(
    router_logits: Tensor,
    top_k: int,
    *,
    cu_seqlens: Tensor | None = None,
    token_mask: Tensor | None = None,
    scoring: str = "sigmoid",
    n_group: int = 1,
    topk_group: int | None = None,
    group_score: str = "top2",
    bias: Tensor | None = None,
) -> Tensor:
    *shape, experts = router_logits.shape
    mask = None if token_mask is None else token_mask.reshape(-1)
    options = (scoring, "softmax_then_topk", True, n_group, topk_group, group_score, bias)
    ids, _, shares, _, counted = choice(router_logits.reshape(-1, experts), top_k, mask, *options)
    tokens, device = shares.shape[0], shares.device
    if cu_seqlens is None:
        sequences, length = shape if len(shape) == 2 else (1, tokens)
        cu_seqlens = torch.arange(sequences + 1, device=device) * length
    sequences = cu_seqlens.shape[0] - 1
    of_token = sequence_of_token(cu_seqlens, tokens)
    lengths = torch.zeros_like(cu_seqlens[1:]).index_add(0, of_token, counted.to(cu_seqlens.dtype))
    chosen = torch.zeros_like(shares).scatter_add(1, ids.clamp(min=0), (ids >= 0).to(shares.dtype))
    zeros = shares.new_zeros((sequences, experts))
    divisor = lengths.clamp(min=1)[:, None].to(shares.dtype)
    share = zeros.index_add(0, of_token, chosen) / (divisor * top_k)
    mean = zeros.index_add(0, of_token, shares) / divisor
    return experts * (share * mean).sum() / (lengths > 0).sum().clamp(min=1)


def sequence_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    each = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(each, cu_seqlens.diff().long(), output_size=tokens)


def update_routing_bias(
    bias: Tensor, expert_counts: Tensor, rate: float = 1e-3, centred: bool = False
) -> Tensor:
    """Returns the new bias; ``hotloop.moe.update_routing_bias`` writes it into the old one."""
    counts = expert_counts.double()
    step = rate * torch.sign(counts.mean() - counts)
    if centred:
        step = step - step.mean()
    return (bias.double() + step).to(bias.dtype)
