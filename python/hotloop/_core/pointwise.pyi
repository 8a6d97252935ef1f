from __future__ import annotations

import collections.abc
import typing

def are_marks(rows: typing.Any) -> bool: ...
def heads() -> dict[str, typing.Any]: ...
def run(
    head: int,
    n: int,
    inputs: list[typing.Any],
    params: collections.abc.Sequence[float],
    loss: typing.Any,
    grads: list[typing.Any],
    grad_scale: float,
    total: bool,
    double_precision: bool,
    weight: typing.Any = None,
    groups: typing.Any = None,
    outs: bool = False,
) -> typing.Any: ...
def within(rows: typing.Any, high: float, open: bool) -> bool: ...
