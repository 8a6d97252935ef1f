# SPDX-License-Identifier: Apache-2.0
"""Batches in which ids repeat: their gradients made one per row, and rows of a matrix updated by them."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...core.rules import RowOptimizer
from ...front import arrays, check, native
from ...front.impl import Impl, choose
from ...reference.table import rows as _reference
from ...reference.table.results import MergedGradients
from .. import _words
from . import engine


def _check_batch(op: str, ids: Any, grads: Any) -> None:
    check.array(op, "ids", ids, arrays.INTEGERS, 1)
    check.array(op, "grads", grads, arrays.FLOATS, 2)
    check.same_place(op, "grads", grads, "ids", ids)
    if int(grads.shape[0]) != int(ids.shape[0]):
        raise ValueError(
            f"[{op}] grads: expected {int(ids.shape[0])} rows, one per id, got shape {tuple(grads.shape)}."
        )
    check.finite(op, grads=grads)


def _merge(ids: Any, grads: Any) -> MergedGradients:
    """The compiled loops, on checked arrays of the CPU."""
    core = native.core
    n, dim = map(int, grads.shape)
    whole = arrays.dense(ids, "int64")
    inverse, unique, counts = (arrays.empty(ids, (n,), "int64") for _ in range(3))
    found = core.table.number_ids(whole, inverse, unique, counts)
    sums = arrays.empty(grads, (found, dim), "float32")
    core.table.merge_rows(arrays.unit_stride(grads), inverse, sums)
    unique = unique[:found]
    if arrays.dtype(ids) == "int32":
        unique = unique.astype(np.int32) if isinstance(unique, np.ndarray) else unique.int()
    return MergedGradients(unique, sums, counts[:found], inverse)


@_words.documented_rows
def merge_duplicates(ids: Any, grads: Any, *, impl: Impl = "auto") -> MergedGradients:
    """Sum the gradients of equal ids: what goes in front of every sparse update.

    For the u-th distinct id, in the order of first occurrence: grads_u = sum of the rows i with ids_i = id_u, added in
    float32 in the order of the batch. The result is the same for any number of threads.

    Args:
        ids: (N,), int64 or int32; any values.
        grads: (N, D), float32, float16 or bfloat16 (float64: reference); rows of any stride.

    Returns:
        ``MergedGradients``: ids (U,), grads (U, D) float32, counts (U,) and inverse (N,) int64.

    Examples:
        >>> import numpy as np
        >>> merged = merge_duplicates(np.array([7, -2, 7]), np.array([[1.0], [2.0], [3.0]], np.float32))
        >>> merged.ids.tolist(), merged.grads.tolist(), merged.counts.tolist(), merged.inverse.tolist()
        ([7, -2], [[4.0], [2.0]], [2, 1], [0, 1, 0])

    Reference:
        Monolith, Liu et al. 2022, arXiv:2209.07663 (BatchOptimize with deduplication).
    """
    op = "merge_duplicates"
    _check_batch(op, ids, grads)
    if choose(op, impl, "grads", grads, engine.loops(arrays.dtype(grads))) == "reference":
        return _reference.merge_duplicates(ids, grads)
    return _merge(ids, grads)


@_words.documented_rows
def sparse_dedup_optimize(
    weight: Any,
    ids: Any,
    grads: Any,
    state: dict[str, Any],
    optimizer: RowOptimizer,
    *,
    dedup: bool = True,
    rounding_seed: int | None = None,
    impl: Impl = "auto",
) -> MergedGradients:
    """Update the rows of a matrix that a batch touched, in place: merge duplicate ids, then one step per row.

    With ``dedup`` the gradients of equal ids are summed first, as in ``merge_duplicates``, and each row moves once.
    Without, each occurrence is a step of its own, in the order of the batch, which is another result for every rule but
    SGD without decay. Rows no id names do not change. The rest of Monolith's step, admission and time stamps, belongs
    to the tables.

    Args:
        weight: (V, D), float32, float16 or bfloat16 (float64: reference), written in place.
        ids: (N,), int64 or int32: rows of weight, 0 to V - 1.
        grads: (N, D), float32, float16 or bfloat16 (float64 too for float64 weights).
        state: the optimizer's, ``optimizer.init_state(V, D, like=weight)`` to begin with; written in place.
        optimizer: ``SGD``, ``RowwiseAdagrad``, ``Adagrad``, ``Adam``, ``FTRL`` or ``GroupAdagrad``.
        dedup: Default True.
        rounding_seed: 0 to 2^64 - 1, another one each step: float16 and bfloat16 weights round at random, without bias.
            Needed where ``optimizer.stochastic_rounding``; None otherwise rounds to nearest even.

    Returns:
        ``MergedGradients``: the rows touched and what moved them (without ``dedup``: the batch, each row counted once).

    Raises:
        ValueError: shapes or devices do not fit, an array cannot be written, an id or a number is out of range, or the
            state is without what the optimizer keeps; with HOTLOOP_CHECK=1 NaN or infinity in grads.

    Examples:
        >>> import numpy as np
        >>> from hotloop.table import Adagrad
        >>> w, rule = np.zeros((4, 1), np.float32), Adagrad(lr=1.0)
        >>> state = rule.init_state(4, 1)
        >>> done = sparse_dedup_optimize(w, np.array([2, 2]), np.ones((2, 1), np.float32), state, rule)
        >>> w.ravel().tolist(), done.counts.tolist()
        ([0.0, 0.0, -1.0, 0.0], [2])

    Reference:
        Monolith, Liu et al. 2022, arXiv:2209.07663 (BatchOptimize).
    """
    op = "sparse_dedup_optimize"
    rule = _check_optimizer(op, optimizer)
    check.array(op, "weight", weight, arrays.FLOATS, 2)
    check.writable(op, "weight", weight)
    _check_batch(op, ids, grads)
    check.same_place(op, "ids", ids, "weight", weight)
    rows, dim = map(int, weight.shape)
    if int(grads.shape[1]) != dim:
        raise ValueError(
            f"[{op}] grads: expected {dim} columns like weight, got shape {tuple(grads.shape)}."
        )
    if arrays.dtype(grads) == "float64" and arrays.dtype(weight) != "float64":
        raise TypeError(
            f"[{op}] grads: expected dtype float32, float16, bfloat16 for weight {arrays.dtype(weight)}, "
            "got float64. Convert it first."
        )
    _check_ids(op, ids, rows)
    columns = _check_state(op, state, rule, weight)
    engine.check_seed(op, rounding_seed)
    if rule.stochastic_rounding and rounding_seed is None:
        raise ValueError(
            f"[{op}] rounding_seed: expected an integer, got None. The optimizer rounds at random: pass another one "
            "each step."
        )
    loops = engine.loops(arrays.dtype(weight), arrays.dtype(grads))
    if choose(op, impl, "weight", weight, loops) == "reference":
        return _reference.sparse_dedup_optimize(
            weight, ids, grads, columns, rule, dedup=dedup, rounding_seed=rounding_seed
        )
    if dedup:
        merged = _merge(ids, grads)
    else:
        n = int(ids.shape[0])
        merged = MergedGradients(
            ids,
            arrays.dense(grads, "float32"),
            arrays.from_numpy(np.ones(n, np.int64), ids),
            arrays.from_numpy(np.arange(n), ids),
        )
    engine.update(
        rule,
        weight,
        merged.grads,
        columns,
        rows=arrays.dense(merged.ids, "int64"),
        distinct=bool(dedup),
        rounding_seed=rounding_seed,
    )
    return merged


def _check_optimizer(op: str, optimizer: Any) -> RowOptimizer:
    if not isinstance(optimizer, RowOptimizer) or type(optimizer) is RowOptimizer:
        raise TypeError(
            f"[{op}] optimizer: expected a row optimizer such as hotloop.table.Adagrad(), "
            f"got {type(optimizer).__name__}."
        )
    return optimizer


def _check_ids(op: str, ids: Any, rows: int) -> None:
    if int(ids.shape[0]) == 0:
        return
    for x in (int(ids.min()), int(ids.max())):
        if not 0 <= x < rows:
            raise ValueError(
                f"[{op}] ids: expected 0 to {rows - 1}, the rows of weight, got {x}. "
                "Use a table for ids without a bound."
            )


def _check_state(op: str, state: Any, rule: RowOptimizer, weight: Any) -> dict[str, Any]:
    names = list(rule.state_layout(int(weight.shape[1])))
    if not isinstance(state, dict) or set(state) != set(names):
        got = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"[{op}] state: expected a dict of {names}, got {got}. Use optimizer.init_state(rows, dim, like=weight)."
        )
    for name in names:
        engine.check_state(
            op, f"state[{name!r}]", state[name], weight, scalar=name in rule._scalars()
        )
    return {name: state[name] for name in names}
