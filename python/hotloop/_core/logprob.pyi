# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

def divergence(
    mode: str,
    student: Any,
    teacher: Any,
    student_bias: Any,
    teacher_bias: Any,
    student_logit: tuple[Any, ...],
    teacher_logit: tuple[Any, ...],
    beta: float,
    statistics: Any,
    coefficients: Any,
    mixture: Any,
) -> None: ...
def log_cosh(
    student: Any,
    teacher: Any,
    student_bias: Any,
    teacher_bias: Any,
    student_logit: tuple[Any, ...],
    teacher_logit: tuple[Any, ...],
    sums: Any,
    weights: Any,
) -> None: ...
def row_gradient(
    tile: Any, bias: Any, labels: Any, first_column: int, logit: tuple[Any, ...], coefficients: Any
) -> None: ...
def row_statistics(
    tile: Any,
    bias: Any,
    labels: Any,
    first_column: int,
    logit: tuple[Any, ...],
    all: bool,
    statistics: Any,
    argmax: Any,
) -> None: ...

DIVERGENCE_STATISTICS: int = 8
STATISTICS: int = 6
