# SPDX-License-Identifier: Apache-2.0
"""What pickle and copy make of a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from .. import _export
from .._store import SETTINGS, Store

_T = TypeVar("_T", bound=Store)


def reduced(table: Store) -> tuple[Any, ...]:
    """What pickle and copy make a table of: everything but who it is to its replicas."""
    settings = {name: getattr(table, name) for name in SETTINGS}
    settings["capacity"] = max(table.size, 1)
    blocks = [_export.arrays_of(table, block) for block in _export.blocks(table, _export.BLOCK, 0)]
    numbers = (table.value_range, table._step, int(table._native.tick), table._epoch)
    return restored, (type(table), settings, blocks, numbers)


def restored(
    cls: Callable[..., _T], settings: dict[str, Any], blocks: list[dict[str, Any]], numbers: Any
) -> _T:
    table = cls(**settings)
    for block in blocks:
        n, columns = _export.fitting("Table.copy", table, block)
        table._native.import_rows(n, columns, True)
    table.value_range, table._step, table._native.tick, table._epoch = numbers
    return table
