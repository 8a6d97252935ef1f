# SPDX-License-Identifier: Apache-2.0
"""Mixtures of embeddings: experts weighed by a router (OmniBind), soft buckets of a pair of returns (DT4IER).

Both are composed of torch operators and run wherever torch does. They save passes over memory and flops; each function
says how many. torch.compile fuses the rest.
"""

from __future__ import annotations

from ..front.needs import torch_for

torch_for("table.routing")

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, normalize

from ..front import arrays, check
from . import _words


@_words.documented
def expert_space_routing(
    embeddings: Tensor, router_logits: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Mix a sample's embeddings in several spaces by its router, to length 1.

    a = sigmoid(router_logits); w = softmax(a / temperature) over the E spaces; z = s / |s| with s = sum_j w_j e_j, and
    e_j the mean over the C copies of a projector where there are copies. The published model uses temperature 1 for
    audio, image and point clouds, and 0.1 (softmax of 10 a) for text. As a lies in (0, 1), the largest weight is at
    most e^(1 / temperature) times the smallest. Copies are not averaged first: they are E C spaces with weights w / C,
    so that the embeddings are read once.

    Args:
        embeddings: e, (B, E, D) or (B, E, C, D), float32, float64, float16 or bfloat16; E, C and D >= 1.
            Differentiable.
        router_logits: what the router gives before its sigmoid, (B, E), a float dtype. Differentiable.
        temperature: > 0. Default 1.

    Returns:
        z, (B, D), the dtype of ``embeddings``. Weights and length are computed in float32 or better; the sum is that of
        torch.bmm at the dtype. A sum shorter than 1e-12 is divided by 1e-12.

    Raises:
        ValueError: shapes or devices do not fit, or temperature <= 0; with HOTLOOP_CHECK=1 a value that is not finite.

    Examples:
        >>> import torch
        >>> e = torch.tensor([[[3.0, 0.0], [0.0, 4.0]]])
        >>> expert_space_routing(e, torch.zeros(1, 2)).round(decimals=2)  # equal weights
        tensor([[0.6000, 0.8000]])

    Reference:
        Wang et al. 2024, arXiv:2407.11895; formula from the published inference code (omni_model/router.py,
        omni_space.py). The training losses are not part of this.
    """
    op = "expert_space_routing"
    e = check.float_tensor(op, "embeddings", embeddings)
    r = check.float_tensor(op, "router_logits", router_logits, ndim=2)
    temperature = check.number(op, "temperature", temperature, above=0)
    if e.ndim not in (3, 4) or 0 in e.shape[1:]:
        raise ValueError(
            f"[{op}] embeddings: expected shape (B, E, D) or (B, E, C, D) with at least one of E, C and D, got "
            f"{tuple(e.shape)}. Stack the spaces in dimension 1."
        )
    hint = "Pass one logit per space."
    check.shape(op, "router_logits", r, tuple(e.shape[:2]), "like embeddings", hint)
    check.same_place(op, "router_logits", r, "embeddings", e)
    check.finite(op, embeddings=e, router_logits=r)
    wide = torch.promote_types(torch.promote_types(e.dtype, r.dtype), torch.float32)
    w = (torch.sigmoid(r.to(wide)) / temperature).softmax(-1)
    if e.ndim == 4:
        copies = e.shape[2]
        w = (w / copies).unsqueeze(-1).expand(-1, -1, copies).flatten(1)
        e = e.flatten(1, 2)
    w = w.to(e.dtype)
    # One batched product reads e once and is half the time of the plain form, forward and backward. The compiler fuses
    # the plain form itself, and better: 2.1 against 5.2 ms for both (256 x 14 x 1536, float32, one core).
    if torch.compiler.is_compiling():
        s = (w.unsqueeze(-1) * e).sum(1, dtype=wide)
    else:
        s = torch.bmm(w.unsqueeze(1), e).squeeze(1)
    return normalize(s.to(wide), dim=-1).to(e.dtype)


@_words.documented
def multi_reward_embedding(
    returns_to_go: Tensor,
    w1: Tensor,
    w2: Tensor,
    anchors: Tensor,
    bucket_weight: Tensor,
    bucket_bias: Tensor,
    *,
    negative_slope: float = 0.01,
) -> Tensor:
    """Embed a pair of returns-to-go, immediate and retention, by soft buckets.

    h = leaky_relu(R w1); h = h + h w2; p = softmax(h) over the K buckets; E = sum_k p_k (a_k bucket_weight +
    bucket_bias). As p sums to 1 this is (p a) bucket_weight + bucket_bias, and so it is computed: two columns instead
    of D go through the product with p, 0.46 of the flops at K = 100, D = 128. The weighting of E by user features and
    the temperature net that the paper's code leaves unused are not part of this.

    Args:
        returns_to_go: R, (..., 2), float32, float64, float16 or bfloat16. Differentiable, as all that follow.
        w1: (2, K), K >= 1; the transpose of an nn.Linear's weight, as are the others.
        w2: (K, K), of the residual layer.
        anchors: a, the pair of returns that each bucket stands for, (K, 2); in the paper's code K = 100 and
            torch.arange(0, 1400, 7).reshape(100, 2).
        bucket_weight: (2, D); D = 128 there.
        bucket_bias: (D,).
        negative_slope: of the leaky ReLU, >= 0. Default 0.01, torch's.

    Returns:
        E, (..., D), the dtype of ``returns_to_go``, which all tensors share. Half types: the products with w1 and w2
        are torch's at the dtype, all that follows is computed in float32.

    Raises:
        TypeError: not a float tensor, or tensors of different dtypes.
        ValueError: shapes or devices do not fit, or a negative slope < 0; with HOTLOOP_CHECK=1 a value that is not
            finite.

    Examples:
        >>> import torch
        >>> a, identity = torch.tensor([[0.0, 7.0], [14.0, 21.0]]), torch.eye(2)
        >>> w1, w2 = torch.tensor([[-200.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2)
        >>> multi_reward_embedding(torch.tensor([[50.0, 60.0]]), w1, w2, a, identity, torch.ones(2))  # p = (0, 1)
        tensor([[15., 22.]])

    Reference:
        Liu et al. 2024, arXiv:2404.03637; formula from the published code (GPT_model_accuracy.py, RewardEmbedding).
    """
    op = "multi_reward_embedding"
    r = check.float_tensor(op, "returns_to_go", returns_to_go)
    if r.ndim < 1 or r.shape[-1] != 2:
        raise ValueError(
            f"[{op}] returns_to_go: expected shape (..., 2), got {tuple(r.shape)}. Pass pairs of returns."
        )
    slope = check.number(op, "negative_slope", negative_slope, at_least=0)
    k = check.float_tensor(op, "w1", w1, ndim=2).shape[1]
    d = check.float_tensor(op, "bucket_weight", bucket_weight, ndim=2).shape[1]
    for name, x, shape in (
        ("w1", w1, (2, max(k, 1))),
        ("w2", w2, (k, k)),
        ("anchors", anchors, (k, 2)),
        ("bucket_weight", bucket_weight, (2, d)),
        ("bucket_bias", bucket_bias, (d,)),
    ):
        check.array(op, name, check.tensor(op, name, x), (arrays.dtype(r),))
        check.shape(op, name, x, shape, hint="K comes from w1, D from bucket_weight.")
        check.same_place(op, name, x, "returns_to_go", r)
        check.finite(op, **{name: x})
    check.finite(op, returns_to_go=r)
    wide = torch.promote_types(r.dtype, torch.float32)
    rows = r.reshape(-1, 2)
    h = leaky_relu(rows @ w1, slope)
    p = torch.addmm(h, h, w2).softmax(-1, dtype=wide)
    e = torch.addmm(bucket_bias.to(wide), p @ anchors.to(wide), bucket_weight.to(wide))
    return e.to(r.dtype).reshape(*r.shape[:-1], d)
