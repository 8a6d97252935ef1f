# SPDX-License-Identifier: Apache-2.0
"""What the tests of replicas share: a table, its snapshot, and what the two of them have to agree in."""

from __future__ import annotations

import numpy as np
from hotloop.table import CountFilter, Delta, Table, _export
from hotloop.table.files import replicas, snapshots
from table_checks import assert_rows

ONES = np.ones((9, 1), np.float32)


def insert(table: Table, *keys: int, value: float = 1.0) -> np.ndarray:
    return table.insert_or_assign(
        np.array(keys), np.full((len(keys), table.dim), value, np.float32)
    )


def keys_of(table: Table) -> list[int]:
    return table.export().keys.tolist()


def assert_same(found: Table, wanted: Table) -> None:
    """Rows with all their columns, clocks and the filter."""
    assert_rows(found, wanted)
    assert replicas.clock(found) == replicas.clock(wanted)
    if isinstance(wanted.admission, CountFilter):
        state, theirs = found.admission.state_dict(), wanted.admission.state_dict()
        for name, value in theirs.items():
            np.testing.assert_array_equal(state[name], value, name)


def replica_of(table: Table, directory, **options) -> Table:
    table.save(directory / "snapshot")
    return Table.load(directory / "snapshot", **options)


def with_(delta: Delta, **changes) -> Delta:
    names = Delta.__dataclass_fields__
    return Delta(**{**{name: getattr(delta, name) for name in names}, **changes})


def at_work(monkeypatch, change, first: int = 0) -> None:
    """Call ``change`` between the look at what was erased and that at the rows of the next delta or snapshot.

    With ``first``, rows are read in blocks of so many, and it is called after the first block.
    """
    real, left = _export.blocks, [change]

    def blocks(made, rows, since):
        if not first and left:
            left.pop()()
        for block in real(made, first or rows, since):
            yield block
            if left:
                left.pop()()

    monkeypatch.setattr(_export, "blocks", blocks)


def during_save(monkeypatch, change) -> None:
    """Call ``change`` after the first block of the next snapshot has been filed."""
    real, left = snapshots._Writer.add, [change]

    def add(self, block):
        real(self, block)
        if left:
            left.pop()()

    monkeypatch.setattr(snapshots._Writer, "add", add)
