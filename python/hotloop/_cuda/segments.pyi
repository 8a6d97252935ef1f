from __future__ import annotations

import typing

def counting_sort(
    keys: typing.Any,
    num_keys: int,
    order: typing.Any,
    counts: typing.Any,
    offsets: typing.Any,
    other: typing.Any,
    starts: typing.Any,
    device: int,
    stream: int,
) -> None: ...
def reduce(
    reduction: str,
    values: typing.Any,
    count: int,
    offsets: typing.Any,
    order: typing.Any,
    mask: typing.Any,
    out: typing.Any,
    counts: typing.Any,
    rows: typing.Any,
    parts: typing.Any,
    device: int,
    stream: int,
) -> None: ...
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
    device: int,
    stream: int,
) -> None: ...

SORT_TILE: int = 1024
TILE: int = 1024
