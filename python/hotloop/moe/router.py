# SPDX-License-Identifier: Apache-2.0
"""The router of a sparse mixture, and the order of expert rows: which experts a token goes to, with which weights."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..front import arrays, check
from ..front import impl as _impl
from ..front.impl import Impl
from ..reference.moe import router as plain
from . import _router_operator
from ._router_loops import Selection, look, look_at_ids
from .results import Dispatch, Routing

Scoring = Literal["softmax", "sigmoid"]
Order = Literal["softmax_then_topk", "topk_then_softmax"]
GroupScore = Literal["top2", "max"]
Drop = Literal["position", "weight"]

SCORINGS = ("softmax", "sigmoid")
ORDERS = ("softmax_then_topk", "topk_then_softmax")
GROUP_SCORES = ("top2", "max")
DROPS = ("position", "weight")
MASKS = ("bool", "uint8", "int32", "int64")
MOST_EXPERTS = 4096
MOST_CHOICES = 128
CANDIDATES = {"cuda": _impl.on_cuda, "cpu": _impl.on_cpu, "reference": _impl.everywhere}


def route(
    router_logits: Tensor,
    top_k: int,
    *,
    scoring: Scoring = "softmax",
    order: Order = "softmax_then_topk",
    renormalize: bool = True,
    n_group: int = 1,
    topk_group: int | None = None,
    group_score: GroupScore = "top2",
    bias: Tensor | None = None,
    routed_scale: float = 1.0,
    token_mask: Tensor | None = None,
    dispatch: bool = True,
    impl: Impl = "auto",
) -> Routing:
    """Choose k experts for every token, with their weights and what balance losses need, in one pass over the logits.

    s = softmax(logits) or sigmoid(logits), c = s + bias. The k experts with the largest c are chosen, of equal ones
    the lower index; g_j = routed_scale * s_j, divided by sum of the chosen s + 1e-20 with ``renormalize``. With
    order="topk_then_softmax" c = logits + bias and g = routed_scale * softmax of the chosen logits. Of several groups
    the ``topk_group`` best are open: a group is worth the sum of its two largest c ("top2"), or its largest ("max").
    Without a bias experts are compared by their logits, which rounding does not make equal (but groups of several by
    "top2"). The weights come from s, so the bias changes the choice alone and has no gradient.

    Args:
        router_logits: (T, E), 1 <= E <= 4096, float32, float64, float16 or bfloat16, any strides. Differentiable.
        top_k: k, 1 to the smaller one of E and 128, and of the experts in ``topk_group`` groups.
        scoring: "softmax", or "sigmoid" (DeepSeek-V3). Default "softmax".
        order: "softmax_then_topk", or "topk_then_softmax" (FastMoE, Mixtral, gpt-oss), for the softmax only. With
            ``renormalize`` and without a bias the two are the same. An expert whose logit is -inf has weight 0.
            Default "softmax_then_topk".
        renormalize: make the weights of a token sum to ``routed_scale``. Default True; "topk_then_softmax" has no
            other.
        n_group: groups of E / n_group neighbouring experts. Default 1.
        topk_group: groups whose experts may be chosen, 1 to n_group. Default None: all.
        group_score: "top2" (DeepSeek-V3) or "max" (DeepSeek-V2). Default "top2".
        bias: (E,), added for the choice only, see ``update_routing_bias``. Default None.
        routed_scale: factor of all weights, > 0. Default 1.
        token_mask: (T,), 0 or False for padding: ids -1, weights 0, counted nowhere, not read. bool, uint8, int32 or
            int64. Default None.
        dispatch: also sort the slots by expert. Default True.
        impl: "auto", "cpu", "cuda" or "reference".

    Returns:
        Routing. Numbers are float32, float64 for float64 logits; the gradients of topk_weights, prob_sums and
        logsumexp are taken together in one pass, in the dtype of the logits. prob_sums are of softmax(logits), or of
        s / (sum of s + 1e-20) with the sigmoid.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range; on the CPU, and elsewhere with
            HOTLOOP_CHECK=1, a logit that is NaN or inf, a row without a finite logit, or a bias that is not finite.
        NotImplementedError: a forced ``impl`` that cannot run; torch.func transforms.

    Examples:
        >>> import torch
        >>> found = route(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), 2)
        >>> found.topk_ids.tolist(), found.topk_weights.tolist()
        ([[1, 2]], [[0.5, 0.5]])
        >>> found.expert_counts.tolist(), found.dispatch.expert_offsets.tolist()
        ([0, 1, 1, 0], [0, 0, 1, 2, 2])

    Reference:
        Softmax: Shazeer et al. 2017, arXiv:1701.06538. Sigmoid, groups and bias: DeepSeek-V3, arXiv:2412.19437.
    """
    op = "route"
    x = check.float_tensor(op, "router_logits", router_logits, ndim=2)
    selection = select(
        op, x, top_k, scoring, order, renormalize, n_group, topk_group, group_score, routed_scale
    )
    with_dispatch = check.flag(op, "dispatch", dispatch)
    bias = check_bias(op, bias, x)
    mask = check_mask(op, token_mask, x)
    if _impl.choose(op, impl, "router_logits", x, CANDIDATES, top_k=top_k) == "reference":
        look(op, x, bias, mask)
        named: dict[str, Any] = dict(zip(Selection._fields[1:], selection[1:]))
        k = selection.top_k
        return plain.route(x, k, bias=bias, token_mask=mask, dispatch=with_dispatch, **named)
    found = _router_operator.route(op, x, bias, mask, None, selection, with_dispatch)
    made = Dispatch._make((*found[6:9], found[2])) if with_dispatch else None
    return Routing._make((*found[:6], made))


def dispatch(
    topk_ids: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop: Drop = "position",
    topk_weights: Tensor | None = None,
    align: int = 1,
    impl: Impl = "auto",
) -> Dispatch:
    """Put the slots of a routing into the order of their experts: a stable counting sort, without waiting for a device.

    Slot t * k + j is choice j of token t. Its row is offsets[id] + how many slots before it chose the same expert, so
    rows of an expert lie side by side in the order of their tokens.

    Args:
        topk_ids: (T, k), int64 or int32, 0 to num_experts - 1; -1 goes nowhere.
        num_experts: E, 1 to 65536.
        capacity: most rows of an expert, >= 0; further slots go nowhere. Default None: no limit.
        drop: which slots stay if there are more: "position" the first ones, "weight" those with the largest
            ``topk_weights``, of equal ones the first. Default "position".
        topk_weights: (T, k), any float dtype, for drop="weight" only.
        align: the rows of every expert are filled up to a multiple of this with rows of nothing, >= 1: what a kernel
            with tiles of ``align`` rows takes. Default 1.
        impl: "auto", "cpu", "cuda" or "reference".

    Returns:
        Dispatch. It has T * k rows, or T * k + E * (align - 1) rounded up to a multiple of align, whatever the ids are.

    Raises:
        TypeError, ValueError: an argument of another dtype, shape, device or range; on the CPU, and elsewhere with
            HOTLOOP_CHECK=1, an id out of range or a weight that is NaN.
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import torch
        >>> found = dispatch(torch.tensor([[2, 0], [0, 1]]), 3)
        >>> found.slot_of_row.tolist(), found.row_of_slot.tolist()
        ([1, 2, 3, 0], [3, 0, 1, 2])
        >>> found.expert_offsets.tolist(), found.expert_counts.tolist()
        ([0, 2, 3, 4], [2, 1, 1])

    Reference:
        The permutation of Gale et al. 2023 (MegaBlocks), arXiv:2211.15841.
    """
    op = "dispatch"
    ids = check.array(op, "topk_ids", check.tensor(op, "topk_ids", topk_ids), arrays.INTEGERS, 2)
    experts = check.integer(op, "num_experts", num_experts, at_least=1, at_most=2**16)
    check.choice(op, "drop", drop, DROPS)
    if capacity is not None:
        # What is above int64 is no limit either; compared with int64 it would wrap.
        capacity = min(check.integer(op, "capacity", capacity, at_least=0), 2**63 - 1)
    align = check.integer(op, "align", align, at_least=1, at_most=2**16)
    if drop == "weight" and (capacity is None or topk_weights is None):
        lacking = "capacity" if capacity is None else "topk_weights"
        raise ValueError(f"[{op}] {lacking}: expected a value beside drop='weight', got None.")
    if topk_weights is not None:
        if drop != "weight":
            raise ValueError(
                f"[{op}] topk_weights: expected None with drop={drop!r}, got a tensor. "
                "Pass drop='weight' to keep the largest."
            )
        check.alike(op, "topk_weights", topk_weights, arrays.FLOATS, tuple(ids.shape), "topk_ids", ids)  # fmt: skip
    if _impl.choose(op, impl, "topk_ids", ids, CANDIDATES, num_experts=experts) == "reference":
        look_at_ids(op, ids, experts, topk_weights)
        return plain.dispatch(
            ids, experts, capacity=capacity, drop=drop, topk_weights=topk_weights, align=align
        )
    return _router_operator.dispatch(ids, experts, capacity, topk_weights, align)


# -- checks ------------------------------------------------------------------------------------------------


def select(
    op: str,
    x: Tensor,
    top_k: Any,
    scoring: Any,
    order: Any,
    renormalize: Any,
    n_group: Any,
    topk_group: Any,
    group_score: Any,
    routed_scale: Any,
) -> Selection:
    """The options of a router over logits (..., E)."""
    experts = x.shape[-1]
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(
            f"[{op}] router_logits: expected 1 to {MOST_EXPERTS} experts in the last dimension, got shape "
            f"{tuple(x.shape)}."
        )
    top_k = check.integer(op, "top_k", top_k, at_least=1, at_most=min(experts, MOST_CHOICES))
    check.choice(op, "scoring", scoring, SCORINGS)
    check.choice(op, "order", order, ORDERS)
    check.choice(op, "group_score", group_score, GROUP_SCORES)
    renormalize = check.flag(op, "renormalize", renormalize)
    if order == "topk_then_softmax" and scoring != "softmax":
        raise ValueError(
            f"[{op}] order: expected 'softmax_then_topk' with scoring={scoring!r}, got {order!r}. "
            "Scores that do not depend on each other are the same in any order."
        )
    if order == "topk_then_softmax" and not renormalize:
        raise ValueError(
            f"[{op}] renormalize: expected True with order={order!r}, got False. "
            "A softmax over the chosen logits sums to 1."
        )
    n_group = check.integer(op, "n_group", n_group, at_least=1, at_most=experts)
    if experts % n_group != 0:
        raise ValueError(
            f"[{op}] n_group: expected a divisor of {experts}, the number of experts, got {n_group}."
        )
    topk_group = n_group if topk_group is None else topk_group
    topk_group = check.integer(op, "topk_group", topk_group, at_least=1, at_most=n_group)
    open_ = experts // n_group * topk_group
    if top_k > open_:
        raise ValueError(
            f"[{op}] top_k: expected at most {open_}, the experts of {topk_group} of {n_group} groups, got {top_k}. "
            "Raise topk_group."
        )
    scale = check.number(op, "routed_scale", routed_scale, above=0)
    return Selection(top_k, scoring, order, renormalize, n_group, topk_group, group_score, scale)


def check_bias(op: str, bias: Any, x: Tensor) -> Tensor | None:
    if bias is None:
        return None
    check.tensor(op, "bias", bias)
    found: Tensor = check.alike(op, "bias", bias, arrays.FLOATS, (x.shape[-1],), "router_logits", x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return found.detach().to(wide).contiguous()


def check_mask(op: str, mask: Any, x: Tensor) -> Tensor | None:
    """A mask over the tokens of logits (..., E), as bool or uint8, flat."""
    if mask is None:
        return None
    check.tensor(op, "token_mask", mask)
    check.alike(op, "token_mask", mask, MASKS, tuple(x.shape[:-1]), "router_logits", x)
    mask = mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0
    found: Tensor = mask.reshape(-1).contiguous()
    return found
