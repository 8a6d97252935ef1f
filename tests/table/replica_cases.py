"""What the tests of replicas share: a table, its snapshot, and what the two of them have to agree in."""

from __future__ import annotations

import numpy as np
from hotloop.table import CountFilter, Delta, Table, _export
from hotloop.table.files import replicas

ONES = np.ones((9, 1), np.float32)


def insert(table: Table, *keys: int, value: float = 1.0) -> np.ndarray:
    return table.insert_or_assign(
        np.array(keys), np.full((len(keys), table.dim), value, np.float32)
    )


def keys_of(table: Table) -> list[int]:
    return table.export().keys.tolist()


def assert_same(found: Table, wanted: Table) -> None:
    """Rows with all their columns, clocks and the filter."""
    for name, a, b in zip(wanted.export()._fields, found.export(), wanted.export()):
        np.testing.assert_array_equal(a, b, name)
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


def at_work(monkeypatch, change) -> None:
    """Call ``change`` between the look at what was erased and that at the rows of the next delta or snapshot."""
    real, left = _export.blocks, [1]

    def blocks(*given):
        if left.pop() if left else 0:
            change()
        yield from real(*given)

    monkeypatch.setattr(_export, "blocks", blocks)
