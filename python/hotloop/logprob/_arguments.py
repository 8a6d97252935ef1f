# SPDX-License-Identifier: Apache-2.0
"""Checks shared by the front doors of this room."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..front import arrays, at_run_time, check, environment, plain
from ..front.impl import choose, everywhere, on_cpu
from ..vocabulary import documented
from . import _triton
from ._call import LmHeadCall, LogitMap
from ._statistics import STATISTICS

TEXTS = {
    "hidden": "hidden states, shape (..., D), float32, float64, float16 or bfloat16. Differentiable.",
    "weight": "lm_head, shape (V, D), dtype of ``hidden``. Differentiable.",
    "bias": "shape (V,), any float dtype. Differentiable.",
    "student_hidden": "shape (..., D_s), float32, float64, float16 or bfloat16. Differentiable.",
    "student_weight": "lm_head, shape (V, D_s), same dtype. Differentiable.",
    "student_bias": "shape (V,). Differentiable.",
    "teacher_hidden": "shape (..., D_t); no gradient.",
    "teacher_weight": "lm_head, shape (V, D_t), dtype of the student's; no gradient.",
    "teacher_bias": "shape (V,); no gradient.",
    "student_logits": "shape (..., V), float32, float64, float16 or bfloat16. Differentiable.",
    "teacher_logits": "shape (..., V), same dtype; no gradient.",
    "labels": "shape (...), only to say which rows count: those that are not ``ignore_index``; None for all.",
    "beta": "weight of the teacher in the mixture, in [0, 1].",
    "delta": "weight of the emphasised divergence, >= 1.",
    "temperature": "of both, > 0 (1e-18 to 1e3, in float64 to 1e7).",
    "logit_scale": "multiplies the logits before softcap (Cohere); 0, or 1e-18 to 1e18 in magnitude.",
    "softcap": "> 0 (1e-18 to 1e18), caps logits smoothly (Gemma); None for none.",
    "ignore_index": "label of rows that do not count.",
    "statistics": 'names from "entropy", "lse", "sum_p2", "mean_logit", "argmax_hit".',
    "reduction": '"mean" over the rows that count, "sum" or "none".',
    "shift_labels": "labels stand beside their own tokens, as Hugging Face stores them: position t is asked about "
    "labels[t + 1], and the last one of every sequence about nothing. False: already shifted.",
    "impl": '"auto", "cpu", "triton" or "reference".',
}
"""What arguments mean in every op of this room that says nothing else of them."""

described = functools.partial(
    documented,
    arguments=TEXTS,
    returns='Scalar, or shape (...) for "none"; float32 (float64 for float64 input), nats.',
    raises={
        "TypeError, ValueError": "an argument has the wrong type, shape, dtype, device or range.",
        "NotImplementedError": "the forced impl cannot run these inputs.",
    },
)

LARGEST_SCALE = 1e18  # its square and the square of its inverse are normal float32 numbers


def logit_map(op: str, temperature: float, logit_scale: float, softcap: float | None) -> LogitMap:
    """The ``LogitMap`` of these numbers, checked."""
    temperature = check.number(op, "temperature", temperature, above=0)
    logit_scale = check.number(op, "logit_scale", logit_scale)
    if softcap is not None:
        softcap = check.number(op, "softcap", softcap, above=0, hint="Pass None for no cap.")
        _representable(op, "softcap", softcap)
    _representable(op, "temperature", temperature)
    if logit_scale != 0:
        _representable(op, "logit_scale", logit_scale)
    return LogitMap(temperature, logit_scale, softcap)


def _representable(op: str, name: str, scale: float) -> None:
    """Refuse a scale whose products, quotients or squares leave float32: they would be NaN without a word."""
    if not 1 / LARGEST_SCALE <= abs(scale) <= LARGEST_SCALE:
        raise ValueError(
            f"[{op}] {name}: expected a magnitude from {1 / LARGEST_SCALE:g} to {LARGEST_SCALE:g}, got {scale!r}. "
            "Logits and their gradients are float32."
        )


def wanted_statistics(op: str, statistics: Any) -> frozenset[str]:
    if isinstance(statistics, str):
        statistics = (statistics,)
    for name in statistics:
        check.choice(op, "statistics", name, STATISTICS)
    return frozenset(statistics)


def lm_head(
    op: str,
    hidden: Any,
    weight: Any,
    bias: Any,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check hidden [..., D], weight [V, D], bias [V] and return hidden as [N, D]."""
    h, w, b = names
    if not torch.compiler.is_compiling():
        for name, value in ((h, hidden), (w, weight), (b, bias)):
            if isinstance(value, Tensor):
                plain.check(op, name, value)
    hidden = check.float_tensor(op, h, hidden)
    weight = check.float_tensor(op, w, weight, ndim=2)
    if hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"[{op}] {h}: expected shape (..., {weight.shape[1]}) to match {w} {tuple(weight.shape)}, "
            f"got {tuple(hidden.shape)}. {w} is (vocabulary, width)."
        )
    if weight.shape[0] == 0:
        raise ValueError(
            f"[{op}] {w}: expected a vocabulary of at least 1, got shape {tuple(weight.shape)}."
        )
    if hidden.dtype != weight.dtype:
        # As torch does: autocast narrows float32 and leaves float64 alone.
        wide = torch.float64 in (hidden.dtype, weight.dtype)
        if torch.is_autocast_enabled(hidden.device.type) and not wide:
            dtype = torch.get_autocast_dtype(hidden.device.type)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        else:
            raise TypeError(
                f"[{op}] {w}: expected dtype {arrays.dtype(hidden)} like {h}, got "
                f"{arrays.dtype(weight)}. Convert one of them"
                + (", or use torch.autocast." if not wide else ": autocast leaves float64 alone.")
            )
    if weight.device != hidden.device:
        check.same_place(op, w, weight, h, hidden)
    if bias is not None:
        bias = check.float_tensor(op, b, bias, ndim=1)
        if bias.shape[0] != weight.shape[0]:
            raise ValueError(
                f"[{op}] {b}: expected shape ({weight.shape[0]},), one per row of {w}, got {tuple(bias.shape)}."
            )
        check.same_place(op, b, bias, h, hidden)
    flat = rows_of(hidden)
    if environment.checks_on():
        check.finite(op, **{h: hidden, w: weight, b: bias})
    return flat, weight, bias


