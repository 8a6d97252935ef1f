# SPDX-License-Identifier: Apache-2.0
"""Per-token statistics and cross-entropy of an lm_head, with a bounded part of the logits in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..front import check
from ..front.impl import Impl, choose
from ..front.keywords import known
from ..reference import logprob as reference
from . import _arguments, _from_logits, _ops, _statistics
from ._call import LmHeadCall, LogitsCall
from ._statistics import LogprobStatistics

IGNORE_INDEX = -100
Reduction = check.REDUCTIONS
HINTS = {
    "shift": "Pass shift_labels=True for labels as Hugging Face stores them.",
    "target": "Pass it as labels.",
    "targets": "Pass it as labels.",
    "lse_square_scale": "Pass it as z_loss.",
    "logit_softcapping": "Pass it as softcap.",
    "lin_weight": "Pass it as weight.",
    "input": "Pass it as hidden.",
}
"""What other libraries call the arguments of lm_head ops (CCE, Liger, torch)."""


@known(HINTS)
@_arguments.described
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    statistics: tuple[str, ...] = (),
    cu_seqlens: Tensor | None = None,
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> LogprobStatistics:
    """Log-probability of each label under an lm_head, and what else a row of logits can tell.

    u = hidden @ weight.T + bias;  z = softcap * tanh(logit_scale * u / softcap) / temperature (without the
    tanh if softcap is None);  logps = z[label] - log sum exp z. Logits exist as tiles. The result is
    differentiable in every statistic but the argmax hit: backward takes the gradient of each per token.

    Rows whose label is ``ignore_index`` never reach the matrix product; their statistics are 0.

    Args:
        labels: token each row is asked about, shape (...), int64 or int32. Labels of Hugging Face are not shifted: see
            ``shift_labels``.
        temperature: > 0 (1e-18 to 1e18). Default 1.
        cu_seqlens: offsets (B + 1,) of ragged sequences packed into (N, D) hidden states; every statistic is
            then summed over its sequence, shape (B,), and argmax_hit counts. Default None.

    Returns:
        ``LogprobStatistics`` with ``logps`` of shape (...) and the requested fields, float32 (float64 for
        float64 input); the others None.

    Note:
        Matrix products run in the dtype given; sums in float32 (float64 for float64). Each row of d weight is
        one product, accumulated in float32 and rounded once. Logits take at most HOTLOOP_WORKSPACE_MB between
        forward and backward.

    Examples:
        >>> import torch
        >>> h, w = torch.zeros(3, 4), torch.zeros(5, 4)
        >>> out = linear_logprob(h, w, torch.tensor([0, 4, -100]), statistics=("entropy",))
        >>> [round(float(x), 4) for x in out.logps]
        [-1.6094, -1.6094, 0.0]

    Reference:
        Definition; the tiling follows from the online softmax of Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    op = "linear_logprob"
    wanted = _arguments.wanted_statistics(op, statistics)
    offsets = None
    if cu_seqlens is not None:
        if check.tensor(op, "hidden", hidden).ndim != 2:
            raise ValueError(
                f"[{op}] cu_seqlens: expected hidden of shape (tokens, width) beside it, got {tuple(hidden.shape)}. "
                "Pack the sequences first."
            )
        tokens = check.tensor(op, "hidden", hidden).shape[0]
        offsets = _arguments.cu_seqlens(op, cu_seqlens, tokens, hidden.device)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels, offsets)
    logit = _arguments.logit_map(op, temperature, logit_scale, softcap)
    call = _arguments.lm_head_call(op, hidden, weight, labels, bias, logit, ignore_index, impl)
    rows = _rows(op, call, wanted)
    if offsets is None:
        shape = hidden.shape[:-1]
        return LogprobStatistics(*(None if r is None else r.reshape(shape) for r in rows))  # type: ignore[arg-type]
    sums = (
        None
        if r is None
        else _statistics.sequence_sums(r.long() if r.dtype == torch.bool else r, offsets)
        for r in rows
    )
    return LogprobStatistics(*sums)  # type: ignore[arg-type]


def _rows(op: str, call: LmHeadCall, wanted: frozenset[str]) -> tuple[Tensor | None, ...]:
    """The five statistics and the argmax hit, each [N] or None."""
    if call.impl == "reference":
        return _statistics.selected(reference.head_statistics(*call[:5], *call.logit), wanted)
    if torch.compiler.is_compiling():
        packed, hit = torch.ops.hotloop.linear_logprob(*call[:5], *call.logit.numbers(), call.impl)
        return _statistics.selected(_named(packed, hit), wanted)
    check.untransformed(op, *call[:3])
    return _ops.LinearLogprob.apply(*call[:3], call[3:], wanted, torch.is_grad_enabled())


def _named(packed: Tensor, hit: Tensor) -> dict[str, Tensor]:
    return {**dict(zip(_statistics.FIELDS, packed.unbind(0))), "argmax_hit": hit}


