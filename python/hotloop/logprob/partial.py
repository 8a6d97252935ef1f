# SPDX-License-Identifier: Apache-2.0
"""Statistics of a part of the vocabulary that merge into those of the whole.

For an lm_head split over devices: each computes its part, the parts travel (seven numbers per token), and every
device merges them in the order of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..front import check
from ..front.impl import Impl, choose
from . import _arguments, _ops, _statistics
from ._call import LmHeadCall
from ._cpu import STATISTICS
from ._statistics import LogprobStatistics
from .lm_head import IGNORE_INDEX


class LogprobPartial(NamedTuple):
    """Running sums of a part of the vocabulary: all a merge needs."""

    sums: Tensor
    """Shape (6, N): max, sum e^(z - max), sum (z - max) e^(z - max), sum e^2(z - max), sum z, label
    logit (NaN: elsewhere)."""
    argmax: Tensor
    """Shape (N,), int64: index of the first largest logit in the whole vocabulary."""
    columns: int
    """Width of the part."""


def linear_logprob_partial(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    first_column: int,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    impl: Impl = "auto",
) -> LogprobPartial:
    """Statistics of the columns [first_column, first_column + rows of ``weight``) of a larger lm_head. No gradient.

    Args:
        hidden: shape (N, D).
        weight: rows of the lm_head on this device, shape (V_part, D).
        labels: shape (N,), indices into the whole vocabulary; an index outside this part belongs to another part.
        first_column: index of the first row of ``weight`` in the whole lm_head, >= 0.
        bias: the part's bias, shape (V_part,). Default None.
        temperature: > 0 (1e-18 to 1e18). Default 1.
        logit_scale: as in ``linear_logprob``. Default 1.
        softcap: as in ``linear_logprob``. Default None.
        impl: "auto", "cpu" or "triton". Default "auto".

    Returns:
        ``LogprobPartial``, to be merged by ``merge_logprob_partials``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype, device or range.

    Examples:
        >>> import torch
        >>> h, w, y = torch.zeros(1, 2), torch.zeros(6, 2), torch.tensor([5])
        >>> parts = [linear_logprob_partial(h, w[i : i + 3], y, first_column=i) for i in (0, 3)]
        >>> round(float(merge_logprob_partials(parts, y).logps), 4)
        -1.7918

    Reference:
        Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    op = "linear_logprob_partial"
    if isinstance(first_column, bool) or not isinstance(first_column, int) or first_column < 0:
        raise ValueError(f"[{op}] first_column: expected an int >= 0, got {first_column!r}.")
    logit = _arguments.logit_map(op, temperature, logit_scale, softcap)
    flat, weight, bias = _arguments.lm_head(op, hidden, weight, bias)
    check.tensor(op, "labels", labels)
    if labels.shape != (flat.shape[0],):
        raise ValueError(
            f"[{op}] labels: expected shape ({flat.shape[0]},), one per row of hidden, got {tuple(labels.shape)}."
        )
    chosen = choose(op, impl, "hidden", hidden, _arguments.CANDIDATES)
    if chosen == "reference":
        raise NotImplementedError(
            f"[{op}] impl: expected 'cpu' or 'triton', got 'reference'. Use linear_logprob."
        )
    # No row is masked here: every device must merge the same rows.
    call = LmHeadCall(
        flat.detach(), weight.detach(), bias, labels.to(torch.int64), torch.iinfo(torch.int64).min, logit, chosen,
        first_column,
    )  # fmt: skip
    with torch.no_grad():
        sums, largest, _ = _ops.forward(call, True, True, keep=False)
    assert largest is not None
    return LogprobPartial(sums, largest, weight.shape[0])


def merge_logprob_partials(
    partials: Sequence[LogprobPartial], labels: Tensor, *, ignore_index: int = IGNORE_INDEX
) -> LogprobStatistics:
    """All statistics of the whole vocabulary from its parts, given in the order of the vocabulary.

    Args:
        partials: at least one part; together they cover the vocabulary once.
        labels: shape (N,), as given to the parts.
        ignore_index: label of tokens that do not count: their statistics are 0. Default -100.

    Returns:
        ``LogprobStatistics`` with every field, shape (N,).

    Raises:
        ValueError: no parts, or parts of different tokens.

    Examples:
        See ``linear_logprob_partial``.

    Reference:
        Milakov and Gimelshein 2018, arXiv:1805.02867.
    """
    op = "merge_logprob_partials"
    if not partials:
        raise ValueError(f"[{op}] partials: expected at least one part, got none.")
    check.tensor(op, "labels", labels)
    for at, part in enumerate(partials):
        check.float_tensor(op, f"partials[{at}].sums", part.sums)
        check.tensor(op, f"partials[{at}].argmax", part.argmax)
    shape = partials[0].sums.shape
    if any(part.sums.shape != shape for part in partials) or shape != (
        len(STATISTICS),
        labels.shape[0],
    ):
        raise ValueError(
            f"[{op}] partials: expected parts over the {labels.shape[0]} tokens of labels, got "
            f"{[tuple(part.sums.shape) for part in partials]}."
        )
    maximum = torch.stack([part.sums[0] for part in partials])
    whole, owner = maximum.max(0)
    shift = torch.where(torch.isinf(whole) & (whole < 0), 0.0, whole)
    scale = torch.exp(maximum - shift)
    stacked = torch.stack([part.sums for part in partials])  # [parts, 6, N]
    label_z = torch.where(torch.isnan(stacked[:, 5]), 0.0, stacked[:, 5]).sum(0)
    found = (~torch.isnan(stacked[:, 5])).any(0)
    sums = torch.stack(
        (
            whole,
            (stacked[:, 1] * scale).sum(0),
            torch.where(
                stacked[:, 1] == 0, 0.0, scale * (stacked[:, 2] + (maximum - shift) * stacked[:, 1])
            ).sum(0),
            (stacked[:, 3] * scale * scale).sum(0),
            stacked[:, 4].sum(0),
            torch.where(found, label_z, torch.nan),
        )
    )
    vocabulary = sum(part.columns for part in partials)
    # torch.max gives the first of equal maxima, so the first largest logit of all wins.
    largest = (
        torch.stack([part.argmax for part in partials]).gather(0, owner.unsqueeze(0)).squeeze(0)
    )
    valid = labels != ignore_index
    rows = torch.where(valid, _statistics.finish(sums, vocabulary), 0.0)
    logps, entropy, lse, sum_p2, mean_logit = rows.unbind(0)
    return LogprobStatistics(logps, entropy, lse, sum_p2, mean_logit, valid & (largest == labels))
