"""What ``Table`` says to a wrong argument: the argument, what was expected, what came, and nothing is written."""

import numpy as np
import pytest
import torch
from hotloop.table import SGD, Adagrad, Table, TableFullError

KEYS = np.array([1, 2, 3])
VALUES = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("settings", "kind", "text"),
    [
        ({"dim": 0}, ValueError, "dim: expected an integer >= 1 and <= 65536, got 0"),
        ({"dim": 65537}, ValueError, "dim: expected an integer >= 1 and <= 65536, got 65537"),
        ({"dim": 2.0}, TypeError, "dim: expected an integer, got float"),
        (
            {"capacity": 0},
            ValueError,
            "capacity: expected an integer >= 1 and <= 4294967280, got 0",
        ),
        ({"capacity": 2**32}, ValueError, "capacity: expected an integer >= 1 and <= 429496728"),
        ({"capacity": 9, "max_capacity": 8}, ValueError, "capacity: .* <= 8, got 9"),
        ({"max_capacity": 0}, ValueError, "max_capacity: expected an integer >= 1"),
        ({"max_capacity": True}, TypeError, "max_capacity: expected an integer, got bool"),
        (
            {"evict_strategy": "fifo"},
            ValueError,
            "evict_strategy: expected one of none, lru, lfu, epoch_lru, epoch_lfu, custom, got 'fifo'",
        ),
        (
            {"evict_strategy": "lru"},
            ValueError,
            "max_capacity: expected a bound .* 'lru', got None",
        ),
        ({"dtype": "float64"}, ValueError, "dtype: expected one of float32, .*, got 'float64'"),
        ({"track": "time"}, ValueError, "track: expected one of use, changes, got 'time'"),
        ({"track": ("use", 3)}, ValueError, "track: expected one of use, changes, got 3"),
        ({"admission": 3}, TypeError, "admission: expected CountFilter, .* or None, got int"),
        ({"optimizer": "sgd"}, TypeError, "optimizer: expected RowOptimizer or None, got str"),
        ({"initializer": 0.1}, TypeError, "initializer: expected Constant, Uniform, .* got float"),
        (
            {"dtype": "int8", "optimizer": SGD()},
            ValueError,
            "optimizer: expected None with dtype int8",
        ),
    ],
)
def test_settings(settings, kind, text):
    with pytest.raises(kind, match=r"^\[Table\] " + text):
        Table(**{"dim": 2, **settings})


CALLS = {
    "find": lambda t, k: t.find(k),
    "contains": lambda t, k: t.contains(k),
    "scores": lambda t, k: t.scores(k),
    "find_or_insert": lambda t, k: t.find_or_insert(k),
    "insert_or_assign": lambda t, k: t.insert_or_assign(k, VALUES),
    "insert_and_evict": lambda t, k: t.insert_and_evict(k, VALUES),
    "assign": lambda t, k: t.assign(k, VALUES),
    "accum_or_assign": lambda t, k: t.accum_or_assign(k, VALUES, np.ones(3, bool)),
    "erase": lambda t, k: t.erase(k),
    "update": lambda t, k: t.update(k, VALUES),
}


@pytest.mark.parametrize("verb", CALLS)
@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ([1, 2, 3], TypeError, "keys: expected a NumPy, torch or CuPy array, got list. Use numpy"),
        (
            KEYS.astype(np.float64),
            TypeError,
            "keys: expected dtype int64, uint64, int32, got float64",
        ),
        (KEYS.astype(np.uint8), TypeError, "keys: expected dtype int64, uint64, int32, got uint8"),
        (KEYS[:, None], ValueError, r"keys: expected 1 dimension\(s\), got shape \(3, 1\)"),
        (np.int64(3), TypeError, "keys: expected a NumPy, torch or CuPy array, got int64"),
        (
            torch.empty(3, dtype=torch.int64, device="meta"),
            NotImplementedError,
            "keys: .* got meta",
        ),
    ],
)
def test_keys(verb, keys, kind, text):
    table = Table(2, max_capacity=10, evict_strategy="lru", optimizer=SGD())
    with pytest.raises(kind, match=rf"^\[Table\.{verb}\] {text}"):
        CALLS[verb](table, keys)
    assert len(table) == 0


WRITES = {
    "insert_or_assign": lambda t, v, **o: t.insert_or_assign(KEYS, v, **o),
    "insert_and_evict": lambda t, v, **o: t.insert_and_evict(KEYS, v, **o),
    "assign": lambda t, v, **o: t.assign(KEYS, v, **o),
    "accum_or_assign": lambda t, v, **o: t.accum_or_assign(KEYS, v, np.zeros(3, bool), **o),
}


