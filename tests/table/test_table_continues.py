# SPDX-License-Identifier: Apache-2.0
"""A stream that is broken off and taken up again: the same rows admitted, evicted and moved as without the break."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hotloop.table import (
    SGD,
    Adagrad,
    CountFilter,
    FormatError,
    GroupAdagrad,
    ProbabilisticFilter,
    RowwiseAdagrad,
    Table,
    _export,
)
from hotloop.table.files import saving, snapshots
from hotloop.table.hashing import salted_hash_bucket
from hotloop.table.modules import HashEmbedding, HashEmbeddingBag
from table_checks import assert_rows, refused, unchanged
from table_file_cases import flipped, resealed

DIM = 4
FILTERS = {
    "none": lambda: None,
    "one split": lambda: CountFilter(2000, 3, splits=1),
    "ring": lambda: CountFilter(150, 3, splits=5),  # it forgets within the stream
    "probabilistic": lambda: ProbabilisticFilter(20.0, seed=3),
    "equal": lambda: ProbabilisticFilter(20.0, equal=True, seed=4),
}
ANY_FILTER = pytest.mark.parametrize("admission", FILTERS.values(), ids=FILTERS)
STRATEGIES = pytest.mark.parametrize("strategy", ["none", "lru", "lfu", "epoch_lru", "epoch_lfu"])


def batches(first: int, last: int) -> list[np.ndarray]:
    return [np.random.default_rng(step).zipf(1.3, 60) % 400 for step in range(first, last)]


def settings_of(admission, strategy: str) -> dict:
    bound = None if strategy == "none" else 40
    return {"admission": admission(), "evict_strategy": strategy, "max_capacity": bound}


def feed(table: Table, first: int, last: int) -> list[np.ndarray]:
    """Train, and say after each batch who is in."""
    seen = []
    for step, keys in zip(range(first, last), batches(first, last)):
        if step % 10 == 0 and table.evict_strategy.startswith("epoch"):
            table.find_or_insert(keys[:1], epoch=step)  # those between go by the last one given
        grads = np.random.default_rng(step).normal(size=(len(keys), DIM)).astype(np.float32)
        table.update(keys, grads)
        seen.append(table.export().keys)
    return seen


@ANY_FILTER
@STRATEGIES
def test_a_snapshot_goes_on_as_without_the_break(tmp_path, admission, strategy):
    table = Table(DIM, optimizer=RowwiseAdagrad(lr=0.1), **settings_of(admission, strategy))
    feed(table, 0, 25)
    table.save(tmp_path)
    loaded = Table.load(tmp_path)
    assert repr(loaded.admission) == repr(table.admission)
    for a, b in zip(feed(table, 25, 50), feed(loaded, 25, 50)):
        np.testing.assert_array_equal(a, b)
    assert_rows(loaded, table)


@ANY_FILTER
@STRATEGIES
@pytest.mark.parametrize("kind", [HashEmbedding, HashEmbeddingBag])
def test_a_state_dict_goes_on_as_without_the_break(admission, strategy, kind):
    def make():
        return kind(DIM, optimizer=RowwiseAdagrad(lr=0.1), **settings_of(admission, strategy))

    def train(module, first, last):
        if strategy.startswith("epoch") and first == 0:
            module.table.find_or_insert(np.array([1]), epoch=7)
        for keys in batches(first, last):
            module(torch.from_numpy(keys)[:, None]).square().sum().backward()

    module, other = make(), make()
    train(module, 0, 25)
    train(other, 40, 43)  # goes
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_rows(other.table, module.table)
    train(module, 25, 50)
    train(other, 25, 50)
    assert_rows(other.table, module.table)


@pytest.mark.parametrize("name", ["one split", "ring", "probabilistic", "equal"])
def test_the_break_would_show(tmp_path, name):
    """The control of the two above: with a filter that forgot, other rows are let in, or later."""
    table = Table(DIM, optimizer=SGD(), admission=FILTERS[name]())
    feed(table, 0, 25)
    table.save(tmp_path)
    loaded = Table.load(tmp_path)
    loaded.admission, loaded._step = FILTERS[name](), 0
    pairs = zip(feed(table, 25, 50), feed(loaded, 25, 50))
    assert not all(np.array_equal(a, b) for a, b in pairs)


def test_each_shard_goes_on_with_its_part(tmp_path):
    table = Table(DIM, optimizer=SGD(), admission=CountFilter(2000, 3, splits=1))
    feed(table, 0, 25)
    table.save(tmp_path)
    shards = [Table.load(tmp_path, shard=(i, 3)) for i in range(3)]
    grads = np.zeros((60, DIM), np.float32)
    for keys in batches(25, 50):
        table.update(keys, grads)
        for i, shard in enumerate(shards):
            mine = keys[salted_hash_bucket(keys, 3) == i]
            shard.update(mine, grads[: len(mine)])
    found = np.sort(np.concatenate([shard.export().keys for shard in shards]))
    np.testing.assert_array_equal(found, table.export().keys)


@pytest.mark.parametrize(
    ("saved", "other"), [(RowwiseAdagrad, GroupAdagrad), (GroupAdagrad, RowwiseAdagrad)]
)
@pytest.mark.parametrize("kind", [HashEmbedding, HashEmbeddingBag])
def test_the_state_of_another_rule_of_the_same_width_is_refused(kind, saved, other):
    module, wrong = kind(DIM, optimizer=saved()), kind(DIM, optimizer=other())
    ids = torch.arange(6)[:, None]
    module(ids).sum().backward()
    wrong(ids[2:]).sum().backward()
    text = (
        rf"^\[{kind.__name__}.load_state_dict\] state: expected that of {other.__name__}\(.*\), got the state of "
        rf"{saved.__name__}\. Make a module with the optimizer of the one saved\.$"
    )
    with unchanged(wrong.table), pytest.raises(ValueError, match=text):
        wrong.load_state_dict(module.state_dict())
    serving = kind(DIM).eval()  # has no rule whose state it could be
    serving.load_state_dict(module.state_dict())
    assert torch.equal(serving(ids), module.eval()(ids))


@pytest.mark.parametrize(
    ("own", "text"),
    [
        (
            lambda: CountFilter(90, 3, splits=1),
            "CountFilter.load_state_dict] state: expected capacity 90, got 100",
        ),
        (
            lambda: CountFilter(100, 3),
            "CountFilter.load_state_dict] state: expected splits 7, got 1",
        ),
        (
            lambda: ProbabilisticFilter(3.0),
            "admission: expected the state of ProbabilisticFilter(3.0, equal=False, seed=0), got that of a Count",
        ),
    ],
)
def test_the_state_of_another_filter_is_refused(own, text):
    module = HashEmbedding(DIM, optimizer=SGD(), admission=CountFilter(100, 3, splits=1))
    wrong = HashEmbedding(DIM, optimizer=SGD(), admission=own())
    module(torch.arange(6))
    wrong.table.insert_or_assign(np.arange(3), np.ones((3, DIM), np.float32))
    step = wrong.table._step
    with unchanged(wrong.table), refused(text):
        wrong.load_state_dict(module.state_dict())
    assert wrong.table._step == step


def test_states_from_before_they_held_a_filter_are_read():
    module = HashEmbedding(DIM, optimizer=Adagrad(), admission=CountFilter(100, 0))
    module(torch.arange(6)).sum().backward()
    state = module.state_dict()
    old = {
        "_extra_state": {
            k: state["_extra_state"][k] for k in ("keys", "values", "state", "scores", "last_use")
        }
    }
    other = HashEmbedding(DIM, optimizer=Adagrad(), admission=CountFilter(100, 0))
    other.table.admission.add(np.array([77]))
    other.load_state_dict(old)
    assert_rows(other.table, module.table)
    assert other.table.admission.counts(np.array([77])).tolist() == [1]


def test_snapshots_from_before_they_held_a_filter_are_read(tmp_path):
    """What this version 1 wrote at first: without these entries."""
    table = Table(DIM, optimizer=Adagrad(), evict_strategy="lru", max_capacity=90)
    feed(table, 0, 5)
    config = saving._config(table, 0, False)
    for name in ("own_mark", "epoch", "step"):
        del config[name]
    blocks = [_export.arrays_of(table, b) for b in _export.blocks(table, 50, 0)]
    snapshots.save(tmp_path, config, blocks)
    assert "admission" not in json.loads((tmp_path / "table.json").read_bytes())
    loaded = Table.load(tmp_path)
    assert loaded.admission is None
    assert_rows(loaded, table)


@pytest.fixture
def saved(tmp_path) -> Path:
    table = Table(DIM, optimizer=SGD(), admission=CountFilter(60, 2, splits=5))
    feed(table, 0, 10)
    table.save(tmp_path)
    return tmp_path


def test_every_byte_of_the_filters_part_counts(saved):
    manifest = json.loads((saved / "table.json").read_bytes())
    assert len(manifest["parts"]) == len(manifest["admission"]["parts"]) == 1
    path = saved / manifest["admission"]["parts"][0]["file"]
    data = path.read_bytes()
    for changed in [flipped(data, bit) for bit in range(0, len(data) * 8, 13)] + [
        data[:-1],
        b"",
        data + b"\0",
    ]:
        path.write_bytes(changed)
        with refused(f"[Table.load] {path}: expected ", FormatError):
            Table.load(saved)
        with refused(f"[verify] {path}: expected ", FormatError):
            snapshots.verify(saved)
    path.unlink()
    with pytest.raises(FormatError, match="expected a part of the snapshot, got none"):
        Table.load(saved)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda a: a["state"].pop("head"), "got none of head"),
        (lambda a: a["state"].update(head=5), "head: expected an integer >= 0 and <= 4, got 5"),
        (lambda a: a["state"].update(capacity=50), "cells"),
        (lambda a: a["state"].update(threshold="x"), "threshold"),
        (lambda a: a["state"].pop("name"), r"KeyError\('name'\)"),
        (
            lambda a: a["state"].update(name="Later"),
            "got 'Later'. A newer hotloop wrote the file: upgrade",
        ),
        (lambda a: a.update(parts=[]), "expected the state of a filter"),
        (lambda a: a.update(arrays={}), "expected arrays {}, got"),
        (lambda a: a.update(state=3), "entries of a manifest"),
        (lambda a: a["parts"][0].update(file="../x"), "entries of a manifest"),
    ],
)
def test_a_filter_with_a_valid_checksum_is_still_checked(saved, change, text):
    resealed(saved, lambda content: change(content["admission"]))
    with pytest.raises(FormatError, match=rf"^\[Table.load\] .*{text}"):
        Table.load(saved)


def test_a_filter_of_a_table_without_rows(tmp_path):
    table = Table(DIM, optimizer=SGD(), admission=CountFilter(60, 2))
    table.update(np.arange(5), np.zeros((5, DIM), np.float32))
    assert len(table) == 0
    for _ in range(2):
        summary = table.save(tmp_path)
        assert (summary.rows, summary.parts) == (0, 1) and len(list(tmp_path.iterdir())) == 2
    loaded = Table.load(tmp_path)
    assert loaded.admission.counts(np.arange(6)).tolist() == [1] * 5 + [0]


def test_the_filter_is_filed_in_parts_of_bounded_size(tmp_path):
    counter = CountFilter(5000, 2)
    counter.add(np.arange(3000))
    cells = counter.state_dict()["cells"]
    blocks = [{"cells": cells.reshape(-1)}]
    snapshots.save(
        tmp_path,
        {},
        [{"keys": np.arange(10)}],
        admission=lambda: ({"a": 1}, blocks),
        part_bytes=4096,
    )
    assert all(
        path.stat().st_size < 6000 for path in tmp_path.iterdir() if path.suffix == ".safetensors"
    )
    _, found = snapshots.load(tmp_path)
    state, parts = found.admission()
    assert state == {"a": 1} and len(parts) == -(-cells.nbytes // 4096)
    assert np.concatenate([part["cells"] for part in parts]).tobytes() == cells.tobytes()
    assert [len(block["keys"]) for block in found] == [10]


def test_the_cells_lie_as_the_page_on_the_format_says(tmp_path):
    """Found again by the formulas of docs/table-format.md alone."""
    for splits in (1, 5):
        capacity, keys = 300, np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 40)
        table = Table(DIM, optimizer=SGD(), admission=CountFilter(capacity, 9, splits=splits))
        for key, times in zip(keys, range(40)):
            table.admission.add(np.array([key]), np.array([times % 15 + 1]))
        table.save(tmp_path)
        filed = json.loads((tmp_path / "table.json").read_bytes())["admission"]
        _, blocks = snapshots.load(tmp_path)
        flat = np.concatenate([part["cells"] for part in blocks.admission()[1]])
        c = capacity if splits == 1 else -(-capacity // (splits - 1))
        t = c + (c // 2 if splits == 1 else c // 5)
        length = -(-(t + (32 if splits == 1 else 16)) // 32) * 32
        cells = flat.reshape(splits, length)
        assert [np.count_nonzero(split) for split in cells] == filed["state"]["elements"]
        for key, times in zip(keys.tolist(), range(40)):
            h = mix64(key % 2**64)
            start = h * t >> 64
            probe = cells[filed["state"]["head"], start : start + (32 if splits == 1 else 16)]
            (count,) = [int(x) & 15 for x in probe if x and int(x) >> 4 == h % 4096]
            assert count == times % 15 + 1


def mix64(k: int) -> int:
    k = (k ^ k >> 33) * 0xFF51AFD7ED558CCD % 2**64
    k = (k ^ k >> 33) * 0xC4CEB9FE1A85EC53 % 2**64
    return k ^ k >> 33
