"""Two heads over one vocabulary on the GPU: the Triton kernels behind the interface of ``_two_heads``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _two_heads
from ._two_heads import Divergence, Rows

_Head = tuple[Tensor, Tensor, Tensor | None]


def _kernels() -> Any:
    from ..kernels.logprob import linear_divergence

    return linear_divergence


def _maps(d: Divergence) -> dict[str, float]:
    return {
        "student_scale": d.student.logit_scale, "student_softcap": d.student.softcap or 0.0,
        "student_temperature": d.student.temperature, "teacher_scale": d.teacher.logit_scale,
        "teacher_softcap": d.teacher.softcap or 0.0, "teacher_temperature": d.teacher.temperature,
    }  # fmt: skip


def forward(d: Divergence, student: _Head, teacher: _Head, labels: Tensor, ignore_index: int) -> Rows:
    common = {"labels": labels, "ignore_index": ignore_index, **_maps(d)}
    statistics = _kernels().statistics(student, teacher, **common)
    rows = _two_heads.combine(
        d, statistics, lambda lse: _kernels().mixture(student, teacher, lse, beta=d.beta, **common)
    )
    rows.loss = torch.where(labels != ignore_index, rows.loss, 0.0)
    return rows


def backward(
    d: Divergence, student: _Head, teacher: _Head, rows: Rows, labels: Tensor, ignore_index: int, grad: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    packed = _two_heads.coefficients(rows, grad)
    result: tuple[Tensor | None, Tensor | None, Tensor | None] = _kernels().gradient(
        student, teacher, packed, beta=d.beta, mixture=d.mixture, labels=labels, ignore_index=ignore_index,
        need_hidden=need[0], need_weight=need[1], need_bias=need[2], **_maps(d),
    )  # fmt: skip
    return result


def logit_forward(d: Divergence, student: Tensor, teacher: Tensor) -> Rows:
    statistics = _kernels().logits_statistics(student, teacher, **_maps(d))
    return _two_heads.combine(
        d, statistics, lambda lse: _kernels().logits_mixture(student, teacher, lse, beta=d.beta, **_maps(d))
    )


def logit_backward(d: Divergence, student: Tensor, teacher: Tensor, rows: Rows, grad: Tensor) -> Tensor:
    packed = _two_heads.coefficients(rows, grad)
    gradient: Tensor = _kernels().logits_gradient(
        student, teacher, packed, beta=d.beta, mixture=d.mixture, **_maps(d)
    )
    return gradient
