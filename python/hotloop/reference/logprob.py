# SPDX-License-Identifier: Apache-2.0
"""Per-token statistics of an lm_head in plain torch. Arguments as in ``hotloop.logprob``."""

from __future__ import annotations

from ..front.needs import torch_for

torch_for("reference.logprob")

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax


def logits_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Scaled logits in float32 (float64 for float64 input)."""
    u = linear(hidden, weight).to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    if bias is not None:
        u = u + bias.to(u.dtype)
    return map_logits(u, temperature, logit_scale, softcap)


def map_logits(
    u: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    u = u if u.dtype == torch.float64 else u.float()
    u = u * logit_scale
    if softcap:
        u = softcap * torch.tanh(u / softcap)
    return u / temperature


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """``statistics`` of an lm_head."""
    # d weight must not meet a NaN of a masked row.
    hidden = torch.where((labels != ignore_index).unsqueeze(1), hidden, 0.0)
    z = logits_of(hidden, weight, bias, temperature, logit_scale, softcap)
    return statistics(z, labels, ignore_index)


def logit_statistics(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """``statistics`` of logits that are not yet capped and divided by the temperature."""
    # Before the cap, whose slope at a NaN of a masked row is NaN.
    logits = torch.where((labels != ignore_index).unsqueeze(1), logits, 0.0)
    z = map_logits(logits, temperature, logit_scale, softcap)
    return statistics(z, labels, ignore_index)


def statistics(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> dict[str, Tensor]:
    """All statistics of ``LogprobStatistics`` from logits [N, V]; masked rows give 0 and False."""
    valid = labels != ignore_index
    safe = torch.where(valid, labels, 0)
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    # Before everything else: behind it, 0 times the gradient of a NaN would be NaN.
    logits = torch.where(valid.unsqueeze(-1), logits, zero)
    logp = log_softmax(logits, dim=-1)
    p = logp.exp()
    rows = {
        "logps": logp.gather(-1, safe.unsqueeze(-1)).squeeze(-1),
        "entropy": -torch.where(p == 0, zero, p * torch.where(p == 0, zero, logp)).sum(-1),
        "lse": torch.logsumexp(logits, dim=-1),
        "sum_p2": (p * p).sum(-1),
        "mean_logit": logits.mean(-1),
    }
    out = {name: torch.where(valid, row, zero) for name, row in rows.items()}
    out["argmax_hit"] = valid & (logits.argmax(-1) == labels)
    return out


def cross_entropy(
    rows: dict[str, Tensor],
    labels: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    """Cross-entropy from the statistics: (1 - s)(-logp) + s (lse - mean logit) + z_loss lse^2."""
    losses = -rows["logps"]
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (
            rows["lse"] - rows["mean_logit"]
        )
    if z_loss:
        losses = losses + z_loss * rows["lse"] ** 2
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (labels != ignore_index).sum()


def divergences(student: Tensor, teacher: Tensor, beta: float = 0.5) -> dict[str, Tensor]:
    """Per-row KL(p||q), KL(q||p), generalised JSD of student q and teacher p, and both entropies."""
    log_q, log_p = log_softmax(student, dim=-1), log_softmax(teacher, dim=-1)
    p, q = log_p.exp(), log_q.exp()

    def expect(weight: Tensor, value: Tensor) -> Tensor:
        silent = weight == 0  # and not weight > 0, which would silence NaN too
        return torch.where(silent, 0.0, weight * torch.where(silent, 0.0, value)).sum(-1)

    out = {
        "forward_kl": expect(p, log_p - log_q),
        "reverse_kl": expect(q, log_q - log_p),
        "student_entropy": -expect(q, log_q),
        "teacher_entropy": -expect(p, log_p),
    }
    if 0 < beta < 1:
        log_m = torch.logaddexp(
            log_p + torch.log(torch.tensor(beta, dtype=p.dtype, device=p.device)),
            log_q + torch.log1p(torch.tensor(-beta, dtype=p.dtype, device=p.device)),
        )
        out["jsd"] = beta * expect(p, log_p - log_m) + (1 - beta) * expect(q, log_q - log_m)
    else:
        out["jsd"] = out["forward_kl"] if beta == 0 else out["reverse_kl"]
    return out


def mi_alpha_bound(scores: Tensor, log_baseline: Tensor, *, alpha: float = 0.7) -> Tensor:
    f = scores if scores.dtype == torch.float64 else scores.float()
    q = log_baseline.to(f.dtype)
    n = f.shape[0]
    # n_ij without column j: drop it before the log-sum-exp, since subtracting it from the whole sum cancels
    # where column j dominates the row.
    eye = torch.eye(n, dtype=torch.bool, device=f.device)
    held_out = f.unsqueeze(1).expand(n, n, n).masked_fill(eye.unsqueeze(0), -torch.inf)
    mean_out = torch.logsumexp(held_out, dim=2) - torch.log(
        torch.tensor(float(n - 1), dtype=f.dtype, device=f.device)
    )
    weight = torch.tensor(float(alpha), dtype=f.dtype, device=f.device)
    a = torch.logaddexp(mean_out + torch.log(weight), (q + torch.log1p(-weight)).unsqueeze(1))
    diagonal = f.diagonal()
    joint = (diagonal.unsqueeze(1) - a).masked_select(~eye).mean()
    marginal = torch.exp(f - a.diagonal().unsqueeze(1)).masked_select(~eye).mean()
    return 1 + joint - marginal
