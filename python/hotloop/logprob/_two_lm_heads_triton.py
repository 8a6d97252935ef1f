# SPDX-License-Identifier: Apache-2.0
"""Two lm_heads over one vocabulary on the GPU: the Triton kernels behind the interface of ``_two_lm_heads``."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from . import _two_lm_heads
from ._call import Divergence, DivergenceCall, LogitMap
from ._two_lm_heads import Rows


def _kernels() -> Any:
    return importlib.import_module("hotloop.kernels.logprob.linear_divergence")


def _transform(m: LogitMap) -> Any:
    return _kernels().Transform(*m.native())


def _heads(call: DivergenceCall) -> tuple[Any, Any]:
    d = call.divergence
    return tuple(
        _kernels().LmHead(h, w, None if b is None else b.float(), _transform(m))
        for (h, w, b), m in ((call.student, d.student), (call.teacher, d.teacher))
    )


def _logits(d: Divergence, student: Tensor, teacher: Tensor) -> tuple[Any, Any]:
    logits = _kernels().Logits
    return logits(student, None, _transform(d.student)), logits(
        teacher, None, _transform(d.teacher)
    )


def _forward(d: Divergence, s: Any, t: Any, **valid: Tensor) -> Rows:
    k = _kernels()
    return _two_lm_heads.combine(
        d, k.statistics(s, t, **valid), lambda lse: k.mixture(s, t, lse, beta=d.beta, **valid)
    )


def forward(call: DivergenceCall) -> Rows:
    return _forward(call.divergence, *_heads(call), valid=call.labels != call.ignore_index)


def backward(
    call: DivergenceCall, rows: Rows, grad: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d = call.divergence
    result: tuple[Tensor | None, Tensor | None, Tensor | None] = _kernels().gradient(
        *_heads(call), _two_lm_heads.coefficients(rows, grad), beta=d.beta, jsd=d.kind == "jsd",
        valid=call.labels != call.ignore_index, need_hidden=need[0], need_weight=need[1], need_bias=need[2],
    )  # fmt: skip
    return result


def logit_forward(d: Divergence, student: Tensor, teacher: Tensor) -> Rows:
    return _forward(d, *_logits(d, student, teacher))


def logit_backward(
    d: Divergence, student: Tensor, teacher: Tensor, rows: Rows, grad: Tensor
) -> Tensor:
    gradient: Tensor = _kernels().logits_gradient(
        *_logits(d, student, teacher), _two_lm_heads.coefficients(rows, grad), beta=d.beta, jsd=d.kind == "jsd"
    )  # fmt: skip
    return gradient
