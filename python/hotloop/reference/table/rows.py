# SPDX-License-Identifier: Apache-2.0
"""The row optimizers in NumPy, as their papers write them, computed in float64 and stored in the caller's dtype."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from ...core import rules
from ...core.rules import FTRL, SGD, Adagrad, Adam, GroupAdagrad, RowOptimizer, RowwiseAdagrad
from ...front import arrays
from .. import core
from .results import MergedGradients

State = dict[str, np.ndarray]


def _wide(x: Any) -> np.ndarray:
    return arrays.to_numpy(x).astype(np.float64)


def _ratio(a: np.ndarray, b: np.ndarray) -> Any:
    """a / b, 0 where b is."""
    a, b = np.broadcast_arrays(a, b)
    return np.divide(a, b, out=np.zeros_like(a), where=b != 0)


def _decayed(rule: Any, w: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight and gradient after weight decay."""
    if getattr(rule, "weight_decay_mode", "l2") == "decoupled":
        return w * (1 - rule.lr * rule.weight_decay), g
    return w, g + rule.weight_decay * w if rule.weight_decay else g


# One step of rows w (U, D) under g; state columns are (U, 1) or (U, D), changed in place.


def _sgd(rule: SGD, w: np.ndarray, g: np.ndarray, s: State) -> Any:
    w, g = _decayed(rule, w, g)
    return w - rule.lr * g


def _rowwise_adagrad(rule: RowwiseAdagrad, w: np.ndarray, g: np.ndarray, s: State) -> Any:
    w, g = _decayed(rule, w, g)
    s["state_sum"] += (g**2).mean(axis=1, keepdims=True)
    return w - _ratio(rule.lr * g, np.sqrt(s["state_sum"]) + rule.eps)


def _adagrad(rule: Adagrad, w: np.ndarray, g: np.ndarray, s: State) -> Any:
    w, g = _decayed(rule, w, g)
    s["state_sum"] += g**2
    return w - _ratio(rule.lr * g, np.sqrt(s["state_sum"]) + rule.eps)


def _adam(rule: Adam, w: np.ndarray, g: np.ndarray, s: State) -> Any:
    b1, b2 = rule.betas
    w, g = _decayed(rule, w, g)
    square = (g**2).mean(axis=1, keepdims=True) if rule.rowwise else g**2
    s["step"] += 1
    s["exp_avg"] += (1 - b1) * (g - s["exp_avg"])
    s["exp_avg_sq"] += (1 - b2) * (square - s["exp_avg_sq"])
    u = (1 - b1) * g + b1 * s["exp_avg"] if rule.nesterov else s["exp_avg"]
    correction1, correction2 = 1 - b1 ** s["step"], 1 - b2 ** s["step"]
    if rule.eps_mode == "tensorflow":
        rate = rule.lr * np.sqrt(correction2) / correction1
        return w - _ratio(rate * u, np.sqrt(s["exp_avg_sq"]) + rule.eps)
    return w - _ratio(rule.lr * u / correction1, np.sqrt(s["exp_avg_sq"] / correction2) + rule.eps)


def _ftrl(rule: FTRL, w: np.ndarray, g: np.ndarray, s: State) -> Any:
    z, n = s["z"], s["n"]
    z += g - (np.sqrt(n + g**2) - np.sqrt(n)) / rule.lr * w
    n += g**2
    denominator = (rule.beta + np.sqrt(n)) / rule.lr + rule.l2
    if rule.group:
        norm = np.sqrt((z**2).sum(axis=1, keepdims=True))
        shrink = np.where(norm <= rule.l1, 0, 1 - _ratio(np.full_like(norm, rule.l1), norm))
        return np.where(shrink == 0, 0, -shrink * _ratio(z, denominator))
    return np.where(np.abs(z) <= rule.l1, 0, -_ratio(z - np.sign(z) * rule.l1, denominator))


def _group_adagrad(rule: GroupAdagrad, w: np.ndarray, g: np.ndarray, s: State) -> Any:
    w, g = _decayed(rule, w, g)
    s["state_sum"] += np.fmax.reduce(g**2, axis=1, keepdims=True, initial=0)
    root = rule.beta + np.sqrt(s["state_sum"])
    eta = _ratio(np.full_like(root, rule.lr), root)
    if rule.l2 == 0:
        return w - eta * g
    z = g - _ratio(w, eta)
    norm = np.sqrt((z**2).sum(axis=1, keepdims=True))
    shrunk = -eta * (1 - _ratio(np.full_like(norm, rule.l2), norm)) * z
    # eta 0: no gradient so far, and no penalty either.
    return np.where(eta == 0, w, np.where(norm < rule.l2, 0, shrunk))


