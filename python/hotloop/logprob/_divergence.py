# SPDX-License-Identifier: Apache-2.0
"""Divergences between a teacher's and a student's distribution over the vocabulary, for distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..front import arrays, check, second
from ..front.impl import Impl, Refuses, choose
from ..reference import logprob as reference
from . import _arguments, _two_lm_heads, _two_lm_heads_triton
from ._call import Divergence, DivergenceCall
from ._cpu import accumulate_dtype, select_rows
from ._ops import fake_gradients
from ._two_lm_heads import KINDS, Given, LmHeads, Rows
from .lm_head import IGNORE_INDEX

# -- lm_heads -----------------------------------------------------------------------------------------------


class _LinearDivergence(torch.autograd.Function):
    """A ``DivergenceCall`` and grad mode -> the loss [N] of each row; gradient for the student's lm_head."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        call, grad_enabled = DivergenceCall(*arguments[:-1]), arguments[-1]
        rows, index = _linear_forward(call)
        if grad_enabled and any(ctx.needs_input_grad[:3]):
            # The teacher too: a change in place between forward and backward is noticed.
            ctx.save_for_backward(*call[:7], rows.lse, rows.weights, rows.inner, index)
            ctx.rest, ctx.source = call[7:], rows.source
        return _scatter(rows.loss, index, call.hidden.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse, weights, inner, index = ctx.saved_tensors
        call, need = DivergenceCall(*inputs, *ctx.rest), ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *_linear_differentiable(call, need, grad), *([None] * 8)
        # Tiles are spent by the first backward, whatever becomes of it; a second one computes them again.
        rows = Rows(grad, lse, weights, inner, ctx.__dict__.pop("source", None))
        needed = (need[0], need[1], need[2] and call.bias is not None)
        return *_linear_backward(call, rows, index, grad, needed), *([None] * 8)


def _linear_forward(call: DivergenceCall) -> tuple[Rows, Tensor | None]:
    if call.impl == "triton":
        return _two_lm_heads_triton.forward(call), None
    index = select_rows(call.labels, call.ignore_index)
    n = call.hidden.shape[0] if index is None else index.shape[0]
    source = LmHeads.of(call, index)
    return _two_lm_heads.forward(
        call.divergence, source, n, accumulate_dtype(call.weight.dtype)
    ), index


def _linear_backward(
    call: DivergenceCall, rows: Rows, index: Tensor | None, grad: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    if call.impl == "triton":
        return _two_lm_heads_triton.backward(call, rows, grad, need)
    source = rows.source
    if not isinstance(source, LmHeads):
        source = LmHeads.of(call, index)
        for _ in source.tiles():  # fills what the workspace keeps
            pass
    chosen = grad if index is None else grad.index_select(0, index)
    return _two_lm_heads.lm_head_gradients(call, source, rows, chosen.contiguous(), index, need)


def _linear_differentiable(
    call: DivergenceCall, need: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of the student's lm_head as a graph, by the reference."""

    def rows(*student: Any) -> tuple[Tensor]:
        return (_reference_of_heads(DivergenceCall._make((*student, *call[3:]))),)

    return second.gradients(rows, call.student, need, (grad,))


def _scatter(values: Tensor, index: Tensor | None, n: int) -> Tensor:
    """Put the rows that count in their places, along the last dimension; 0 in the others."""
    if index is None:
        return values
    shape = (*values.shape[:-1], n)
    return torch.zeros(shape, dtype=values.dtype, device=values.device).index_copy_(
        -1, index, values
    )


_HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias"
)
_TERMS = "str kind, float beta, float delta, float[] numbers, str impl"


@torch.library.custom_op(
    "hotloop::linear_divergence",
    mutates_args=(),
    schema=f"({_HEADS}, Tensor labels, SymInt ignore_index, {_TERMS}) -> Tensor",
)
def _linear_divergence(*arguments: Any) -> Tensor:
    """Return [8, N]: the loss of each row and what backward needs."""
    rows, index = _linear_forward(DivergenceCall.of(*arguments))
    return _scatter(_pack(rows), index, arguments[0].shape[0])


@_linear_divergence.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return hidden.new_empty((8, hidden.shape[0]), dtype=accumulate_dtype(weight.dtype))


@torch.library.custom_op(
    "hotloop::linear_divergence_backward",
    mutates_args=(),
    schema=f"({_HEADS}, Tensor packed, Tensor grad, Tensor labels, SymInt ignore_index, {_TERMS})"
    " -> (Tensor, Tensor, Tensor)",
)
def _linear_divergence_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return d hidden, d weight, d bias (empty where there is no bias)."""
    packed, grad = arguments[6:8]
    call = DivergenceCall.of(*arguments[:6], *arguments[8:])
    index = None if call.impl == "triton" else select_rows(call.labels, call.ignore_index)
    rows = _unpack(packed if index is None else packed.index_select(1, index))
    dh, dw, db = _linear_backward(call, rows, index, grad, (True, True, call.bias is not None))
    assert dh is not None and dw is not None
    return dh, dw, call.weight.new_empty(0) if db is None else db


@_linear_divergence_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return fake_gradients(hidden, weight, bias)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7], output)
    ctx.rest = inputs[7:]


def _linear_registered(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *heads, labels, packed = ctx.saved_tensors
    if torch.is_grad_enabled():
        call = DivergenceCall.of(*heads, labels, *ctx.rest)
        return *_linear_differentiable(call, ctx.needs_input_grad[:3], grad[0]), *([None] * 10)
    dh, dw, db = torch.ops.hotloop.linear_divergence_backward(
        *heads, packed, grad[0], labels, *ctx.rest
    )
    return dh, dw, None if heads[2] is None else db, *([None] * 10)


_linear_divergence.register_autograd(_linear_registered, setup_context=_linear_setup)


def _pack(rows: Rows) -> Tensor:
    """[8, n]: loss, lse (2), weights (3), inner (2)."""
    n = rows.loss.shape[0]
    kept = (rows.lse, rows.weights, rows.inner)
    if rows.lse.shape[0] == 0:  # log_cosh keeps nothing
        kept = tuple(rows.loss.new_zeros(k, n) for k in (2, 3, 2))  # type: ignore[assignment]
    return torch.cat((rows.loss.unsqueeze(0), *kept))


def _unpack(packed: Tensor) -> Rows:
    return Rows(packed[0], packed[1:3], packed[3:6], packed[6:8])


# -- given logits --------------------------------------------------------------------------------------------


class _LogitDivergence(torch.autograd.Function):
    """Student's and teacher's logits, labels, ignore_index, divergence, impl -> the loss [N] of each row."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        student, teacher, labels, ignore_index, d, impl = arguments
        rows = _logit_forward(impl, d, student.detach(), teacher)
        ctx.save_for_backward(student, teacher, labels, rows.lse, rows.weights, rows.inner)
        ctx.rest = (ignore_index, d, impl)
        return torch.where(labels != ignore_index, rows.loss, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, labels, lse, weights, inner = ctx.saved_tensors
        ignore_index, d, impl = ctx.rest
        if torch.is_grad_enabled():
            graph = _logit_differentiable(d, student, teacher, labels, ignore_index, grad)
            return graph, *([None] * 5)
        rows = Rows(grad, lse, weights, inner)
        gradient = _logit_backward(impl, d, student.detach(), teacher, rows, grad)
        gradient.masked_fill_((labels == ignore_index).unsqueeze(1), 0.0)
        return gradient, *([None] * 5)


def _logit_forward(impl: str, d: Divergence, student: Tensor, teacher: Tensor) -> Rows:
    if impl == "triton":
        return _two_lm_heads_triton.logit_forward(d, student, teacher)
    dtype = accumulate_dtype(student.dtype)
    return _two_lm_heads.forward(d, Given(student, teacher), student.shape[0], dtype)


def _logit_backward(
    impl: str, d: Divergence, student: Tensor, teacher: Tensor, rows: Rows, grad: Tensor
) -> Tensor:
    if impl == "triton":
        return _two_lm_heads_triton.logit_backward(d, student, teacher, rows, grad)
    out = student.clone(memory_format=torch.contiguous_format)
    for _ in _two_lm_heads.overwrite_student(d, Given(out, teacher), rows, grad.contiguous()):
        pass
    return out


def _logit_differentiable(
    d: Divergence, student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int, grad: Tensor
) -> Tensor | None:
    def rows(s: Tensor) -> tuple[Tensor]:
        return (_reference_of_logits(d, s, teacher, labels, ignore_index),)

    return second.gradients(rows, (student,), (True,), (grad,))[0]


@torch.library.custom_op(
    "hotloop::logit_divergence",
    mutates_args=(),
    schema=f"(Tensor student, Tensor teacher, {_TERMS}) -> Tensor",
)
def _logit_divergence(student: Tensor, teacher: Tensor, *terms: Any) -> Tensor:
    """Return [8, N] as ``linear_divergence``."""
    d = Divergence.of(*terms[:4])
    return _pack(_logit_forward(terms[4], d, student.contiguous(), teacher.contiguous()))


@_logit_divergence.register_fake
def _(student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty((8, student.shape[0]), dtype=accumulate_dtype(student.dtype))


@torch.library.custom_op(
    "hotloop::logit_divergence_backward",
    mutates_args=(),
    schema=f"(Tensor student, Tensor teacher, Tensor packed, Tensor grad, {_TERMS}) -> Tensor",
)
def _logit_divergence_backward(
    student: Tensor, teacher: Tensor, packed: Tensor, grad: Tensor, *terms: Any
) -> Tensor:
    d = Divergence.of(*terms[:4])
    gradient = _logit_backward(terms[4], d, student, teacher.contiguous(), _unpack(packed), grad)
    # A masked row comes with gradient 0; whatever stands in it must not come out as NaN.
    return gradient.masked_fill_((grad == 0).unsqueeze(1), 0.0)


@_logit_divergence_backward.register_fake
def _(student: Tensor, *rest: Any) -> Tensor:
    return student.new_empty(student.shape)


def _logit_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2], output)
    ctx.rest = inputs[2:]


def _logit_registered(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    student, teacher, packed = ctx.saved_tensors
    if torch.is_grad_enabled():
        # The front door masks rows: a loss of NaN without a gradient from above is that of a masked one.
        labels = ((grad[0] == 0) & ~packed[0].isfinite()).to(torch.int64).neg()
        d = Divergence.of(*ctx.rest[:4])
        return _logit_differentiable(d, student, teacher, labels, -1, grad[0]), *([None] * 6)
    gradient = torch.ops.hotloop.logit_divergence_backward(
        student, teacher, packed, grad[0], *ctx.rest
    )
    return gradient, *([None] * 6)


_logit_divergence.register_autograd(_logit_registered, setup_context=_logit_setup)


# -- what the front doors call ------------------------------------------------------------------------------


def options(
    op: str, kind: str, beta: float, delta: float, temperature: float, reduction: str
) -> Divergence:
    check.choice(op, "divergence_kind", kind, KINDS)
    check.choice(op, "reduction", reduction, check.REDUCTIONS)
    check.number(op, "beta", beta, at_least=0, at_most=1)
    check.number(op, "delta", delta, at_least=1)
    logit = _arguments.logit_map(op, temperature, 1.0, None)
    if kind == "jsd" and beta in (0, 1):
        kind = "forward_kl" if beta == 0 else "reverse_kl"  # by definition, not as a limit
    return Divergence(kind, beta, delta, logit, logit)


def _not_too_hot(op: str, d: Divergence, like: Tensor) -> None:
    """Refuse a temperature at which the value would be rounding alone.

    A divergence falls as 1 / T^2, the rounding of its log-probabilities does not fall: the relative error is about
    T^2 eps.
    """
    wide = like.dtype == torch.float64
    hottest = 1e7 if wide else 1e3
    temperature = d.student.temperature
    if temperature > hottest:
        cure = "" if wide else " Pass float64."
        raise ValueError(
            f"[{op}] temperature: expected at most {hottest:g} for {arrays.dtype(like)}, got {temperature!r}: "
            f"the divergence, about 1 / T^2, would be lost in the rounding of the log-probabilities.{cure}"
        )


def reduce(
    losses: Tensor, labels: Tensor, ignore_index: int, reduction: str, shape: torch.Size
) -> Tensor:
    if reduction == "none":
        return losses.reshape(shape)
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (labels != ignore_index).sum()


def _reference_rows(d: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of each row in plain torch, from logits that are not yet divided by the temperature."""
    s, t = reference.map_logits(student, *d.student), reference.map_logits(teacher, *d.teacher)
    scale = d.student.temperature**2
    if d.kind == "log_cosh":
        x = (s - t) / 2
        return scale * (x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2)).sum(-1)
    found = reference.divergences(s, t, d.beta)
    if d.kind == "balanced":
        sharper = found["teacher_entropy"] > found["student_entropy"]
        forward = torch.where(sharper, d.delta, 1.0) * found["forward_kl"]
        reverse = torch.where(sharper, 1.0, d.delta) * found["reverse_kl"]
        return scale * (forward + reverse)
    return found[d.kind]


def _reference_of_heads(call: DivergenceCall) -> Tensor:
    valid = call.labels != call.ignore_index
    logits = [
        reference.logits_of(torch.where(valid.unsqueeze(1), h, 0.0), w, b)
        for h, w, b in (call.student, call.teacher)
    ]
    return torch.where(valid, _reference_rows(call.divergence, *logits), 0.0)


def _reference_of_logits(
    d: Divergence, student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int
) -> Tensor:
    valid = labels != ignore_index
    student, teacher = (torch.where(valid.unsqueeze(1), z, 0.0) for z in (student, teacher))
    return torch.where(valid, _reference_rows(d, student, teacher), 0.0)


def _labels(
    op: str, labels: Tensor | None, shape: torch.Size, vocabulary: int, ignore_index: int, like: str, x: Tensor
) -> tuple[Tensor, int]:  # fmt: skip
    """Labels as int64 [N], and the ignore_index that goes with them."""
    if labels is None:
        # Every row counts, whatever the caller's ignore_index is: 0 would take these labels for masked.
        return torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), IGNORE_INDEX
    return (
        _arguments.labels(op, labels, shape, vocabulary, ignore_index, like, x.device),
        ignore_index,
    )


def of_heads(
    op: str,
    student: tuple[Any, Any, Any],
    teacher: tuple[Any, Any, Any],
    labels: Tensor | None,
    d: Divergence,
    ignore_index: int,
    reduction: str,
    impl: Impl,
) -> Tensor:
    shape = check.tensor(op, "student_hidden", student[0]).shape[:-1]
    hidden, weight, bias = _arguments.lm_head(
        op, *student, ("student_hidden", "student_weight", "student_bias")
    )
    _not_too_hot(op, d, hidden)
    with torch.no_grad():
        teacher_head = _arguments.lm_head(
            op, *teacher, ("teacher_hidden", "teacher_weight", "teacher_bias")
        )
    if teacher_head[1].shape[0] != weight.shape[0] or teacher_head[0].shape[0] != hidden.shape[0]:
        raise ValueError(
            f"[{op}] teacher_weight: expected {hidden.shape[0]} rows over a vocabulary of {weight.shape[0]} like the "
            f"student, got {teacher_head[0].shape[0]} over {teacher_head[1].shape[0]}. Distil within one vocabulary."
        )
    if teacher_head[1].dtype != weight.dtype:
        raise TypeError(
            f"[{op}] teacher_weight: expected dtype {arrays.dtype(weight)} like student_weight, got "
            f"{arrays.dtype(teacher_head[1])}. Convert one of them."
        )
    check.same_place(op, "teacher_hidden", teacher_head[0], "student_hidden", hidden)
    y, ignore_index = _labels(
        op, labels, shape, weight.shape[0], ignore_index, "student_hidden", hidden
    )
    chosen = choose(op, impl, "student_hidden", student[0], _candidates(d))
    teacher_head = tuple(None if x is None else x.detach() for x in teacher_head)  # type: ignore[assignment]
    call = DivergenceCall(hidden, weight, bias, *teacher_head, y, ignore_index, d, chosen)
    if chosen == "reference":
        rows = _reference_of_heads(call)
    elif torch.compiler.is_compiling():
        rows = torch.ops.hotloop.linear_divergence(*call[:8], *d.packed(), chosen)[0]
    else:
        check.untransformed(op, hidden, weight, bias)
        rows = _LinearDivergence.apply(*call, torch.is_grad_enabled())
    return reduce(rows, y, ignore_index, reduction, shape)


def of_logits(
    op: str,
    student: Any,
    teacher: Any,
    labels: Tensor | None,
    d: Divergence,
    ignore_index: int,
    reduction: str,
    impl: Impl,
) -> Tensor:
    student = check.float_tensor(op, "student_logits", student)
    teacher = check.float_tensor(op, "teacher_logits", teacher)
    _not_too_hot(op, d, student)
    if student.ndim < 1 or student.shape[-1] == 0 or teacher.shape != student.shape:
        raise ValueError(
            f"[{op}] teacher_logits: expected shape (..., vocabulary) like student_logits {tuple(student.shape)}, "
            f"got {tuple(teacher.shape)}."
        )
    if teacher.dtype != student.dtype:
        raise TypeError(
            f"[{op}] teacher_logits: expected dtype {arrays.dtype(student)} like student_logits, got "
            f"{arrays.dtype(teacher)}. Convert one of them."
        )
    check.same_place(op, "teacher_logits", teacher, "student_logits", student)
    shape = student.shape[:-1]
    flat, flat_teacher = _arguments.rows_of(student), _arguments.rows_of(teacher.detach())
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    flat_teacher = flat_teacher if flat_teacher.stride(-1) == 1 else flat_teacher.contiguous()
    y, ignore_index = _labels(
        op, labels, shape, student.shape[-1], ignore_index, "student_logits", flat
    )
    check.finite(op, student_logits=student, teacher_logits=teacher)
    chosen = choose(op, impl, "student_logits", student, _candidates(d))
    if chosen == "reference":
        rows = _reference_of_logits(d, flat, flat_teacher, y, ignore_index)
    elif torch.compiler.is_compiling():
        rows = torch.ops.hotloop.logit_divergence(flat, flat_teacher, *d.packed(), chosen)[0]
        rows = torch.where(y != ignore_index, rows, 0.0)
    else:
        check.untransformed(op, flat)
        rows = _LogitDivergence.apply(flat, flat_teacher, y, ignore_index, d, chosen)
    return reduce(rows, y, ignore_index, reduction, shape)


def _no_log_cosh(like: Tensor) -> str | None:
    return "log_cosh has no Triton kernel yet"


def _candidates(d: Divergence) -> Mapping[str, Refuses]:
    return _arguments.CANDIDATES | ({"triton": _no_log_cosh} if d.kind == "log_cosh" else {})
