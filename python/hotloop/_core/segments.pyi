from __future__ import annotations

import typing

def counting_sort(
    keys: typing.Any, num_keys: int, order: typing.Any, counts: typing.Any, offsets: typing.Any
) -> int: ...
def reduce(
    reduction: str,
    values: typing.Any,
    count: int,
    offsets: typing.Any,
    ids: typing.Any,
    mask: typing.Any,
    out: typing.Any,
    counts: typing.Any,
    rows: typing.Any,
) -> bool: ...
def spread(
    reduction: str,
    grad: typing.Any,
    count: int,
    offsets: typing.Any,
    ids: typing.Any,
    mask: typing.Any,
    counts: typing.Any,
    rows: typing.Any,
    values: typing.Any,
    out: typing.Any,
    result: typing.Any,
) -> None: ...
