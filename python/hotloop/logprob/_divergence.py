"""Divergences between a teacher's and a student's distribution over the vocabulary, for distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..front import arrays, check
from ..front.impl import Impl, Refuses, choose
from ..reference import logprob as reference
from . import _arguments, _backend, _second, _two_heads, _two_heads_triton
from ._cpu import LogitMap, accumulate_dtype, select_rows
from ._two_heads import KINDS, Divergence, Given, Heads, Rows
from .head import IGNORE_INDEX

_Head = tuple[Tensor, Tensor, Tensor | None]
Terms = tuple[str, float, float, Sequence[float]]
"""A ``Divergence`` in plain values, as operators take it and Dynamo traces it: kind, beta, delta, and the temperature,
logit scale and softcap (0: none) of student and teacher."""


# -- autograd ----------------------------------------------------------------------------------------------


class _LinearDivergence(torch.autograd.Function):
    """Per-row loss [N] of two heads; gradient for the student's hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: _Head,
        labels: Tensor,
        terms: Terms,
        ignore_index: int,
        impl: str,
        grad_enabled: bool,
    ) -> Tensor:
        d = _divergence(*terms)
        rows, index = linear_forward(impl, d, (hidden, weight, bias), teacher, labels, ignore_index)
        if grad_enabled and any(ctx.needs_input_grad[:3]):
            # The teacher too: a change in place between forward and backward is noticed.
            ctx.save_for_backward(
                hidden, weight, bias, *teacher, labels, rows.lse, rows.weights, rows.inner, index
            )
            ctx.terms, ctx.impl, ctx.ignore_index = terms, impl, ignore_index
            ctx.source = rows.source
        return scatter(rows.loss, index, hidden.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        hidden, weight, bias, *teacher, labels, lse, weights, inner, index = saved
        need = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            d = _linear_differentiable(ctx.terms, saved[:6], labels, ctx.ignore_index, need, grad)
            return (*d, None, None, None, None, None, None)
        # Tiles are spent by the first backward, whatever becomes of it; a second one computes them again.
        rows = Rows(grad, lse, weights, inner, ctx.__dict__.pop("source", None))
        d = linear_backward(
            ctx.impl, _divergence(*ctx.terms), (hidden, weight, bias), tuple(teacher), rows, index, labels,
            ctx.ignore_index, grad, (need[0], need[1], need[2] and bias is not None),
        )  # fmt: skip
        return (*d, None, None, None, None, None, None)


def _linear_differentiable(
    terms: Terms,
    heads: Sequence[Tensor | None],
    labels: Tensor,
    ignore_index: int,
    need: Sequence[bool],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of the student's head as a graph, by the reference."""

    def rows(*student: Any) -> tuple[Tensor]:
        return (reference_of_heads(terms, student, tuple(heads[3:]), labels, ignore_index),)  # type: ignore[arg-type]

    return _second.gradients(rows, heads[:3], need, (grad,))


def _logit_differentiable(
    terms: Terms, student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int, grad: Tensor
) -> Tensor | None:
    def rows(s: Tensor) -> tuple[Tensor]:
        return (reference_of_logits(terms, s, teacher, labels, ignore_index),)

    return _second.gradients(rows, (student,), (True,), (grad,))[0]


def scatter(values: Tensor, index: Tensor | None, n: int) -> Tensor:
    if index is None:
        return values
    return torch.zeros(n, dtype=values.dtype, device=values.device).index_copy_(0, index, values)


def linear_forward(
    impl: str, d: Divergence, student: _Head, teacher: _Head, labels: Tensor, ignore_index: int
) -> tuple[Rows, Tensor | None]:
    if impl == "triton":
        return _two_heads_triton.forward(d, student, teacher, labels, ignore_index), None
    index = select_rows(labels, ignore_index)
    source = Heads.of(student, teacher, index)
    n = student[0].shape[0] if index is None else index.shape[0]
    return _two_heads.forward(d, source, n, accumulate_dtype(student[1].dtype)), index


def linear_backward(
    impl: str,
    d: Divergence,
    student: _Head,
    teacher: _Head,
    rows: Rows,
    index: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    grad: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if impl == "triton":
        return _two_heads_triton.backward(
            d, student, teacher, rows, labels, ignore_index, grad, need
        )
    source = rows.source
    if not isinstance(source, Heads):
        source = Heads.of(student, teacher, index)
        for _ in source.tiles():  # fills what the workspace keeps
            pass
    chosen = grad if index is None else grad.index_select(0, index)
    return _two_heads.head_gradients(d, source, rows, chosen.contiguous(), *student, index, need)


class _LogitDivergence(torch.autograd.Function):
    """Per-row loss [N] of given logits; gradient for the student's."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        terms: Terms,
        ignore_index: int,
        impl: str,
    ) -> Tensor:
        rows = logit_forward(impl, _divergence(*terms), student.detach(), teacher)
        ctx.save_for_backward(student, teacher, labels, rows.lse, rows.weights, rows.inner)
        ctx.terms, ctx.ignore_index, ctx.impl = terms, ignore_index, impl
        return torch.where(labels != ignore_index, rows.loss, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, labels, lse, weights, inner = ctx.saved_tensors
        if torch.is_grad_enabled():
            d = _logit_differentiable(ctx.terms, student, teacher, labels, ctx.ignore_index, grad)
            return d, None, None, None, None, None
        rows = Rows(grad, lse, weights, inner)
        gradient = logit_backward(
            ctx.impl, _divergence(*ctx.terms), student.detach(), teacher, rows, grad
        )
        gradient.masked_fill_((labels == ctx.ignore_index).unsqueeze(1), 0.0)
        return gradient, None, None, None, None, None


def logit_forward(impl: str, d: Divergence, student: Tensor, teacher: Tensor) -> Rows:
    if impl == "triton":
        return _two_heads_triton.logit_forward(d, student, teacher)
    return _two_heads.forward(
        d, Given(student, teacher), student.shape[0], accumulate_dtype(student.dtype)
    )


def logit_backward(
    impl: str, d: Divergence, student: Tensor, teacher: Tensor, rows: Rows, grad: Tensor
) -> Tensor:
    if impl == "triton":
        return _two_heads_triton.logit_backward(d, student, teacher, rows, grad)
    out = student.clone(memory_format=torch.contiguous_format)
    for _ in _two_heads.overwrite_student(d, Given(out, teacher), rows, grad.contiguous()):
        pass
    return out


# -- registered forms, for torch.compile -------------------------------------------------------------------


def _divergence(kind: str, beta: float, delta: float, numbers: Sequence[float]) -> Divergence:
    s, t = numbers[:3], numbers[3:]
    return Divergence(
        kind, beta, delta, LogitMap(s[0], s[1], s[2] or None), LogitMap(t[0], t[1], t[2] or None)
    )


def _pack(rows: Rows, index: Tensor | None, n: int) -> Tensor:
    """[8, N]: loss, lse (2), weights (3), inner (2); 0 in masked rows."""
    if rows.lse.shape[0] == 0:  # log_cosh keeps nothing
        empty = [rows.loss.new_zeros(k, rows.loss.shape[0]) for k in (2, 3, 2)]
        rows = Rows(rows.loss, empty[0], empty[1], empty[2])
    packed = torch.cat((rows.loss.unsqueeze(0), rows.lse, rows.weights, rows.inner))
    if index is None:
        return packed
    return torch.zeros(8, n, dtype=packed.dtype, device=packed.device).index_copy_(1, index, packed)


def _unpack(packed: Tensor, index: Tensor | None) -> Rows:
    if index is not None:
        packed = packed.index_select(1, index)
    return Rows(packed[0], packed[1:3], packed[3:6], packed[6:8])


@torch.library.custom_op("hotloop::linear_divergence", mutates_args=())
def _linear_divergence(
    hidden: Tensor, weight: Tensor, bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
    labels: Tensor, ignore_index: int, kind: str, beta: float, delta: float, numbers: list[float], impl: str,
) -> Tensor:  # fmt: skip
    """Return [8, N]: the loss of each row and what backward needs."""
    d = _divergence(kind, beta, delta, numbers)
    rows, index = linear_forward(
        impl,
        d,
        (hidden, weight, bias),
        (teacher_hidden, teacher_weight, teacher_bias),
        labels,
        ignore_index,
    )
    return _pack(rows, index, hidden.shape[0])


@_linear_divergence.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
    labels: Tensor, ignore_index: int, kind: str, beta: float, delta: float, numbers: list[float], impl: str,
) -> Tensor:  # fmt: skip
    return hidden.new_empty((8, hidden.shape[0]), dtype=accumulate_dtype(weight.dtype))


@torch.library.custom_op("hotloop::linear_divergence_backward", mutates_args=())
def _linear_divergence_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
    packed: Tensor, grad: Tensor,
    labels: Tensor, ignore_index: int, kind: str, beta: float, delta: float, numbers: list[float], impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return d hidden, d weight, d bias (empty where there is no bias)."""
    d = _divergence(kind, beta, delta, numbers)
    index = None if impl == "triton" else select_rows(labels, ignore_index)
    dh, dw, db = linear_backward(
        impl, d, (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias), _unpack(packed, index), index,
        labels, ignore_index, grad, (True, True, bias is not None),
    )  # fmt: skip
    assert dh is not None and dw is not None
    return dh, dw, weight.new_empty(0) if db is None else db


@_linear_divergence_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None,
    teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor | None,
    packed: Tensor, grad: Tensor,
    labels: Tensor, ignore_index: int, kind: str, beta: float, delta: float, numbers: list[float], impl: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    d_bias = weight.new_empty(0) if bias is None else torch.empty_like(bias)
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), d_bias


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7], output)
    ctx.rest = inputs[7:]


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *heads, labels, packed = ctx.saved_tensors
    if torch.is_grad_enabled():
        ignore_index, kind, beta, delta, numbers, _ = ctx.rest
        need = ctx.needs_input_grad[:3]
        terms = (kind, beta, delta, numbers)
        d = _linear_differentiable(terms, heads, labels, ignore_index, need, grad[0])
        return *d, *([None] * 10)
    dh, dw, db = torch.ops.hotloop.linear_divergence_backward(
        *heads, packed, grad[0], labels, *ctx.rest
    )
    return dh, dw, None if heads[2] is None else db, *([None] * 10)