_STEPS: dict[type[RowOptimizer], Any] = {
    SGD: _sgd,
    RowwiseAdagrad: _rowwise_adagrad,
    Adagrad: _adagrad,
    Adam: _adam,
    FTRL: _ftrl,
    GroupAdagrad: _group_adagrad,
}


def _random_bits(seed: int, row: int, dim: int) -> Any:
    """Sixteen bits per element of the row at this place of the batch."""
    word = core.philox(seed, 1, first_item=row)[0].astype(np.uint64)
    key = int(word[1]) << 32 | int(word[0])
    groups = (dim + 63) // 64
    words = (
        core.philox(key, 8 * groups).reshape(groups, 8, 4).transpose(0, 2, 1).reshape(groups, 32)
    )
    return np.concatenate([words & 0xFFFF, words >> 16], axis=1).reshape(-1)[:dim]


def _round_at_random(x: np.ndarray, dtype: str, bits: np.ndarray) -> Any:
    """To one of the neighbours of x in the half type: away from zero if the fraction on the way exceeds the draw."""
    x = x.astype(np.float32)
    size = np.abs(x).astype(np.float64)
    digits, least = (8, -133) if dtype == "bfloat16" else (11, -24)
    _, exponent = np.frexp(np.where(np.isfinite(size), size, 0))
    unit = np.ldexp(1.0, np.maximum(exponent - digits, least))
    low = np.floor(size / unit)
    steps = 1 << 13 if dtype == "float16" else 1 << 16
    subnormal = (dtype == "float16") & (size < 2.0**-14)
    draw = np.where(subnormal, bits / 2.0**16, (bits >> (3 if dtype == "float16" else 0)) / steps)
    up = np.where(subnormal, draw < size / unit - low, draw + (size / unit - low) >= 1)
    rounded = np.copysign((low + up) * unit, x)
    return np.where(np.isfinite(x), rounded, x)


def move(
    rule: RowOptimizer,
    weight: Any,
    grad: Any,
    state: dict[str, Any],
    rounding_seed: int | None,
    rows: np.ndarray | None = None,
    step: int = 0,
) -> None:
    """Steps of all rows, or one after another of ``rows``; written back in the dtype of each array.

    ``step``: Adam's t of all rows, or 0 where each row counts its own.
    """
    if int(weight.shape[1]) == 0:
        return
    if step:
        state = {**state, "step": np.full((int(weight.shape[0]), 1), step - 1.0)}
    run = _STEPS[type(rule)]
    w, g = _wide(weight), _wide(grad)
    s = {k: _wide(arrays.as_column(x)) for k, x in state.items()}
    dtype = arrays.dtype(weight)
    stochastic = rounding_seed is not None and dtype in ("float16", "bfloat16")

    def stored(x: np.ndarray, first: int) -> Any:
        if not stochastic:
            return x
        bits = [_random_bits(int(rounding_seed or 0), first + i, x.shape[1]) for i in range(len(x))]
        return _round_at_random(x, dtype, np.array(bits, np.uint32).reshape(x.shape))

    with np.errstate(all="ignore"):
        if rows is None:
            w = stored(run(rule, w, g, s), 0)
        else:
            for i, row in enumerate(rows.tolist()):
                one = {k: x[row : row + 1] for k, x in s.items()}
                new = stored(run(rule, w[row : row + 1], g[i : i + 1], one), i)
                w[row] = _as_stored(new, weight)
                for k, x in s.items():
                    x[row] = x[row].astype(arrays.dtype(state[k]))
    arrays.assign(weight, w)
    for k, x in s.items():
        arrays.assign(state[k], x.reshape(tuple(state[k].shape)))


def _as_stored(x: np.ndarray, like: Any) -> Any:
    """What is left of x once it was stored in the dtype of ``like``."""
    if isinstance(like, np.ndarray):
        return x.astype(like.dtype).astype(np.float64)
    holder = arrays.empty(like, x.shape, arrays.dtype(like))
    arrays.assign(holder, x)
    return _wide(holder)