@pytest.mark.parametrize("verb", [*WRITES, "update"])
@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        (VALUES[:2], ValueError, r"expected shape \(3, 2\), got \(2, 2\)"),
        (np.ones((4, 2), np.float32), ValueError, r"expected shape \(3, 2\), got \(4, 2\)"),
        (np.ones((3, 3), np.float32), ValueError, r"expected shape \(3, 2\), got \(3, 3\)"),
        (VALUES[:, 0], ValueError, r"expected 2 dimension\(s\), got shape \(3,\)"),
        (VALUES.astype(np.float64), TypeError, "expected dtype float32, got float64"),
        (VALUES.astype(np.float16), TypeError, "expected dtype float32, got float16"),
        (torch.ones(3, 2), TypeError, "expected a numpy array like keys, got torch"),
        (VALUES.tolist(), TypeError, "expected a NumPy, torch or CuPy array, got list"),
    ],
)
def test_values(verb, values, kind, text):
    table = Table(2, optimizer=SGD())
    name = "grads" if verb == "update" else "values"
    with pytest.raises(kind, match=rf"^\[Table\.{verb}\] {name}: {text}"):
        table.update(KEYS, values) if verb == "update" else WRITES[verb](table, values)
    assert len(table) == 0


@pytest.mark.parametrize("verb", WRITES)
@pytest.mark.parametrize(
    ("option", "kind", "text"),
    [
        ({}, ValueError, "scores: expected one per key with evict_strategy 'custom', got None"),
        (
            {"scores": np.ones(2, np.int64)},
            ValueError,
            r"scores: expected shape \(3,\) .*, got \(2,\)",
        ),
        ({"scores": np.ones(3)}, TypeError, "scores: expected dtype int64, uint64, got float64"),
        (
            {"scores": [1, 2, 3]},
            TypeError,
            "scores: expected a NumPy, torch or CuPy array, got list",
        ),
        ({"epoch": -1}, ValueError, "epoch: expected an integer >= 0 and <= 4294967295, got -1"),
        ({"epoch": 2**32}, ValueError, "epoch: expected an integer .*, got 4294967296"),
        ({"time": 2**32}, ValueError, "time: expected an integer .*, got 4294967296"),
        ({"time": 1.5}, TypeError, "time: expected an integer, got float"),
    ],
)
def test_scores_epochs_and_times(verb, option, kind, text):
    table = Table(2, max_capacity=10, evict_strategy="custom", track="use")
    if option:
        option = {"scores": np.arange(3), **option}
    with pytest.raises(kind, match=rf"^\[Table\.{verb}\] {text}"):
        WRITES[verb](table, VALUES, **option)
    assert len(table) == 0


@pytest.mark.parametrize(
    ("accum", "kind", "text"),
    [
        (np.ones(3, np.uint8), TypeError, "accum: expected dtype bool, got uint8"),
        (np.ones(2, bool), ValueError, r"accum: expected shape \(3,\) like keys, got \(2,\)"),
        (torch.ones(3, dtype=torch.bool), TypeError, "accum: expected a numpy array like keys"),
    ],
)
def test_accum(accum, kind, text):
    with pytest.raises(kind, match=r"^\[Table.accum_or_assign\] " + text):
        Table(2).accum_or_assign(KEYS, VALUES, accum)


def test_rows_of_int8_cannot_be_added_to():
    table = Table(2, dtype="int8")
    table.insert_or_assign(KEYS, VALUES)
    with pytest.raises(ValueError, match=r"^\[Table.accum_or_assign\] values: .* got dtype int8"):
        table.accum_or_assign(KEYS, VALUES, np.ones(3, bool))
    with pytest.raises(ValueError, match=r"^\[Table.accum_or_assign\] values: .* got dtype int8"):
        table.accum_or_assign(KEYS, VALUES, np.zeros(3, bool))


