from __future__ import annotations

import collections.abc
import typing

def heads() -> dict[str, typing.Any]: ...
def run(
    head: int,
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
    weight: typing.Any = None,
    groups: typing.Any = None,
    outs: typing.Any = None,
    counted: typing.Any = None,
) -> int: ...

MAX_OUTS: int = 8
PARTIALS: int = 1024