def _update(op: str, kind: type[RowOptimizer], *state: str) -> Callable[..., None]:
    """The update of gathered rows by a rule, with the arguments of the op of this name but ``impl``."""
    hidden = ("rowwise", "initial_accumulator_value", "stochastic_rounding")
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.name not in hidden}  # type: ignore[arg-type]
    of = inspect.Parameter
    signature = inspect.Signature(
        [of(name, of.POSITIONAL_OR_KEYWORD) for name in ("weight", "grad", *state)]
        + [
            of(name, of.KEYWORD_ONLY, default=default)
            for name, default in {**fields, "rounding_seed": None}.items()
        ]
    )

    def update(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        rule, columns, step = rules.of_arguments(op, kind, given)
        move(rule, given["weight"], given["grad"], columns, given["rounding_seed"], step=step)

    update.__name__ = update.__qualname__ = op
    update.__signature__ = signature  # type: ignore[attr-defined]
    return update


sparse_sgd_update = _update("sparse_sgd_update", SGD)
rowwise_adagrad_update = _update("rowwise_adagrad_update", RowwiseAdagrad, "state_sum")
sparse_adagrad_update = _update("sparse_adagrad_update", Adagrad, "state_sum")
sparse_adam_update = _update("sparse_adam_update", Adam, "exp_avg", "exp_avg_sq", "step")
ftrl_proximal_update = _update("ftrl_proximal_update", FTRL, "z", "n")
group_adagrad_update = _update("group_adagrad_update", GroupAdagrad, "state_sum")


def merge_duplicates(ids: Any, grads: Any) -> MergedGradients:
    names = arrays.to_numpy(ids)
    numbers: dict[int, int] = {}
    inverse = np.array([numbers.setdefault(x, len(numbers)) for x in names.tolist()], np.int64)
    sums = np.zeros((len(numbers), int(grads.shape[1])))
    counts = np.zeros(len(numbers), np.int64)
    for row, g in zip(inverse.tolist(), _wide(grads)):
        sums[row] += g
        counts[row] += 1
    dtype = np.float64 if arrays.dtype(grads) == "float64" else np.float32
    with np.errstate(over="ignore"):
        found = (np.array(list(numbers), names.dtype), sums.astype(dtype), counts, inverse)
    return MergedGradients(*(arrays.from_numpy(x, ids) for x in found))


def sparse_dedup_optimize(
    weight: Any,
    ids: Any,
    grads: Any,
    state: dict[str, Any],
    optimizer: RowOptimizer,
    *,
    dedup: bool = True,
    rounding_seed: int | None = None,
) -> MergedGradients:
    if dedup:
        merged = merge_duplicates(ids, grads)
    else:
        n = int(ids.shape[0])
        wide = _wide(grads).astype(arrays.to_numpy(grads).dtype)
        counted = (wide, np.ones(n, np.int64), np.arange(n))
        merged = MergedGradients(ids, *(arrays.from_numpy(x, ids) for x in counted))
    move(optimizer, weight, merged.grads, state, rounding_seed, arrays.to_numpy(merged.ids))
    return merged


def converted(x: Any, dtype: str) -> Any:
    """The library's own conversion, to nearest even."""
    if arrays.is_torch(x):
        import torch

        return x.detach().to(getattr(torch, dtype))
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def serving_row_quantize(rows: Any, *, mode: str = "int8", value_range: float = 1.0) -> Any:
    if mode != "int8":
        return converted(rows, mode)
    x = arrays.to_numpy(rows)
    q = np.nan_to_num(x / x.dtype.type(value_range / 128), nan=0.0).clip(-128, 127)
    whole = np.trunc(q)
    q = whole + np.where(np.abs(q - whole) >= 0.5, np.sign(q), 0)
    return arrays.from_numpy(q.astype(np.int8), rows)


def serving_row_dequantize(codes: Any, *, value_range: float = 1.0, dtype: str = "float32") -> Any:
    if arrays.dtype(codes) != "int8":
        return converted(codes, dtype)
    wide = np.float64 if dtype == "float64" else np.float32
    x = arrays.to_numpy(codes).astype(wide) * wide(value_range / 128)
    return converted(arrays.from_numpy(x, codes), dtype)
