# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

def counting_sort(
    keys: Any,
    num_keys: int,
    order: Any,
    counts: Any,
    offsets: Any,
    other: Any,
    starts: Any,
    device: int,
    stream: int,
) -> None: ...
def reduce(
    reduction: str,
    values: Any,
    count: int,
    offsets: Any,
    order: Any,
    mask: Any,
    out: Any,
    counts: Any,
    rows: Any,
    parts: Any,
    device: int,
    stream: int,
) -> None: ...
def spread(
    reduction: str,
    grad: Any,
    count: int,
    offsets: Any,
    ids: Any,
    mask: Any,
    counts: Any,
    rows: Any,
    values: Any,
    out: Any,
    result: Any,
    device: int,
    stream: int,
) -> None: ...

SORT_TILE: int = 1024
TILE: int = 1024
