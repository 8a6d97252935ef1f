from collections.abc import Sequence
from typing import Any

PAIR_PARTIALS: int

def device_count() -> int: ...
def architectures() -> list[str]: ...
def pair_heads() -> dict[str, tuple[int, int, int]]: ...
def pair_loop(
    head: str,
    n: int,
    inputs: list[Any],
    params: Sequence[float],
    loss: Any,
    grads: list[Any],
    grad_scale: float,
    total: Any,
    partials: Any,
    double_precision: bool,
    device: int,
    stream: int,
) -> None: ...