def test_what_a_table_was_not_made_for():
    table = Table(2)
    with pytest.raises(
        ValueError, match=r"^\[Table.scores\] keys: .* with an evict_strategy, got 'n"
    ):
        table.scores(KEYS)
    with pytest.raises(ValueError, match=r"^\[Table.expire\] track: .* track='use', got \(\)"):
        table.expire(1)
    with pytest.raises(ValueError, match=r"^\[Table.mark\] track: .* track='changes', got \(\)"):
        table.mark()
    with pytest.raises(ValueError, match=r"^\[Table.delta\] track: .* track='changes', got \(\)"):
        table.delta(1)
    with pytest.raises(
        ValueError, match=r"^\[Table.update\] optimizer: .* made with one, got None"
    ):
        table.update(KEYS, VALUES)
    with pytest.raises(
        ValueError, match=r"^\[Table.update\] optimizer: .* made with one, got None"
    ):
        table.update(KEYS, VALUES, optimizer=SGD())
    with pytest.raises(
        TypeError, match=r"^\[Table.update\] optimizer: expected RowOptimizer or Non"
    ):
        Table(2, optimizer=SGD()).update(KEYS, VALUES, optimizer="sgd")
    assert len(table) == 0


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda t: t.reserve(0), ValueError, "reserve. capacity: expected an integer >= 1 and <="),
        (lambda t: t.reserve(2**70), ValueError, "reserve. capacity: .* <= 4294967280, got 1180"),
        (lambda t: t.reserve(1e3), TypeError, "reserve. capacity: expected an integer, got float"),
        (lambda t: t.expire(-1), ValueError, "expire. before: .* >= 0 and <= 4294967295, got -1"),
        (lambda t: list(t.export_batches(0)), ValueError, "export_batches. rows: .* >= 1, got 0"),
        (
            lambda t: list(t.export_batches(since=1)),
            ValueError,
            r"export_batches. track: expected a table made with track='changes', got \('use',\)",
        ),
        (lambda t: list(t.export_batches(since=-1)), ValueError, "export_batches. since: .* >= 0"),
        (lambda t: t.quantized("float32"), ValueError, "quantized. dtype: expected one of float16"),
        (lambda t: t.quantized(value_range=0), ValueError, "quantized. value_range: .* > 0"),
        (lambda t: t.quantized(value_range=float("inf")), ValueError, "quantized. value_range: "),
    ],
)
def test_other_numbers(call, kind, text):
    table = Table(2, track="use")
    with pytest.raises(kind, match=r"^\[Table\." + text.replace(". ", r"\] ", 1)):
        call(table)


def test_a_batch_beyond_the_bound_is_told_before_anything_is_written():
    table = Table(2, max_capacity=2)
    with pytest.raises(
        TableFullError, match=r"got 0 rows of 2 in use\. Raise max_capacity or choose"
    ):
        table.insert_or_assign(KEYS, VALUES)
    assert len(table) == 0


def test_deltas_of_no_mark():
    table = Table(2, track="changes")
    for since in (1, 5):
        with pytest.raises(ValueError, match=r"^\[Table.delta\] since: .* below \d+, got \d"):
            table.delta(since + 1)
    with pytest.raises(
        ValueError, match=r"^\[Table.delta\] since: expected an integer >= 0, got -1"
    ):
        table.delta(-1)
    mark = table.mark()
    table.clear()
    assert table.delta(mark).present.tolist() == []  # it was an error once: a log could not go on
    with pytest.raises(
        TypeError, match=r"^\[Table.apply\] delta: expected a Delta or its bytes, got i"
    ):
        table.apply(3)


def test_loading(tmp_path):
    table = Table(2, optimizer=Adagrad())
    table.insert_or_assign(KEYS, VALUES)
    table.save(tmp_path / "t")
    with pytest.raises(ValueError, match=r"^\[Table.load\] shard: .* >= 0 and <= 1, got 2"):
        Table.load(tmp_path / "t", shard=(2, 2))
    with pytest.raises(ValueError, match=r"^\[Table.load\] shard: expected an integer >= 1, got 0"):
        Table.load(tmp_path / "t", shard=(0, 0))
    for wrong in (3, (1, 2, 3)):
        with pytest.raises(TypeError, match=r"^\[Table.load\] shard: expected \(index, of\), got "):
            Table.load(tmp_path / "t", shard=wrong)
    with pytest.raises(
        TableFullError, match=r"^\[Table.load\] max_capacity: .* 3 more rows, got 2 wi"
    ):
        Table.load(tmp_path / "t", max_capacity=2)
    with pytest.raises(ValueError, match=r"capacity: expected an integer >= 1"):
        Table.load(tmp_path / "t", capacity=0)
    with pytest.raises(FileNotFoundError, match="none"):
        Table.load(tmp_path / "none")


def test_row_numbers_above_two_to_the_31_are_rows():
    """Rows come as int32; -1 alone says that there is none."""

    class Full:
        size = 0

        def upsert(self, n, keys, values, moment, admission, keep, rows, found):
            np.asarray(rows)[:] = [-(2**31), -2, -1]

    table = Table(2)
    table._native = Full()
    assert table.insert_or_assign(KEYS, VALUES).tolist() == [True, True, False]
