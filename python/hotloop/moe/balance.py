# SPDX-License-Identifier: Apache-2.0
"""Losses that keep the load of experts balanced, from what the router already summed; and the bias that needs none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.segment_loops import Groups, look_at_groups
from ..front import arrays, at_run_time, check
from ..front import impl as _impl
from ..front.impl import Impl
from ..reference.moe import router as plain
from . import _router_operator, router
from ._router_loops import look, looks
from .results import Routing
from .router import GroupScore, Scoring

Convention = Literal["switch", "mixtral", "fastmoe"]
CONVENTIONS = ("switch", "mixtral", "fastmoe")
COUNTS = ("int64", "int32", "float32", "float64")
ROUTED = ("int64", "float32", "float64")


def load_balance_loss(
    routing: Routing | Sequence[Routing],
    convention: Convention = "switch",
    *,
    expert_counts: Tensor | None = None,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    """How far the load of E experts is from balance: E * sum_i f_i P_i, differentiable through P.

    switch: f_i = counts_i / (T k), P_i = mean over tokens of the normalised score; 1 at balance, at most E. mixtral:
    f_i = counts_i / T, k times as much, as transformers' load_balancing_loss_func. fastmoe: P divided by T k, 1 / k as
    much. Several layers count as one whose tokens are those of all layers, as in transformers. Multiply by a weight of
    your own: 0.01 in the Switch paper, 0.001 with many small experts.

    Args:
        routing: what ``route`` returned, or a sequence of them, one per layer, all with one k and one E.
        convention: "switch", "mixtral" or "fastmoe". Default "switch".
        expert_counts: (E,), int64, int32 or float: counts in the place of those of ``routing``, such as the sum over
            all ranks that share the layer (global-batch balance). Default None.
        num_tokens: how many tokens ``expert_counts`` are of, an int or a tensor of one. Default None: their sum / k.

    Returns:
        (), of the dtype of prob_sums; 0 without tokens.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range; on the CPU, and elsewhere
            with HOTLOOP_CHECK=1, counts that are negative, not finite, or of more tokens than num_tokens.

    Examples:
        >>> import torch
        >>> from hotloop.moe import route
        >>> found = route(torch.eye(4) * 9, 1)
        >>> round(float(load_balance_loss(found)), 4)
        1.0

    Reference:
        Fedus et al. 2021, arXiv:2101.03961, eq. 4. fastmoe: He et al. 2021, arXiv:2103.13262.
    """
    op = "load_balance_loss"
    layers = _layers(op, routing)
    check.choice(op, "convention", convention, CONVENTIONS)
    k, experts = layers[0].topk_ids.shape[1], layers[0].prob_sums.shape[0]
    sums, counts, tokens = layers[0].prob_sums, layers[0].expert_counts, layers[0].num_tokens
    for layer in layers[1:]:
        sums, counts = sums + layer.prob_sums, counts + layer.expert_counts
        tokens = tokens + layer.num_tokens
    slots = tokens * k
    if expert_counts is not None:
        check.tensor(op, "expert_counts", expert_counts)
        check.alike(op, "expert_counts", expert_counts, COUNTS, (experts,), "routing", sums)
        counts = expert_counts.detach()
        _look_at_counts(op, counts)
        slots = counts.sum()
        if num_tokens is not None:
            given, slots = slots, _tokens(op, num_tokens, sums) * k
            # Counts that are means over ranks add up with rounding.
            if looks(counts) and bool(given.double() > slots.double() * (1 + 1e-5)):
                raise ValueError(
                    f"[{op}] num_tokens: expected at least as many as make the {given.item()} choices of "
                    f"expert_counts, {k} each, got {int(slots) // k}. Take both from the same tokens."
                )
    elif num_tokens is not None:
        raise ValueError(
            f"[{op}] num_tokens: expected None without expert_counts, got {num_tokens!r}. Leave it out."
        )
    share = counts.to(sums.dtype) / slots.clamp(min=1)
    factor = {"switch": 1.0, "mixtral": float(k), "fastmoe": 1.0 / k}[convention]
    return (experts * factor) * (share * sums).sum() / tokens.clamp(min=1)


def router_z_loss(routing: Routing | Sequence[Routing]) -> Tensor:
    """Mean over tokens of z_t^2, z_t the log-sum-exp of the router's logits: what keeps logits small.

    d loss / d logits = 2 z_t softmax(logits_t) / T, taken in the pass that gives the other gradients of ``route``.
    Multiply by a weight of your own; ST-MoE takes 0.001.

    Args:
        routing: what ``route`` returned, or a sequence of them, whose tokens are taken together.

    Returns:
        (), of the dtype of logsumexp; 0 without tokens.

    Raises:
        TypeError, ValueError: no Routing, or no layer at all.

    Examples:
        >>> import torch
        >>> from hotloop.moe import route
        >>> round(float(router_z_loss(route(torch.zeros(5, 4), 2))), 4)  # log(4)^2
        1.9218

    Reference:
        Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, eq. 5.
    """
    layers = _layers("router_z_loss", routing)
    tokens = layers[0].num_tokens
    for layer in layers[1:]:
        tokens = tokens + layer.num_tokens
    each = [(layer.logsumexp * layer.logsumexp).sum() for layer in layers]
    return (each[0] if len(each) == 1 else torch.stack(each).sum()) / tokens.clamp(min=1)


def sequence_balance_loss(
    router_logits: Tensor,
    top_k: int,
    *,
    cu_seqlens: Tensor | None = None,
    token_mask: Tensor | None = None,
    scoring: Scoring = "sigmoid",
    n_group: int = 1,
    topk_group: int | None = None,
    group_score: GroupScore = "top2",
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Balance inside every sequence, the small complement of balancing by a bias.

    Of a sequence of L tokens f_i = E / (k L) * its slots that chose expert i, P_i = mean over its tokens of
    s_i / sum_j s_j; loss = mean over sequences of sum_i f_i P_i, 1 at balance. The gradient goes through P.

    Args:
        router_logits: (T, E) packed or of one sequence, or (B, L, E), as in ``route``. Differentiable.
        top_k: k, as in ``route``.
        cu_seqlens: (sequences + 1,), int32 or int64, for logits (T, E): sequence s is the tokens cu_seqlens[s] to
            cu_seqlens[s + 1] - 1; from 0 to T. Default None: one sequence.
        token_mask: (T,) or (B, L): 0 or False for padding. A sequence of padding alone is left out of the mean.
            Default None.
        scoring: "sigmoid" or "softmax". Default "sigmoid".
        n_group, topk_group, group_score: as in ``route``.
        bias: (E,), as in ``route``. Default None: f counts what the scores alone would choose, as in Megatron-LM.
        impl: "auto", "cpu", "cuda" or "reference".

    Returns:
        (), float32, float64 for float64 logits; 0 without tokens. Multiply by a weight: DeepSeek-V3 takes 0.0001.

    Raises:
        TypeError, ValueError: as in ``route``; offsets that do not rise from 0 to T.
        NotImplementedError: as in ``route``.

    Examples:
        >>> import torch
        >>> round(float(sequence_balance_loss(torch.eye(4).repeat(2, 1) * 9, 1)), 4)
        1.0

    Reference:
        DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20.
    """
    op = "sequence_balance_loss"
    x = check.float_tensor(op, "router_logits", router_logits)
    if x.ndim not in (2, 3):
        raise ValueError(
            f"[{op}] router_logits: expected 2 or 3 dimension(s), got shape {tuple(x.shape)}."
        )
    options: dict[str, Any] = {
        "scoring": scoring,
        "n_group": n_group,
        "topk_group": topk_group,
        "group_score": group_score,
    }
    selection = router.select(
        op, x, top_k, order="softmax_then_topk", renormalize=True, routed_scale=1.0, **options
    )
    bias = router.check_bias(op, bias, x)
    mask = router.check_mask(op, token_mask, x)
    if cu_seqlens is not None:
        if x.ndim != 2:
            raise ValueError(
                f"[{op}] cu_seqlens: expected None beside logits of shape {tuple(x.shape)}, got a tensor. "
                "Reshape the logits to (T, E)."
            )
        check.tensor(op, "cu_seqlens", cu_seqlens)
        check.array(op, "cu_seqlens", cu_seqlens, arrays.INTEGERS, 1)
        check.same_place(op, "cu_seqlens", cu_seqlens, "router_logits", x)
        if cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"[{op}] cu_seqlens: expected shape (sequences + 1,), got (0,). No sequence is [0]."
            )
    chosen = _impl.choose(op, impl, "router_logits", x, router.CANDIDATES, top_k=top_k)
    if cu_seqlens is not None and looks(x):
        _look_at_offsets(op, "cu_seqlens", cu_seqlens, x.shape[0])
    if chosen == "reference":
        look(op, x, bias, mask)
        return plain.sequence_balance_loss(
            x, top_k, cu_seqlens=cu_seqlens, token_mask=mask, bias=bias, **options
        )
    experts = x.shape[-1]
    offsets = _offsets(op, x, cu_seqlens)
    rows = x.reshape(-1, experts)
    found = _router_operator.route(op, rows, bias, mask, offsets, selection, False)
    counts, sums, tokens = found[2], found[3], found[5]
    # f_i P_i of a sequence without tokens is 0.
    divisor = (tokens * tokens * top_k).clamp(min=1).to(sums.dtype)
    each = (counts.to(sums.dtype) * sums).sum(-1) / divisor
    return experts * each.sum() / (tokens > 0).sum().clamp(min=1)


