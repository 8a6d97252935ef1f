from __future__ import annotations

import collections.abc
import typing

def pair_heads() -> dict[str, typing.Any]: ...
def pair_loop(
    head: str,
    n: int,
    inputs: list[typing.Any],
    params: collections.abc.Sequence[float],
    loss: typing.Any,
    grads: list[typing.Any],
    grad_scale: float,
    total: typing.Any,
    partials: typing.Any,
    double_precision: bool,
    device: int,
    stream: int,
) -> None: ...

PAIR_PARTIALS: int = 1024