@known(HINTS)
@_arguments.described
def token_logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    statistics: tuple[str, ...] = (),
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> LogprobStatistics:
    """The statistics of ``linear_logprob`` from logits that exist already.

    One pass over the logits forward, one backward; no copy in float32, no softmax in memory.

    Args:
        logits: shape (..., V), float32, float64, float16 or bfloat16. Differentiable.
        labels: token each row is asked about, shape (...), int64 or int32. Labels of Hugging Face are not shifted: see
            ``shift_labels``.
        temperature: > 0 (1e-18 to 1e18). Default 1.
        ignore_index: label of tokens that do not count; their statistics and gradients are 0. Default -100.

    Returns:
        ``LogprobStatistics``, each field of shape (...).

    Examples:
        >>> import torch
        >>> out = token_logprob(torch.zeros(1, 4), torch.tensor([2]), statistics=("sum_p2",))
        >>> round(float(out.logps), 4), float(out.sum_p2)
        (-1.3863, 0.25)

    Reference:
        Definition; one pass by the online softmax of Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    op = "token_logprob"
    logits = check.float_tensor(op, "logits", logits)
    if logits.ndim < 1 or logits.shape[-1] == 0:
        raise ValueError(
            f"[{op}] logits: expected shape (..., vocabulary), got {tuple(logits.shape)}."
        )
    logit = _arguments.logit_map(op, temperature, logit_scale, softcap)
    wanted = _arguments.wanted_statistics(op, statistics)
    shape = logits.shape[:-1]
    flat = _arguments.rows_of(logits)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    flat_labels = _arguments.labels(
        op, labels, shape, flat.shape[1], ignore_index, "logits", flat.device
    )
    check.finite(op, logits=logits)
    chosen = choose(op, impl, "logits", logits, _arguments.CANDIDATES)
    call = LogitsCall(flat, flat_labels, ignore_index, logit, chosen)
    rows: tuple[Tensor | None, ...]
    if chosen == "reference":
        found = reference.logit_statistics(flat, flat_labels, ignore_index, *logit)
        rows = _statistics.selected(found, wanted)
    elif torch.compiler.is_compiling():
        packed, hit = torch.ops.hotloop.token_logprob(*call[:3], *logit.numbers(), chosen)
        rows = _statistics.selected(_named(packed, hit), wanted)
    else:
        check.untransformed(op, flat)
        rows = _from_logits.TokenLogprob.apply(*call[:2], call[2:], wanted)
    return LogprobStatistics(*(None if r is None else r.reshape(shape) for r in rows))  # type: ignore[arg-type]


@known(HINTS)
@_arguments.described
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    shift_labels: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Cross-entropy of an lm_head, with a bounded part of the logits in memory.

    loss = (1 - s) * (-logp) + s * (lse - mean(z)) + z_loss * lse^2, s = label_smoothing, over tokens whose
    label is not ``ignore_index``; "mean" divides by their number. Same values as
    ``torch.nn.functional.cross_entropy(hidden @ weight.T, labels, ...)`` with z_loss = 0.

    Logits that fit the workspace (HOTLOOP_WORKSPACE_MB, default 64 MiB) wait there for backward: three matrix
    products instead of four. Those beyond it are computed again.

    Args:
        labels: token each row is asked about, shape (...), int64 or int32. Labels of Hugging Face are not shifted: see
            ``shift_labels``.
        label_smoothing: in [0, 1). Default 0.
        z_loss: weight of lse^2, >= 0 (PaLM: 1e-4). Default 0.

    Returns:
        Scalar, or shape (...) for "none" with 0 at ignored tokens; float32 (float64 for float64 input).

    Examples:
        >>> import torch
        >>> h, w = torch.zeros(3, 4), torch.zeros(5, 4)
        >>> round(float(linear_cross_entropy(h, w, torch.tensor([0, 4, -100]))), 4)
        1.6094

    Reference:
        Label smoothing: Szegedy et al. 2016, arXiv:1512.00567. z-loss: Chowdhery et al. 2022, arXiv:2204.02311.
    """
    op = "linear_cross_entropy"
    check.choice(op, "reduction", reduction, check.REDUCTIONS)
    check.number(op, "label_smoothing", label_smoothing, at_least=0, below=1)
    check.number(op, "z_loss", z_loss, at_least=0)
    logit = _arguments.logit_map(op, 1.0, logit_scale, softcap)
    labels = _arguments.shifted(op, labels, ignore_index, shift_labels)
    call = _arguments.lm_head_call(op, hidden, weight, labels, bias, logit, ignore_index, impl)
    options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
    options |= {"ignore_index": ignore_index, "reduction": reduction}
    fused = reduction != "none" and call.impl != "reference" and torch.is_grad_enabled()
    if fused and not torch.compiler.is_compiling() and _differentiable(*call[:3]):
        check.untransformed(op, *call[:3])
        loss: Tensor = _ops.CrossEntropy.apply(*call[:3], call[3:], options)
        return loss
    used = {"lse": label_smoothing or z_loss, "mean_logit": label_smoothing}
    rows = _rows(op, call, frozenset(name for name in used if used[name]))
    named = {name: row for name, row in zip(_statistics.FIELDS, rows) if row is not None}
    losses = reference.cross_entropy(named, call.labels, **options)
    return losses.reshape(hidden.shape[:-1]) if reduction == "none" else losses


def _differentiable(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    bias_too = bias is not None and bias.requires_grad
    return bias_too or hidden.requires_grad or weight.requires_grad
