"""Two heads over one vocabulary on the GPU: the Triton kernels behind the interface of ``_two_heads``."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from . import _two_heads
from ._cpu import LogitMap
from ._two_heads import Divergence, Rows

_Head = tuple[Tensor, Tensor, Tensor | None]


def _kernels() -> Any:
    return importlib.import_module("hotloop.kernels.logprob.linear_divergence")


def _transform(m: LogitMap) -> Any:
    return _kernels().Transform(m.logit_scale, m.softcap or 0.0, m.temperature)


def _heads(d: Divergence, student: _Head, teacher: _Head) -> tuple[Any, Any]:
    return tuple(
        _kernels().Head(h, w, None if b is None else b.float(), _transform(m))
        for (h, w, b), m in ((student, d.student), (teacher, d.teacher))
    )


def _logits(d: Divergence, student: Tensor, teacher: Tensor) -> tuple[Any, Any]:
    k = _kernels()
    return k.Logits(student, None, _transform(d.student)), k.Logits(
        teacher, None, _transform(d.teacher)
    )


def forward(
    d: Divergence, student: _Head, teacher: _Head, labels: Tensor, ignore_index: int
) -> Rows:
    k, (s, t), valid = _kernels(), _heads(d, student, teacher), labels != ignore_index
    return _two_heads.combine(
        d,
        k.statistics(s, t, valid=valid),
        lambda lse: k.mixture(s, t, lse, beta=d.beta, valid=valid),
    )


def backward(
    d: Divergence, student: _Head, teacher: _Head, rows: Rows, labels: Tensor, ignore_index: int, grad: Tensor,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    result: tuple[Tensor | None, Tensor | None, Tensor | None] = _kernels().gradient(
        *_heads(d, student, teacher), _two_heads.coefficients(rows, grad), beta=d.beta, jsd=d.mixture,
        valid=labels != ignore_index, need_hidden=need[0], need_weight=need[1], need_bias=need[2],
    )  # fmt: skip
    return result


def logit_forward(d: Divergence, student: Tensor, teacher: Tensor) -> Rows:
    k, (s, t) = _kernels(), _logits(d, student, teacher)
    return _two_heads.combine(d, k.statistics(s, t), lambda lse: k.mixture(s, t, lse, beta=d.beta))


def logit_backward(
    d: Divergence, student: Tensor, teacher: Tensor, rows: Rows, grad: Tensor
) -> Tensor:
    gradient: Tensor = _kernels().logits_gradient(
        *_logits(d, student, teacher),
        _two_heads.coefficients(rows, grad),
        beta=d.beta,
        jsd=d.mixture,
    )
    return gradient
