from collections.abc import Callable, Sequence
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
def decode_chain(
    whole_block: bool,
    batch: int,
    width: int,
    ids: Any,
    target: tuple[Any, ...],
    draft: tuple[Any, ...] | None,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
    workspace: Callable[[int], Any],
    device: int,
    stream: int,
) -> None: ...
def decode_tree(
    batch: int,
    width: int,
    depth: int,
    ids: Any,
    parents: Any,
    target: tuple[Any, ...],
    draft: tuple[Any, ...] | None,
    replacement: bool,
    lengths: Any,
    seed: Any,
    offset: Any,
    outputs: tuple[Any, ...],
    nodes: Any,
    workspace: Callable[[int], Any],
    device: int,
    stream: int,
) -> None: ...
def decode_sample(
    batch: int,
    rows: int,
    law: tuple[Any, ...],
    seed: Any,
    offset: Any,
    ids: Any,
    logps: Any,
    workspace: Callable[[int], Any],
    device: int,
    stream: int,
) -> None: ...