_linear_divergence.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("hotloop::logit_divergence", mutates_args=())
def _logit_divergence(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    beta: float,
    delta: float,
    numbers: list[float],
    impl: str,
) -> Tensor:
    """Return [8, N] as ``linear_divergence``."""
    rows = logit_forward(
        impl, _divergence(kind, beta, delta, numbers), student.contiguous(), teacher.contiguous()
    )
    return _pack(rows, None, student.shape[0])


@_logit_divergence.register_fake
def _(
    student: Tensor,
    teacher: Tensor,
    kind: str,
    beta: float,
    delta: float,
    numbers: list[float],
    impl: str,
) -> Tensor:
    return student.new_empty((8, student.shape[0]), dtype=accumulate_dtype(student.dtype))


@torch.library.custom_op("hotloop::logit_divergence_backward", mutates_args=())
def _logit_divergence_backward(
    student: Tensor, teacher: Tensor, packed: Tensor, grad: Tensor,
    kind: str, beta: float, delta: float, numbers: list[float], impl: str,
) -> Tensor:  # fmt: skip
    d = _divergence(kind, beta, delta, numbers)
    gradient = logit_backward(impl, d, student, teacher.contiguous(), _unpack(packed, None), grad)
    # A masked row comes with gradient 0; whatever stands in it must not come out as NaN.
    return gradient.masked_fill_((grad == 0).unsqueeze(1), 0.0)


