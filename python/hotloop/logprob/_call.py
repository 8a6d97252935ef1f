# SPDX-License-Identifier: Apache-2.0
"""One call of an lm_head, or over given logits, as every implementation takes it.

Tuples, not dataclasses: Dynamo of torch 2.11 stops at a frozen dataclass that is made while it traces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class LogitMap(NamedTuple):
    """From the matrix product u to the logit: z = cap(logit_scale * (u + bias)) / temperature.

    cap(x) = ``softcap`` * tanh(x / ``softcap``), or x where ``softcap`` is None. Ranges as in ``linear_logprob``.
    """

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, temperature: float, logit_scale: float, softcap: float) -> LogitMap:
        """From the numbers of an operator, whose softcap 0 means none."""
        return cls(temperature, logit_scale, softcap or None)

    def numbers(self) -> tuple[float, float, float]:
        """As operators take it: temperature, logit scale and softcap, 0 for none."""
        return (self.temperature, self.logit_scale, self.softcap or 0.0)

    def native(self) -> tuple[float, float, float]:
        """As the compiled loops take it: logit scale, softcap and temperature."""
        return (self.logit_scale, self.softcap or 0.0, self.temperature)


class LmHeadCall(NamedTuple):
    """Hidden states [N, D] under an lm_head [V, D], and the label of each row."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    ignore_index: int
    logit: LogitMap
    impl: str
    first_column: int = 0

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, *rest: Any
    ) -> LmHeadCall:  # fmt: skip
        """From the arguments of an operator: the three numbers of a ``LogitMap``, then the implementation."""
        return cls(hidden, weight, bias, labels, ignore_index, LogitMap.of(*rest[:3]), rest[3])


class LogitsCall(NamedTuple):
    """Logits [N, V] before scale, cap and temperature, and the label of each row."""

    logits: Tensor
    labels: Tensor
    ignore_index: int
    logit: LogitMap
    impl: str

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, ignore_index: int, *rest: Any) -> LogitsCall:
        """As ``LmHeadCall.of``."""
        return cls(logits, labels, ignore_index, LogitMap.of(*rest[:3]), rest[3])


class Divergence(NamedTuple):
    """What is measured between teacher p and student q, and the weights of its forms."""

    kind: str
    beta: float = 0.5
    delta: float = 2.0
    student: LogitMap = LogitMap()
    teacher: LogitMap = LogitMap()

    @classmethod
    def of(cls, kind: str, beta: float, delta: float, numbers: Sequence[float]) -> Divergence:
        """From the arguments of an operator: the numbers are those of the student's and the teacher's ``LogitMap``."""
        return cls(kind, beta, delta, LogitMap.of(*numbers[:3]), LogitMap.of(*numbers[3:]))

    def packed(self) -> tuple[str, float, float, list[float]]:
        """As operators take it."""
        return (*self[:3], [*self.student.numbers(), *self.teacher.numbers()])


LmHead = tuple[Tensor, Tensor, Tensor | None]
"""Hidden states, lm_head, bias."""


class DivergenceCall(NamedTuple):
    """The lm_heads of student and teacher over one vocabulary; labels say which rows count."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor | None
    labels: Tensor
    ignore_index: int
    divergence: Divergence
    impl: str

    @classmethod
    def of(cls, *arguments: Any) -> DivergenceCall:
        """From the arguments of an operator."""
        return cls._make((*arguments[:8], Divergence.of(*arguments[8:12]), arguments[12]))

    @property
    def student(self) -> LmHead:
        return self[:3]

    @property
    def teacher(self) -> LmHead:
        return self[3:6]
