# SPDX-License-Identifier: Apache-2.0
"""What ``Table`` says to a wrong argument: the argument, what was expected, what came, and nothing is written."""

import numpy as np
import pytest
import torch
from hotloop.table import SGD, Adagrad, Table, TableFullError
from table_checks import NO_ARRAY, grouped, refused

KEYS = np.array([1, 2, 3])
VALUES = np.ones((3, 2), np.float32)


SETTINGS = {
    ValueError: [
        ({"dim": 0}, "dim: expected an integer >= 1 and <= 65536, got 0"),
        ({"dim": 65537}, "dim: expected an integer >= 1 and <= 65536, got 65537"),
        ({"capacity": 0}, "capacity: expected an integer >= 1 and <= 4294967280, got 0"),
        ({"capacity": 2**32}, "capacity: expected an integer >= 1 and <= 429496728"),
        ({"capacity": 9, "max_capacity": 8}, "capacity: … <= 8, got 9"),
        ({"max_capacity": 0}, "max_capacity: expected an integer >= 1"),
        (
            {"evict_strategy": "fifo"},
            "evict_strategy: expected one of none, lru, lfu, epoch_lru, epoch_lfu, custom, got 'fifo'",
        ),
        ({"evict_strategy": "lru"}, "max_capacity: expected a bound … 'lru', got None"),
        ({"dtype": "float64"}, "dtype: expected one of float32, …, got 'float64'"),
        ({"track": "time"}, "track: expected one of use, changes, got 'time'"),
        ({"track": ("use", 3)}, "track: expected one of use, changes, got 3"),
        ({"dtype": "int8", "optimizer": SGD()}, "optimizer: expected None with dtype int8"),
    ],
    TypeError: [
        ({"dim": 2.0}, "dim: expected an integer, got float"),
        ({"max_capacity": True}, "max_capacity: expected an integer, got bool"),
        ({"admission": 3}, "admission: expected CountFilter or … or None, got int"),
        ({"optimizer": "sgd"}, "optimizer: expected RowOptimizer or None, got str"),
        ({"initializer": 0.1}, "initializer: expected Constant or Uniform or … got float"),
    ],
}


@pytest.mark.parametrize(("kind", "settings", "text"), grouped(SETTINGS))
def test_settings(settings, kind, text):
    with refused(f"[Table] {text}", kind):
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


WRONG_KEYS = {
    TypeError: [
        ([1, 2, 3], f"keys: {NO_ARRAY} list. Use numpy"),
        (KEYS.astype(np.float64), "keys: expected dtype int64, uint64, int32, got float64"),
        (KEYS.astype(np.uint8), "keys: expected dtype int64, uint64, int32, got uint8"),
        (np.int64(3), f"keys: {NO_ARRAY} int64"),
    ],
    ValueError: [(KEYS[:, None], "keys: expected 1 dimension(s), got shape (3, 1)")],
    NotImplementedError: [(torch.empty(3, dtype=torch.int64, device="meta"), "keys: … got meta")],
}


@pytest.mark.parametrize("verb", CALLS)
@pytest.mark.parametrize(("kind", "keys", "text"), grouped(WRONG_KEYS))
def test_keys(verb, keys, kind, text):
    table = Table(2, max_capacity=10, evict_strategy="lru", optimizer=SGD())
    with refused(f"[Table.{verb}] {text}", kind):
        CALLS[verb](table, keys)
    assert len(table) == 0


WRITES = {
    "insert_or_assign": lambda t, v, **o: t.insert_or_assign(KEYS, v, **o),
    "insert_and_evict": lambda t, v, **o: t.insert_and_evict(KEYS, v, **o),
    "assign": lambda t, v, **o: t.assign(KEYS, v, **o),
    "accum_or_assign": lambda t, v, **o: t.accum_or_assign(KEYS, v, np.zeros(3, bool), **o),
}


WRONG_VALUES = {
    ValueError: [
        (VALUES[:2], "expected shape (3, 2), got (2, 2)"),
        (np.ones((4, 2), np.float32), "expected shape (3, 2), got (4, 2)"),
        (np.ones((3, 3), np.float32), "expected shape (3, 2), got (3, 3)"),
        (VALUES[:, 0], "expected 2 dimension(s), got shape (3,)"),
    ],
    TypeError: [
        (VALUES.astype(np.float64), "expected dtype float32, got float64"),
        (VALUES.astype(np.float16), "expected dtype float32, got float16"),
        (torch.ones(3, 2), "expected a numpy array like keys, got torch"),
        (VALUES.tolist(), f"{NO_ARRAY} list"),
    ],
}


@pytest.mark.parametrize("verb", [*WRITES, "update"])
@pytest.mark.parametrize(("kind", "values", "text"), grouped(WRONG_VALUES))
def test_values(verb, values, kind, text):
    table = Table(2, optimizer=SGD())
    name = "grads" if verb == "update" else "values"
    with refused(f"[Table.{verb}] {name}: {text}", kind):
        table.update(KEYS, values) if verb == "update" else WRITES[verb](table, values)
    assert len(table) == 0


MOMENTS = {
    ValueError: [
        ({}, "scores: expected one per key with evict_strategy 'custom', got None"),
        ({"scores": np.ones(2, np.int64)}, "scores: expected shape (3,) …, got (2,)"),
        ({"epoch": -1}, "epoch: expected an integer >= 0 and <= 4294967295, got -1"),
        ({"epoch": 2**32}, "epoch: expected an integer …, got 4294967296"),
        ({"time": 2**32}, "time: expected an integer …, got 4294967296"),
    ],
    TypeError: [
        ({"scores": np.ones(3)}, "scores: expected dtype int64, uint64, got float64"),
        ({"scores": [1, 2, 3]}, f"scores: {NO_ARRAY} list"),
        ({"time": 1.5}, "time: expected an integer, got float"),
    ],
}