@_logit_divergence_backward.register_fake
def _(
    student: Tensor, teacher: Tensor, packed: Tensor, grad: Tensor,
    kind: str, beta: float, delta: float, numbers: list[float], impl: str,
) -> Tensor:  # fmt: skip
    return student.new_empty(student.shape)


def _logit_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output)
    ctx.rest = inputs[2:]


def _logit_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    student, teacher, packed = ctx.saved_tensors
    if torch.is_grad_enabled():
        # The front door masks rows: a loss of NaN without a gradient from above is that of a masked one.
        labels = ((grad[0] == 0) & ~packed[0].isfinite()).to(torch.int64).neg()
        d = _logit_differentiable(ctx.rest[:4], student, teacher, labels, -1, grad[0])
        return d, *([None] * 6)
    gradient = torch.ops.hotloop.logit_divergence_backward(
        student, teacher, packed, grad[0], *ctx.rest
    )
    return gradient, *([None] * 6)


_logit_divergence.register_autograd(_logit_backward, setup_context=_logit_setup)


# -- what the front doors call ------------------------------------------------------------------------------


def options(
    op: str, kind: str, beta: float, delta: float, temperature: float, reduction: str
) -> Terms:
    check.choice(op, "divergence_kind", kind, KINDS)
    check.choice(op, "reduction", reduction, check.REDUCTIONS)
    check.number(op, "beta", beta, at_least=0, at_most=1)
    check.number(op, "delta", delta, at_least=1)
    logit = _arguments.logit_numbers(op, temperature, 1.0, None)
    if kind == "jsd" and beta in (0, 1):
        kind = "forward_kl" if beta == 0 else "reverse_kl"  # by definition, not as a limit
    return kind, beta, delta, (*logit, *logit)