@at_run_time.look("moe_offsets")
def _look_at_offsets(op: str, _name: str, offsets: Tensor, tokens: int) -> None:
    look_at_groups(op, tokens, Groups(offsets.shape[0] - 1, offsets, None, None))


def _offsets(op: str, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(torch.int64).contiguous()
        if torch.compiler.is_compiling():
            return at_run_time.checked("moe_offsets", op, "cu_seqlens", offsets, (x.shape[0],))
        return offsets
    sequences, length = x.shape[:2] if x.ndim == 3 else (1, x.shape[0])
    return torch.arange(sequences + 1, dtype=torch.int64, device=x.device) * length


def update_routing_bias(
    bias: Tensor, expert_counts: Tensor, rate: float = 1e-3, centred: bool = False
) -> Tensor:
    """Move the routing bias of every expert one step towards balance, in place: no loss, no gradient.

    e_i = mean_j(counts_j) - counts_i; bias_i += rate * sign(e_i), sign(0) = 0. With ``centred`` the mean of the steps
    is taken off, which leaves the choice of experts as it is and keeps the sum of the bias. Call it once per optimizer
    step, with the counts of the whole batch: of all ranks that share the layer and all accumulated batches.

    Args:
        bias: (E,), float32 or float64, E >= 1: ``bias`` of ``route``. Written to.
        expert_counts: (E,), int64, int32 or float, >= 0: how many slots chose each expert.
        rate: u, >= 0. Default 0.001, as in Megatron-LM.
        centred: Default False.

    Returns:
        ``bias``.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range; a bias that requires a gradient.
            Nothing is written then.

    Examples:
        >>> import torch
        >>> update_routing_bias(torch.zeros(3), torch.tensor([4, 2, 0]), 0.5).tolist()
        [-0.5, 0.0, 0.5]

    Reference:
        Wang et al. 2024, arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437. Centred: torchtitan.
    """
    op = "update_routing_bias"
    check.tensor(op, "bias", bias)
    dtype = arrays.dtype(bias)
    if dtype in ("float16", "bfloat16"):
        raise TypeError(
            f"[{op}] bias: expected dtype float32, float64, got {dtype}. Keep it in float32: beside numbers near 1 "
            "steps of 0.001 are lost."
        )
    check.array(op, "bias", bias, ("float32", "float64"), 1)
    experts = bias.shape[0]
    if experts < 1:
        raise ValueError(f"[{op}] bias: expected shape (E,) with E >= 1, got (0,).")
    if bias.requires_grad:
        raise ValueError(
            f"[{op}] bias: expected a tensor without gradient, got one that requires it. Keep it as a buffer."
        )
    check.writable(op, "bias", bias)
    if not torch.compiler.is_compiling() and bias._is_zerotensor():  # of forward-mode autograd
        raise ValueError(
            f"[{op}] bias: expected a writable array, got zeros without memory. Pass a copy."
        )
    check.tensor(op, "expert_counts", expert_counts)
    check.alike(op, "expert_counts", expert_counts, COUNTS, (experts,), "bias", bias)
    rate = check.number(op, "rate", rate, at_least=0)
    centred = check.flag(op, "centred", centred)
    counts = expert_counts.detach()
    _look_at_counts(op, counts)
    wide = counts.double() if counts.is_floating_point() else counts.long()
    # In whole numbers the sign of mean - count is exact.
    step = torch.sign(wide.sum() - experts * wide).to(bias.dtype) * rate
    if centred:
        step = step - step.mean()
    with torch.no_grad():
        bias.add_(step)
    return bias


def _look_at_counts(op: str, counts: Tensor) -> None:
    if looks(counts):
        bad = ~((counts >= 0) & (counts < torch.inf))
        check.refuse(op, "expert_counts", counts, bad, "finite numbers >= 0")


def _layers(op: str, routing: Any) -> list[Routing]:
    layers = [routing] if isinstance(routing, Routing) else routing
    if not isinstance(layers, (list, tuple)) or not all(isinstance(x, Routing) for x in layers):
        raise TypeError(
            f"[{op}] routing: expected a Routing or a list of them, got {type(routing).__name__}. "
            "Pass what route returns."
        )
    if not layers:
        raise ValueError(f"[{op}] routing: expected at least one layer, got none.")
    first = layers[0]
    for i, layer in enumerate(layers):
        for part in (layer, layer.dispatch or ()):
            for name, value in zip(getattr(part, "_fields", ()), part):
                if isinstance(value, Tensor):
                    named = f"routing[{i}].{name}"
                    check.array(op, named, check.tensor(op, named, value), ROUTED)
        for name in ("topk_ids", "prob_sums"):
            mine, wanted = getattr(layer, name), getattr(first, name)
            if mine.shape[-1] != wanted.shape[-1]:
                what = "choices" if name == "topk_ids" else "experts"
                raise ValueError(
                    f"[{op}] routing: expected {wanted.shape[-1]} {what} like in layer 0, got {mine.shape[-1]} in "
                    f"layer {i}."
                )
        check.same_place(op, f"routing[{i}]", layer.prob_sums, "routing[0]", first.prob_sums)
    return list(layers)


def _tokens(op: str, value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        check.tensor(op, "num_tokens", value)
        check.shape(op, "num_tokens", value, ())
        check.same_place(op, "num_tokens", value, "routing", like)
        return value.detach()
    count = check.integer(op, "num_tokens", value, at_least=0)
    return torch.full((), count, dtype=torch.int64, device=like.device)
