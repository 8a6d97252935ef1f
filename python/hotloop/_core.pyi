from collections.abc import Sequence
from typing import Any

LOGPROB_STATISTICS: int
DIVERGENCE_STATISTICS: int

def map(name: str, x: Any, out: Any) -> None: ...
def map_names() -> list[str]: ...
def philox_fill(seed: int, offset: int, first_item: int, out: Any) -> None: ...
def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]: ...
def simd_level() -> str: ...
def force_simd_level(level: str) -> None: ...
def last_simd_level() -> str: ...
def simd_levels() -> dict[str, bool]: ...
def max_threads() -> int: ...
def advise_huge_pages(address: int, bytes: int) -> None: ...
def describe(array: Any) -> dict[str, Any]: ...
def row_statistics(
    tile: Any,
    bias: Any,
    labels: Any,
    first_column: int,
    logit: tuple[float, float, float],
    all: bool,
    statistics: Any,
    argmax: Any,
) -> None: ...
def row_gradient(
    tile: Any,
    bias: Any,
    labels: Any,
    first_column: int,
    logit: tuple[float, float, float],
    coefficients: Any,
) -> None: ...
def divergence(
    mode: str,
    student: Any,
    teacher: Any,
    student_bias: Any,
    teacher_bias: Any,
    student_logit: tuple[float, float, float],
    teacher_logit: tuple[float, float, float],
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
    student_logit: tuple[float, float, float],
    teacher_logit: tuple[float, float, float],
    sums: Any,
    weights: Any,
) -> None: ...
def pair_loop(
    head: str,
    n: int,
    inputs: list[Any],
    params: Sequence[float],
    loss: Any,
    grads: list[Any],
    grad_scale: float,
    total: bool,
    double_precision: bool,
) -> float: ...
def pair_heads() -> dict[str, tuple[int, int, int]]: ...
