# SPDX-License-Identifier: Apache-2.0
"""From running sums to the requested statistics, and from their gradients to row coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

STATISTICS = ("entropy", "lse", "sum_p2", "mean_logit", "argmax_hit")
"""What ``linear_logprob`` returns beside the log-probability, on request."""


class LogprobStatistics(NamedTuple):
    """Per-token statistics of a distribution p over the vocabulary, with logits z; None where not requested."""

    logps: Tensor
    """log p[label] = z[label] - lse, nats."""
    entropy: Tensor | None = None
    """-sum p log p, nats."""
    lse: Tensor | None = None
    """log sum exp z."""
    sum_p2: Tensor | None = None
    """sum p^2, the probability that two draws agree."""
    mean_logit: Tensor | None = None
    """mean of z over the vocabulary."""
    argmax_hit: Tensor | None = None
    """True where the label is the first largest logit. No gradient."""


FIELDS = ("logps", "entropy", "lse", "sum_p2", "mean_logit")
"""The differentiable ones, in the order of the rows of a [5, N] matrix."""


def outputs(
    ctx: Any, statistics: Tensor, hit: Tensor | None, wanted: frozenset[str]
) -> tuple[Tensor | None, ...]:
    """What an autograd function returns of the statistics [5, N]: those wanted, and the hit, without gradient."""
    ctx.set_materialize_grads(False)
    if hit is not None:
        ctx.mark_non_differentiable(hit)
    rows = zip(FIELDS, statistics.unbind(0))
    return (*(r.clone() if name == "logps" or name in wanted else None for name, r in rows), hit)


def selected(rows: Mapping[str, Tensor], wanted: frozenset[str]) -> tuple[Tensor | None, ...]:
    """The five statistics and the argmax hit: None for what was not asked for."""
    return tuple(
        rows[name] if name == "logps" or name in wanted else None
        for name in (*FIELDS, "argmax_hit")
    )


def fake(like: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The shapes of what the operators return for the rows of ``like``."""
    n, wide = like.shape[0], torch.float64 if dtype == torch.float64 else torch.float32
    return like.new_empty((5, n), dtype=wide), like.new_empty((n,), dtype=torch.bool)


def finish(sums: Tensor, vocabulary: int) -> Tensor:
    """Turn the running sums [6, N] into [5, N]: logps, entropy, lse, sum_p2, mean_logit."""
    maximum, sum_exp, sum_z_exp, sum_exp2, sum_z, label_z = sums.unbind(0)
    log_sum_exp = torch.log(sum_exp)
    lse = maximum + log_sum_exp
    return torch.stack(
        (
            label_z - lse,
            log_sum_exp - sum_z_exp / sum_exp,
            lse,
            sum_exp2 / (sum_exp * sum_exp),
            sum_z / vocabulary,
        )
    )


def coefficients(statistics: Tensor, grads: list[Tensor | None], vocabulary: int) -> Tensor:
    """Row coefficients [6, N] (lse, a, b, c, d, e of ``RowGradient``) from the gradients of the five statistics."""
    _, entropy, lse, sum_p2, _ = statistics.unbind(0)
    zero = torch.zeros_like(lse)
    g_logp, g_entropy, g_lse, g_sum_p2, g_mean = (
        zero if g is None else g.to(statistics.dtype) for g in grads
    )
    a = g_lse - g_logp
    b = c = zero
    if grads[1] is not None:
        a = a + g_entropy * (lse - entropy)
        b = -g_entropy
    if grads[3] is not None:
        a = a - 2 * g_sum_p2 * sum_p2
        c = 2 * g_sum_p2
    d = zero if grads[4] is None else g_mean / vocabulary
    return torch.stack((lse, a, b, c, d, g_logp))


def sequence_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum ``values`` [N] over the ranges cu_seqlens[i] to cu_seqlens[i + 1]; an empty range gives 0."""
    lengths = cu_seqlens.diff()
    owner = torch.repeat_interleave(
        torch.arange(lengths.shape[0], device=values.device), lengths, output_size=values.shape[0]
    )
    out = torch.zeros(lengths.shape[0], dtype=values.dtype, device=values.device)
    if (
        values.device.type == "cuda"
    ):  # where index_add is a race of atomic additions, and this sorts
        return out.index_put((owner,), values, accumulate=True)
    return out.index_add(0, owner, values)
