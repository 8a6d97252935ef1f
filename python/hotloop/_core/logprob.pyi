from __future__ import annotations

import typing

def divergence(
    mode: str,
    student: typing.Any,
    teacher: typing.Any,
    student_bias: typing.Any,
    teacher_bias: typing.Any,
    student_logit: tuple[typing.Any, ...],
    teacher_logit: tuple[typing.Any, ...],
    beta: float,
    statistics: typing.Any,
    coefficients: typing.Any,
    mixture: typing.Any,
) -> None: ...
def log_cosh(
    student: typing.Any,
    teacher: typing.Any,
    student_bias: typing.Any,
    teacher_bias: typing.Any,
    student_logit: tuple[typing.Any, ...],
    teacher_logit: tuple[typing.Any, ...],
    sums: typing.Any,
    weights: typing.Any,
) -> None: ...
def row_gradient(
    tile: typing.Any,
    bias: typing.Any,
    labels: typing.Any,
    first_column: int,
    logit: tuple[typing.Any, ...],
    coefficients: typing.Any,
) -> None: ...
def row_statistics(
    tile: typing.Any,
    bias: typing.Any,
    labels: typing.Any,
    first_column: int,
    logit: tuple[typing.Any, ...],
    all: bool,
    statistics: typing.Any,
    argmax: typing.Any,
) -> None: ...

DIVERGENCE_STATISTICS: int = 8
STATISTICS: int = 6