def _not_too_hot(op: str, terms: Terms, like: Tensor) -> None:
    """Refuse a temperature at which the value would be rounding alone.

    A divergence falls as 1 / T^2, the rounding of its log-probabilities does not fall: the relative error is about
    T^2 eps.
    """
    wide = like.dtype == torch.float64
    hottest = 1e7 if wide else 1e3
    if terms[3][0] > hottest:
        cure = "" if wide else " Pass float64."
        raise ValueError(
            f"[{op}] temperature: expected at most {hottest:g} for {arrays.dtype(like)}, got {terms[3][0]!r}: "
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


def reference_rows(terms: Terms, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of each row in plain torch, from logits that are not yet divided by the temperature."""
    kind, beta, delta, numbers = terms
    s, t = reference.map_logits(student, *numbers[:3]), reference.map_logits(teacher, *numbers[3:])
    scale = numbers[0] ** 2
    if kind == "log_cosh":
        x = (s - t) / 2
        return scale * (x.abs() + torch.log1p(torch.exp(-2 * x.abs())) - math.log(2)).sum(-1)
    found = reference.divergences(s, t, beta)
    if kind == "balanced":
        sharper = found["teacher_entropy"] > found["student_entropy"]
        forward = torch.where(sharper, delta, 1.0) * found["forward_kl"]
        reverse = torch.where(sharper, 1.0, delta) * found["reverse_kl"]
        return scale * (forward + reverse)
    return found[kind]


def reference_of_heads(
    terms: Terms, student: _Head, teacher: _Head, labels: Tensor, ignore_index: int
) -> Tensor:
    valid = labels != ignore_index
    (hidden, *head), (teacher_hidden, *teacher_head) = student, teacher
    hidden, teacher_hidden = (
        torch.where(valid.unsqueeze(1), h, 0.0) for h in (hidden, teacher_hidden)
    )
    rows = reference_rows(
        terms,
        reference.logits_of(hidden, *head),  # type: ignore[arg-type]
        reference.logits_of(teacher_hidden, *teacher_head),  # type: ignore[arg-type]
    )
    return torch.where(valid, rows, 0.0)


def reference_of_logits(
    terms: Terms, student: Tensor, teacher: Tensor, labels: Tensor, ignore_index: int
) -> Tensor:
    valid = labels != ignore_index
    student, teacher = (torch.where(valid.unsqueeze(1), z, 0.0) for z in (student, teacher))
    return torch.where(valid, reference_rows(terms, student, teacher), 0.0)


def of_heads(
    op: str,
    student: tuple[Any, Any, Any],
    teacher: tuple[Any, Any, Any],
    labels: Tensor | None,
    terms: Terms,
    ignore_index: int,
    reduction: str,
    impl: Impl,
) -> Tensor:
    shape = check.tensor(op, "student_hidden", student[0]).shape[:-1]
    hidden, weight, bias = _arguments.head(
        op, *student, ("student_hidden", "student_weight", "student_bias")
    )
    _not_too_hot(op, terms, hidden)
    with torch.no_grad():
        teacher_head = _arguments.head(
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
    if labels is None:
        # Every row counts, whatever the caller's ignore_index is: 0 would take these labels for masked.
        ignore_index = IGNORE_INDEX
        flat_labels = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    else:
        flat_labels = _arguments.labels(
            op, labels, shape, weight.shape[0], ignore_index, "student_hidden", hidden.device
        )
    chosen = choose(op, impl, "student_hidden", student[0], _candidates(terms))
    teacher_head = tuple(None if x is None else x.detach() for x in teacher_head)  # type: ignore[assignment]
    if chosen == "reference":
        student_head = (hidden, weight, bias)
        rows = reference_of_heads(terms, student_head, teacher_head, flat_labels, ignore_index)
    elif torch.compiler.is_compiling():
        rows = torch.ops.hotloop.linear_divergence(
            hidden, weight, bias, *teacher_head, flat_labels, ignore_index, *terms, chosen
        )[0]
    else:
        check.untransformed(op, hidden, weight, bias)
        rows = _LinearDivergence.apply(
            hidden,
            weight,
            bias,
            teacher_head,
            flat_labels,
            terms,
            ignore_index,
            chosen,
            torch.is_grad_enabled(),
        )
    return reduce(rows, flat_labels, ignore_index, reduction, shape)


def of_logits(
    op: str,
    student: Any,
    teacher: Any,
    labels: Tensor | None,
    terms: Terms,
    ignore_index: int,
    reduction: str,
    impl: Impl,
) -> Tensor:
    student = check.float_tensor(op, "student_logits", student)
    teacher = check.float_tensor(op, "teacher_logits", teacher)
    _not_too_hot(op, terms, student)
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
    vocabulary = student.shape[-1]
    flat, flat_teacher = _arguments.rows_of(student), _arguments.rows_of(teacher.detach())
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    flat_teacher = flat_teacher if flat_teacher.stride(-1) == 1 else flat_teacher.contiguous()
    if labels is None:
        # Every row counts, whatever the caller's ignore_index is: 0 would take these labels for masked.
        ignore_index = IGNORE_INDEX
        flat_labels = torch.zeros(flat.shape[0], dtype=torch.int64, device=flat.device)
    else:
        flat_labels = _arguments.labels(
            op, labels, shape, vocabulary, ignore_index, "student_logits", flat.device
        )
    check.finite(op, student_logits=student, teacher_logits=teacher)
    chosen = choose(op, impl, "student_logits", student, _candidates(terms))
    if chosen == "reference":
        rows = reference_of_logits(terms, flat, flat_teacher, flat_labels, ignore_index)
    elif torch.compiler.is_compiling():
        rows = torch.ops.hotloop.logit_divergence(flat, flat_teacher, *terms, chosen)[0]
        rows = torch.where(flat_labels != ignore_index, rows, 0.0)
    else:
        check.untransformed(op, flat)
        rows = _LogitDivergence.apply(flat, flat_teacher, flat_labels, terms, ignore_index, chosen)
    return reduce(rows, flat_labels, ignore_index, reduction, shape)


def _no_log_cosh(like: Tensor) -> str | None:
    return "log_cosh has no Triton kernel yet"


def _candidates(terms: Terms) -> Mapping[str, Refuses]:
    return _backend.CANDIDATES | ({"triton": _no_log_cosh} if terms[0] == "log_cosh" else {})


__all__ = ["IGNORE_INDEX", "KINDS", "Divergence", "of_heads", "of_logits", "options"]