@pytest.mark.parametrize("verb", WRITES)
@pytest.mark.parametrize(("kind", "option", "text"), grouped(MOMENTS))
def test_scores_epochs_and_times(verb, option, kind, text):
    table = Table(2, max_capacity=10, evict_strategy="custom", track="use")
    if option:
        option = {"scores": np.arange(3), **option}
    with refused(f"[Table.{verb}] {text}", kind):
        WRITES[verb](table, VALUES, **option)
    assert len(table) == 0


ACCUM = {
    TypeError: [
        (np.ones(3, np.uint8), "accum: expected dtype bool, got uint8"),
        (torch.ones(3, dtype=torch.bool), "accum: expected a numpy array like keys"),
    ],
    ValueError: [(np.ones(2, bool), "accum: expected shape (3,) like keys, got (2,)")],
}


@pytest.mark.parametrize(("kind", "accum", "text"), grouped(ACCUM))
def test_accum(accum, kind, text):
    with refused(f"[Table.accum_or_assign] {text}", kind):
        Table(2).accum_or_assign(KEYS, VALUES, accum)


def test_rows_of_int8_cannot_be_added_to():
    table = Table(2, dtype="int8")
    table.insert_or_assign(KEYS, VALUES)
    for accum in (np.ones(3, bool), np.zeros(3, bool)):
        with refused("[Table.accum_or_assign] values: …got dtype int8"):
            table.accum_or_assign(KEYS, VALUES, accum)


UNMADE = [
    (lambda t: t.scores(KEYS), "scores] keys: …with an evict_strategy, got 'none'"),
    (lambda t: t.expire(1), "expire] track: …track='use', got ()"),
    (lambda t: t.mark(), "mark] track: …track='changes', got ()"),
    (lambda t: t.delta(1), "delta] track: …track='changes', got ()"),
    (lambda t: t.update(KEYS, VALUES), "update] optimizer: …made with one, got None"),
    (
        lambda t: t.update(KEYS, VALUES, optimizer=SGD()),
        "update] optimizer: …made with one, got None",
    ),
]


@pytest.mark.parametrize(("call", "text"), UNMADE)
def test_what_a_table_was_not_made_for(call, text):
    table = Table(2)
    with refused(f"[Table.{text}"):
        call(table)
    assert len(table) == 0


OTHERS = {
    ValueError: [
        (lambda t: t.reserve(0), "reserve] capacity: expected an integer >= 1 and <="),
        (lambda t: t.reserve(2**70), "reserve] capacity: … <= 4294967280, got 1180"),
        (lambda t: t.expire(-1), "expire] before: … >= 0 and <= 4294967295, got -1"),
        (lambda t: list(t.export_batches(0)), "export_batches] rows: … >= 1, got 0"),
        (
            lambda t: list(t.export_batches(since=1)),
            "export_batches] track: expected a table made with track='changes', got ('use',)",
        ),
        (lambda t: list(t.export_batches(since=-1)), "export_batches] since: … >= 0"),
        (lambda t: t.quantized("float32"), "quantized] dtype: expected one of float16"),
        (lambda t: t.quantized(value_range=0), "quantized] value_range: … > 0"),
        (lambda t: t.quantized(value_range=float("inf")), "quantized] value_range: "),
    ],
    TypeError: [(lambda t: t.reserve(1e3), "reserve] capacity: expected an integer, got float")],
}


@pytest.mark.parametrize(("kind", "call", "text"), grouped(OTHERS))
def test_other_numbers(call, kind, text):
    table = Table(2, track="use")
    with refused(f"[Table.{text}", kind):
        call(table)


def test_a_batch_beyond_the_bound_is_told_before_anything_is_written():
    table = Table(2, max_capacity=2)
    with refused("got 0 rows of 2 in use. Raise max_capacity or choose", TableFullError):
        table.insert_or_assign(KEYS, VALUES)
    assert len(table) == 0


def test_deltas_of_no_mark():
    table = Table(2, track="changes")
    for since in (1, 5):
        with pytest.raises(ValueError, match=r"^\[Table.delta\] since: .* below \d+, got \d"):
            table.delta(since + 1)
    with refused("[Table.delta] since: expected an integer >= 0, got -1"):
        table.delta(-1)
    mark = table.mark()
    table.clear()
    assert table.delta(mark).present.tolist() == []  # it was an error once: a log could not go on
    with refused("[Table.apply] delta: expected Delta or bytes, got int", TypeError):
        table.apply(3)


LOADING = {
    ValueError: [
        ({"shard": (2, 2)}, "[Table.load] shard: …>= 0 and <= 1, got 2"),
        ({"shard": (0, 0)}, "[Table.load] shard: expected an integer >= 1, got 0"),
        ({"capacity": 0}, "capacity: expected an integer >= 1"),
    ],
    TypeError: [
        ({"shard": 3}, "[Table.load] shard: expected (index, of), got "),
        ({"shard": (1, 2, 3)}, "[Table.load] shard: expected (index, of), got "),
    ],
    TableFullError: [
        ({"max_capacity": 2}, "[Table.load] max_capacity: …3 more rows, got 2 wi"),
    ],
}


@pytest.mark.parametrize(("kind", "given", "text"), grouped(LOADING))
def test_loading(tmp_path, kind, given, text):
    table = Table(2, optimizer=Adagrad())
    table.insert_or_assign(KEYS, VALUES)
    table.save(tmp_path / "t")
    with refused(text, kind):
        Table.load(tmp_path / "t", **given)
    with refused("none", FileNotFoundError):
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
