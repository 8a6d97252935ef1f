# SPDX-License-Identifier: Apache-2.0
"""Inputs, truths and roofs that the benches of language-model heads share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from hotloop.reference import logprob as reference
from torch import Tensor

from . import _roofs
from ._case import Cost, Inputs

IGNORE = -100
Masking = Literal["scattered", "padding"]

# Logits with a standard deviation of 2, and labels whose logit is raised by up to 12: many labels
# are likely, as for a trained model. That is what lets a rival that skips small gradients skip.
_LOGIT_STD, _MOST_RAISE = 2.0, 12.0
_TRUTH_ROWS = 512


def labels_of(
    generator: torch.Generator,
    batch: int,
    length: int,
    vocabulary: int,
    masked: float,
    how: Masking,
) -> Tensor:
    """Labels [B, T]. As many are masked for every seed, so shapes never change."""
    device = generator.device
    labels = torch.randint(vocabulary, (batch, length), generator=generator, device=device)
    if masked <= 0:
        return labels
    if how == "scattered":
        order = torch.randperm(batch * length, generator=generator, device=device)
        labels.view(-1)[order[: round(masked * batch * length)]] = IGNORE
        return labels
    # Lengths from half the mean to one and a half times it, evenly spread: the total is exact.
    mean = (1 - masked) * length
    spread = (
        torch.linspace(-0.5, 0.5, batch, device=device)
        if batch > 1
        else torch.zeros(1, device=device)
    )
    kept = (mean * (1 + spread)).round().long().clamp(1, length)
    kept = kept[torch.randperm(batch, generator=generator, device=device)]
    labels[torch.arange(length, device=device) >= kept.unsqueeze(1)] = IGNORE
    return labels


def head(
    generator: torch.Generator, labels: Tensor, width: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """hidden [*labels.shape, D] and weight [V, D] for these labels."""
    device = generator.device
    weight = torch.randn(vocabulary, width, generator=generator, device=device)
    weight *= _LOGIT_STD / math.sqrt(width)
    hidden = torch.randn(*labels.shape, width, generator=generator, device=device)
    size = weight.square().sum(1)[labels.clamp(min=0)]
    raised = torch.rand(labels.shape, generator=generator, device=device) * _MOST_RAISE / size
    hidden += raised.unsqueeze(-1) * weight[labels.clamp(min=0)]
    return hidden.to(dtype), weight.to(dtype)


def token_inputs(
    seed: int, n: int, width: int, vocabulary: int, dtype: str, device: str, masked: float
) -> Inputs:
    """hidden [N, D], weight [V, D], labels [N] and a gradient per token."""
    generator = torch.Generator(device).manual_seed(seed)
    labels = labels_of(generator, 1, n, vocabulary, masked, "scattered").view(-1)
    hidden, weight = head(generator, labels, width, vocabulary, getattr(torch, dtype))
    upstream = torch.rand(n, generator=generator, device=device) + 0.5
    upstream = torch.where(labels == IGNORE, 0.0, upstream / n)
    return Inputs(
        {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "labels": labels},
        ("hidden", "weight"),
        upstream,
    )


def wide(dtype: str) -> torch.dtype:
    """What the truth is computed in: float64 for float32, float32 for the 16-bit types."""
    return torch.float64 if dtype == "float32" else torch.float32


def truth_by_rows(
    rows_loss: Callable[[Tensor, Tensor, slice], Tensor],
    hidden: Tensor,
    weight: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """[values, d hidden, d weight] of a per-row op, some rows at a time so that logits fit.

    ``rows_loss(hidden rows, weight, rows)`` gives one value per row in the wide dtype.
    """
    w = weight.detach().to(_wide_of(hidden)).requires_grad_()
    flat = hidden.detach().reshape(-1, hidden.shape[-1])
    values, d_hidden = [], []
    d_weight = torch.zeros_like(w)
    for start in range(0, flat.shape[0], _TRUTH_ROWS):
        rows = slice(start, min(start + _TRUTH_ROWS, flat.shape[0]))
        h = flat[rows].to(w.dtype).requires_grad_()
        value = rows_loss(h, w, rows)
        dh, dw = torch.autograd.grad(value, [h, w], upstream[rows].to(value.dtype))
        values.append(value.detach())
        d_hidden.append(dh)
        d_weight += dw
    return [torch.cat(values), torch.cat(d_hidden).reshape(hidden.shape), d_weight]


def _wide_of(hidden: Tensor) -> torch.dtype:
    return wide(str(hidden.dtype).removeprefix("torch."))


def token_statistic(inputs: Inputs, name: str) -> Callable[[Tensor, Tensor, slice], Tensor]:
    """One statistic of the reference, for ``truth_by_rows``."""
    labels = inputs["labels"].reshape(-1)

    def value(h: Tensor, w: Tensor, rows: slice) -> Tensor:
        return reference.statistics(h @ w.T, labels[rows])[name]

    return value


def step(
    products: int, valid: int, size: tuple[int, ...], dtype: str, device: str
) -> dict[str, Any]:
    """What the ``Case`` of a head's forward and backward says of its size, (..., D, V): the cost is so many products
    over the tokens that count, the roof is one."""
    width, vocabulary = size[-2:]
    return {
        "mode": "fwd+bwd",
        "shape": size,
        "dtype": dtype,
        "device": device,
        "cost": Cost("flops", f"{2 * products}*n*d*v", {"n": valid, "d": width, "v": vocabulary}),
        "roof": _roofs.product(valid, width, vocabulary, dtype, device),
        "roof_amount": 2.0 * valid * width * vocabulary,
    }


def bare_products(inputs: Inputs, count: int = 4) -> None:
    """What no exact method avoids when logits are not kept: logits, again, d hidden, d weight."""
    hidden, weight = inputs["hidden"].detach(), inputs["weight"].detach()
    hidden = hidden.reshape(-1, hidden.shape[-1])[inputs["labels"].reshape(-1) != IGNORE]
    for _ in range(count - 2):
        logits = hidden @ weight.T
    torch.mm(logits, weight)
    torch.mm(logits.T, hidden)
