# SPDX-License-Identifier: Apache-2.0
"""Tokens to expert rows and back: ``permute`` copies, ``combine`` adds the weighted rows of every token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..front import check
from ..front import impl as _impl
from ..front.impl import Impl
from ..reference.moe import rows as reference
from . import _arguments as arguments
from . import _row_operator
from ._row_pass import Config
from .results import Dispatch

CANDIDATES = {"cuda": _impl.on_cuda, "cpu": _impl.on_cpu, "reference": _impl.everywhere}
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def permute(x: Tensor, dispatch: Dispatch, *, impl: Impl = "auto") -> Tensor:
    """The rows of tokens in the order of their experts.

    out[r] = x[slot_of_row[r] // k], and 0 for a row of nothing. The gradient of a token is the sum over its k rows, in
    the order of its slots, without atomics.

    Args:
        x: (T, D) float32, float64, float16 or bfloat16; rows may have any stride. Differentiable.
        dispatch: of T * k slots, from ``route`` or ``dispatch``.
        impl: "auto", "cpu", "cuda" or "reference".

    Returns:
        (R, D) in the dtype of ``x``, R = dispatch.slot_of_row.shape[0].

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device; a dispatch of other tokens; on the CPU, or
            with HOTLOOP_CHECK=1, numbers of a dispatch that are out of range or not inverse to each other.
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import torch
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> order = Dispatch(*map(torch.tensor, ([2, 0, 1, -1], [1, 2, 0, -1], [0, 1, 4], [1, 2])))
        >>> permute(x, order).tolist()
        [[2.0], [1.0], [1.0], [0.0]]

    Reference:
        Gale et al. 2022, arXiv:2211.15841.
    """
    op = "permute"
    arguments.matrix(op, "x", x)
    dispatch = arguments.dispatch_of(op, dispatch, "x", x)
    arguments.slots_per_token(op, dispatch, x.shape[0])
    check.finite(op, x=x)
    if _impl.choose(op, impl, "x", x, CANDIDATES) != "reference":
        return _row_operator.permuted(op, x, dispatch)
    return reference.permute(x, arguments.looked_at(op, dispatch))


def combine(
    expert_rows: Tensor,
    topk_weights: Tensor,
    dispatch: Dispatch,
    *,
    shared: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """The sum of every token's expert rows, each times its weight, and of a shared expert's row.

    out[t] = sum_j topk_weights[t, j] * expert_rows[row_of_slot[t * k + j]] + shared[t], added in this order in float32
    (float64 for float64 rows) and rounded once. A slot that goes nowhere adds 0 and its weight has gradient 0. One
    pass, gathers only: the same bits for any number of threads.

    Args:
        expert_rows: (R, D) float32, float64, float16 or bfloat16, what the experts made of permuted tokens; rows may
            have any stride. Differentiable.
        topk_weights: (T, k), a float dtype. Differentiable.
        dispatch: of these T * k slots and R rows, from ``route`` or ``dispatch``.
        shared: (T, D), added with weight 1. Differentiable. Default None.
        out_dtype: of the result. Default that of ``expert_rows``.
        impl: "auto", "cpu", "cuda" or "reference".

    Returns:
        (T, D).

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device, float64 beside a narrower dtype; a dispatch
            of other tokens; on the CPU, or with HOTLOOP_CHECK=1, numbers of a dispatch that are out of range or not
            inverse to each other.
        NotImplementedError: a forced ``impl`` that cannot run.

    Examples:
        >>> import torch
        >>> order = Dispatch(*map(torch.tensor, ([2, 0, 1], [1, 2, 0, -1], [0, 1, 3], [1, 2])))
        >>> rows = torch.tensor([[8.0], [2.0], [4.0]])
        >>> combine(rows, torch.tensor([[0.5, 0.25], [1.0, 9.0]]), order).tolist()
        [[2.0], [8.0]]

    Reference:
        Gale et al. 2022, arXiv:2211.15841.
    """
    op = "combine"
    arguments.matrix(op, "expert_rows", expert_rows)
    dispatch = arguments.weighted(op, expert_rows, "expert_rows", topk_weights, dispatch)
    if shared is not None:
        shape = (topk_weights.shape[0], expert_rows.shape[1])
        arguments.beside(op, "shared", shared, shape, "expert_rows", expert_rows)
    if out_dtype is not None and out_dtype not in DTYPES:
        raise TypeError(
            f"[{op}] out_dtype: expected a float dtype of torch, got {out_dtype!r}. Leave it out."
        )
    check.finite(op, expert_rows=expert_rows, topk_weights=topk_weights, shared=shared)
    if _impl.choose(op, impl, "expert_rows", expert_rows, CANDIDATES) != "reference":
        config = Config(
            op,
            "combine",
            (),
            out_dtype=out_dtype,
            slot_of_row=dispatch.slot_of_row,
            row_of_slot=dispatch.row_of_slot,
        )
        given = (None, None, None, None, expert_rows, topk_weights, shared, None, None, None)
        combined = _row_operator.run(config, given)[0]
        assert combined is not None
        return combined
    return reference.combine(
        expert_rows, topk_weights, arguments.looked_at(op, dispatch), shared=shared, out_dtype=out_dtype
    )  # fmt: skip
