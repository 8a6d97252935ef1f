from __future__ import annotations

import collections.abc
import typing

def are_marks(rows: typing.Any) -> bool: ...
def pair_heads() -> dict[str, typing.Any]: ...
def pair_loop(
    head: str,
    n: int,
    inputs: list[typing.Any],
    params: collections.abc.Sequence[float],
    loss: typing.Any,
    grads: list[typing.Any],
    grad_scale: float,
    total: bool,
    double_precision: bool,
) -> float: ...
def within(rows: typing.Any, high: float, open: bool) -> bool: ...