CANDIDATES = {"triton": _triton.refuses, "cpu": on_cpu, "reference": everywhere}


def lm_head_call(
    op: str,
    hidden: Any,
    weight: Any,
    labels_: Any,
    bias: Any,
    logit: LogitMap,
    ignore_index: int,
    impl: str,
) -> LmHeadCall:
    """Check hidden states, lm_head and labels, and choose the implementation."""
    shape = check.tensor(op, "hidden", hidden).shape[:-1]
    flat, w, b = lm_head(op, hidden, weight, bias)
    y = labels(op, labels_, shape, w.shape[0], ignore_index, "hidden", flat.device)
    chosen = choose(op, impl, "hidden", hidden, CANDIDATES, vocabulary=w.shape[0])
    return LmHeadCall(flat, w, b, y, ignore_index, logit, chosen)


def rows_of(x: Tensor) -> Tensor:
    """(..., k) as (n, k). What is so already stays the tensor it is: AOTAutograd then sees that backward needs an
    input of the graph and refuses to differentiate it again, where it would say nothing about a view."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def labels(
    op: str,
    value: Any,
    shape: torch.Size,
    vocabulary: int,
    ignore_index: int,
    like: str,
    device: Any,
) -> Tensor:
    """Check labels of the given shape and return them as int64 [N]."""
    t = check.tensor(op, "labels", value)
    if not torch.compiler.is_compiling():
        plain.check(op, "labels", t)
    if t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"[{op}] labels: expected dtype int64 or int32, got {arrays.dtype(t)}.")
    if t.shape != shape:
        raise ValueError(
            f"[{op}] labels: expected shape {tuple(shape)}, one per row of {like}, got {tuple(t.shape)}."
        )
    if t.device != device:
        raise ValueError(
            f"[{op}] labels: expected device {device} like {like}, got {t.device}. Move them first."
        )
    flat = t.reshape(-1).to(torch.int64).contiguous()
    if torch.compiler.is_compiling():
        return at_run_time.checked("labels", op, "labels", flat, (vocabulary, ignore_index))
    # On the CPU the check costs microseconds and an unchecked label would be a silent NaN; on a GPU it
    # would wait for the device, so it is left to HOTLOOP_CHECK. Inside a torch.func transform there are no values.
    look = flat.device.type == "cpu" or environment.checks_on()
    if look and not torch._C._are_functorch_transforms_active():
        _look_at_labels(op, "labels", flat, vocabulary, ignore_index)
    return flat


@at_run_time.look("labels")
def _look_at_labels(op: str, name: str, flat: Tensor, vocabulary: int, ignore_index: int) -> None:
    bad = (flat != ignore_index) & ((flat < 0) | (flat >= vocabulary))
    wanted = f"0 to {vocabulary - 1} or ignore_index={ignore_index}"
    check.refuse(op, name, flat, bad, wanted, "Use ignore_index for tokens that do not count.")


def shifted(
    op: str, labels: Any, ignore_index: int, shift: Any, cu_seqlens: Tensor | None = None
) -> Any:
    """Labels as they stand beside their tokens, moved to the position that predicts them.

    The last position, of every sequence if ``cu_seqlens`` says where they end, gets ``ignore_index``.
    """
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(
            f"[{op}] ignore_index: expected an integer, got {type(ignore_index).__name__}. The default is -100."
        )
    if not isinstance(shift, bool):
        raise TypeError(
            f"[{op}] shift_labels: expected True or False, got {type(shift).__name__}. "
            "True is for labels as Hugging Face stores them."
        )
    if not shift:
        return labels
    if labels is None:
        raise ValueError(
            f"[{op}] labels: expected a tensor beside shift_labels=True, got None. Pass labels."
        )
    t = check.tensor(op, "labels", labels)
    if t.ndim == 0:
        raise ValueError(
            f"[{op}] labels: expected at least 1 dimension to shift along, got shape (). Leave shift_labels off."
        )
    moved = torch.nn.functional.pad(t[..., 1:], (0, min(1, t.shape[-1])), value=ignore_index)
    if cu_seqlens is None:
        return moved
    last = torch.zeros(t.shape[0] + 1, dtype=torch.bool, device=t.device)
    last = last.index_fill(0, cu_seqlens.long(), True)[1:]
    return torch.where(last, ignore_index, moved)


def cu_seqlens(op: str, value: Any, n: int, device: Any) -> Tensor:
    """Check (B + 1,) offsets that start at 0 and end at n."""
    t = check.tensor(op, "cu_seqlens", value)
    if t.dtype not in (torch.int64, torch.int32) or t.ndim != 1 or t.shape[0] < 1:
        raise ValueError(
            f"[{op}] cu_seqlens: expected int32 or int64 offsets of shape (sequences + 1,), got "
            f"{arrays.dtype(t)} {tuple(t.shape)}."
        )
    if t.device != device:
        raise ValueError(
            f"[{op}] cu_seqlens: expected device {device}, got {t.device}. Move it first."
        )
    if torch.compiler.is_compiling():
        return at_run_time.checked("offsets", op, "cu_seqlens", t.to(torch.int64), (n,))
    if t.device.type == "cpu" or environment.checks_on():
        _look_at_offsets(op, "cu_seqlens", t, n)
    return t.to(torch.int64)


@at_run_time.look("offsets")
def _look_at_offsets(op: str, name: str, t: Tensor, n: int) -> None:
    if int(t[0]) != 0 or int(t[-1]) != n or bool((t.diff() < 0).any()):
        raise ValueError(
            f"[{op}] {name}: expected offsets that rise from 0 to {n}, the number of tokens, got "
            f"{t.tolist() if t.shape[0] <= 16 else [*t[:8].tolist(), '...', *t[-4:].tolist()]}."
        )
