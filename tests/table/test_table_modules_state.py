# SPDX-License-Identifier: Apache-2.0
"""The state of HashEmbedding and HashEmbeddingBag: state_dict, copies, and what is refused with which text."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
from hotloop import table as table_room
from hotloop.table import SGD, Adagrad, Adam, CountFilter, Table
from hotloop.table.modules import HashEmbedding, HashEmbeddingBag
from module_cases import (
    DIM,
    UNIVERSE,
    draw,
    filled,
    rows_of,
)
from table_checks import assert_rows, grouped, refused
from torch import Tensor, nn


def trained(**settings: object) -> HashEmbedding:
    module = HashEmbedding(DIM, optimizer=Adam(lr=0.1), **settings)
    for step in range(3):
        module(draw(20, step)).square().sum().backward()
    return module


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_state_dict_round_trip_goes_on_as_if_nothing_happened(dtype):
    settings = {"dtype": dtype, "max_capacity": 64, "evict_strategy": "lfu", "track": ("use",)}
    module = trained(**settings)
    file = io.BytesIO()
    torch.save(nn.Sequential(module).state_dict(), file)
    file.seek(0)
    other = HashEmbedding(DIM, optimizer=Adam(lr=0.1), **settings)
    other(torch.tensor([4242]))  # goes
    nn.Sequential(other).load_state_dict(torch.load(file, weights_only=True))
    assert_rows(other.table, module.table)
    for step in range(2):
        for one in (module, other):
            one(draw(20, step)).square().sum().backward()
    assert np.array_equal(module.table.export().values, other.table.export().values)


def test_state_of_training_loads_into_a_module_that_serves():
    module, serving = trained(), HashEmbedding(DIM).eval()
    serving.load_state_dict(module.state_dict())
    assert torch.equal(serving(UNIVERSE), module.eval()(UNIVERSE))
    empty = HashEmbedding(DIM)
    serving.load_state_dict(empty.state_dict())
    assert len(serving.table) == 0


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_go_on_alike_and_apart(how):
    """Rows, optimizer state, filter and settings; two modules with one table still share it."""
    filter_ = CountFilter(500, 1, splits=1)
    table = Table(DIM, optimizer=Adam(lr=0.1), admission=filter_, dtype="bfloat16")
    model = nn.ModuleList(
        [HashEmbedding(DIM, table=table), HashEmbeddingBag(DIM, table=table, mode="max")]
    )
    for step in range(3):
        model[0](draw(20, step)).square().sum().backward()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin[0].table is twin[1].table is not table
    assert twin[0].table.table_id != table.table_id
    assert twin[1].mode == "max"
    new = torch.tensor([[5, 600, 601]])
    for one in (model, twin, model, twin):
        one[1](new).float().square().sum().backward()
    assert_rows(twin[0].table, table)
    assert 600 in (keys := table.export().keys)
    twin[0](UNIVERSE).float().sum().backward()
    assert not np.array_equal(table.export().values, twin[0].table.export().values[: len(keys)])


def test_copies_keep_int8_and_the_way_gradients_are_kept():
    table = trained().table.quantized("int8", value_range=0.3)
    serving = HashEmbedding(DIM, table=table)
    assert torch.equal(copy.deepcopy(serving)(UNIVERSE), serving(UNIVERSE))
    kept = copy.deepcopy(filled(HashEmbedding(DIM, optimizer=SGD(lr=1.0), update="step")))
    before = rows_of(kept)
    kept(UNIVERSE).sum().backward()
    assert torch.equal(rows_of(kept), before)
    text = "[HashEmbedding] copy: expected no gradients kept for step(), got those of 1 lookup(s)."
    with refused(text):
        copy.deepcopy(kept)
    kept.step()
    assert not torch.equal(rows_of(copy.deepcopy(kept)), before)


@pytest.mark.parametrize("update", ["backward", "step"])
def test_uses_have_the_second_they_are_given(update, compiled):
    module = HashEmbedding(DIM, optimizer=SGD(), track="use", update=update)
    call = compiled(module)
    for second in (100, 200):
        module.time = second
        call(torch.tensor([1, second])).sum().backward()
        if update == "step":
            module.step()
    assert module.time == 200
    assert copy.deepcopy(module).time == 200
    assert module.table.export().last_use.tolist() == [200, 100, 200]
    assert module.table.expire(150) == 1
    module.time = None  # the wall clock
    module(torch.tensor([200]))
    assert module.table.expire(10**9) == 1
    text = "[HashEmbedding] time: expected an integer >= 0 and <= 4294967295, got -1."
    with refused(text):
        module.time = -1


@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("kind", [HashEmbedding, HashEmbeddingBag])
@pytest.mark.parametrize("strategy", ["epoch_lru", "epoch_lfu"])
def test_uses_have_the_epoch_they_are_given(strategy, kind, update, compiled):
    settings = {"evict_strategy": strategy, "max_capacity": 3, "optimizer": SGD()}
    module = kind(DIM, update=update, **settings)
    call = compiled(module)

    def train(*ids):
        call(torch.tensor([ids])).sum().backward()
        if update == "step":
            module.step()

    def epochs():
        rows = module.table.export()
        return dict(zip(rows.keys.tolist(), (rows.scores >> 32).tolist()))

    train(1, 2)
    assert module.epoch is None and epochs() == {1: 0, 2: 0}
    module.epoch = 5
    train(1)
    train(3)
    assert epochs() == {1: 5, 2: 0, 3: 5}
    module.epoch = None  # the last one the table was given
    train(3)
    module.table.find_or_insert(np.array([1]), epoch=6)
    train(4)  # 2 has the lowest epoch
    assert epochs() == {1: 6, 3: 5, 4: 6}
    module.epoch = 4
    train(9)  # lower than every row's: refused
    assert epochs() == {1: 6, 3: 5, 4: 6}
    assert module.epoch == copy.deepcopy(module).epoch == 4
    for wrong in (-1, 2**32):
        text = f"[{kind.__name__}] epoch: expected an integer >= 0 and <= 4294967295, got {wrong}."
        with refused(text):
            module.epoch = wrong


@pytest.mark.parametrize("kind", [HashEmbedding, HashEmbeddingBag])
def test_custom_scores_are_refused_where_a_lookup_would_need_them(kind):
    settings = {"evict_strategy": "custom", "max_capacity": 9}
    text = f"[{kind.__name__}] table: expected an evict_strategy whose scores follow from use, got 'custom'"
    for make in (
        lambda: kind(DIM, optimizer=SGD(), **settings),
        lambda: kind(DIM, table=Table(DIM, optimizer=SGD(), **settings)),
    ):
        with refused(text):
            make()
    table = Table(DIM, **settings)  # has no optimizer: its lookups insert nothing
    table.insert_or_assign(np.arange(3), np.ones((3, DIM), np.float32), scores=np.arange(3))
    assert kind(DIM, table=table).eval()(torch.arange(4)[:, None]).sum() == 3 * DIM


def ids_(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.long)


MADE = {
    ("HashEmbedding", ValueError): [
        ({"update": "later"}, "update: expected one of backward, step, got 'later'."),
        (
            {"table": Table(4), "optimizer": SGD()},
            "table: expected a table or its settings, got both.",
        ),
        ({"table": Table(4), "capacity": 9}, "table: expected a table or its settings, got both."),
        ({"table": Table(3)}, "table: expected dim 4 like embedding_dim, got 3."),
        ({"padding_idx": 2**63}, "padding_idx: expected an integer >= -9223372036854775808 and"),
        ({"embedding_dim": 0}, "embedding_dim: "),
    ],
    ("HashEmbedding", TypeError): [
        ({"table": "mine"}, "table: expected Table or None, got str."),
        ({"padding_idx": 1.5}, "padding_idx: "),
    ],
    ("HashEmbeddingBag", ValueError): [
        ({"mode": "min"}, "mode: expected one of sum, mean, max, got 'min'."),
    ],
}


@pytest.mark.parametrize(("op", "kind", "given", "text"), grouped(MADE))
def test_errors_of_settings(op, kind, given, text):
    with refused(f"[{op}] {text}", kind):
        getattr(table_room, op)(**{"embedding_dim": 4, **given})


def test_errors_of_step():
    with refused("[HashEmbedding.step] optimizer: expected a table made with one, got None."):
        HashEmbedding(4).step()
    with refused("[HashEmbedding.step] optimizer: expected the state of SGD, got Adam("):
        HashEmbedding(4, optimizer=SGD()).step(optimizer=Adam())


INDEX, FLOATS = "expected an int64 or int32 tensor, got", "expected a tensor of floats, got"
RISING = "offsets: expected 0 first, then no decrease, at most"
BATCHES = {
    ("HashEmbedding", TypeError): [
        ({}, ([1, 2],), f"input: {INDEX} list."),
        ({}, (torch.ones(2),), f"input: {INDEX} torch.float32."),
    ],
    ("HashEmbedding", NotImplementedError): [
        ({}, (ids_(1).to("meta"),), "input: expected a tensor on the CPU, got meta."),
    ],
    ("HashEmbeddingBag", ValueError): [
        ({}, (torch.tensor(3),), "input: expected 1 or 2 dimension(s), got shape ()."),
        (
            {},
            (ids_(3),),
            "offsets: expected where the bags of a one-dimensional input begin, got",
        ),
        ({}, (ids_(3)[None], ids_(0)), "offsets: expected None with a two-dimensional input."),
        ({}, (ids_(3), ids_(0)[None]), "offsets: expected 1 dimension(s), got shape (1, 1)."),
        ({}, (ids_(3, 4), ids_(1)), f"{RISING} 2, got [1, 2]."),
        ({}, (ids_(3, 4), ids_(0, 2, 1)), RISING),
        ({}, (ids_(3, 4), ids_(0, 3)), RISING),
        ({"include_last_offset": True}, (ids_(3, 4), ids_(0, 1)), "offsets: expected 0 first"),
        ({"include_last_offset": True}, (ids_(), ids_()), "offsets: expected 0 first"),
        (
            {"mode": "mean"},
            (ids_(3), ids_(0), torch.ones(1)),
            'per_sample_weights: expected mode "sum", got "mean".',
        ),
        (
            {},
            (ids_(3), ids_(0), torch.ones(2)),
            "per_sample_weights: expected shape (1,) like input, got (2,).",
        ),
    ],
    ("HashEmbeddingBag", TypeError): [
        ({}, (ids_(3), [0]), f"offsets: {INDEX} list."),
        ({}, (ids_(3), ids_(0), [1.0]), f"per_sample_weights: {FLOATS} list."),
        ({}, (ids_(3), ids_(0), ids_(1)), f"per_sample_weights: {FLOATS} torch.int64."),
    ],
}


@pytest.mark.parametrize(("op", "kind", "settings", "args", "text"), grouped(BATCHES))
def test_errors_of_batches(op, kind, settings, args, text):
    mode = {"mode": "sum"} if op == "HashEmbeddingBag" else {}
    module = getattr(table_room, op)(4, optimizer=SGD(), **{**mode, **settings})
    with refused(f"[{op}] {text}", kind):
        module(*args)
    assert len(module.table) == 0


def finish(loss: Tensor, module: nn.Module) -> None:
    loss.backward()
    module.step()


@pytest.mark.parametrize("update", ["backward", "step"])
def test_a_gradient_that_is_not_finite_writes_nothing(update, compiled):
    module = filled(HashEmbedding(DIM, optimizer=SGD(), update=update))
    before = rows_of(module)
    call = compiled(module)
    out = call(UNIVERSE)
    scale = torch.ones(len(UNIVERSE), 1)
    scale[3] = torch.inf
    op = "HashEmbedding." + update
    text = (
        f"[{op}] grads: expected finite numbers, got inf at [3, 0] (5 of 60). Nothing was written"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # under compile, torch shows where forward was
        with refused(text):
            finish((out * scale).sum(), module)
    assert torch.equal(before, rows_of(module))
    if update == "step":  # still there, to be dropped
        module.zero_grad()
        assert module.step() == 0


def test_a_state_that_does_not_fit_changes_nothing():
    module = filled(HashEmbedding(DIM, optimizer=Adagrad()))
    before = rows_of(module)
    other = HashEmbedding(DIM, optimizer=Adam())
    other(UNIVERSE)
    narrow = HashEmbedding(DIM - 1, optimizer=Adagrad())
    narrow(UNIVERSE)
    op = "[HashEmbedding.load_state_dict]"
    nameless = dict(other.state_dict()["_extra_state"])  # as states were at first
    del nameless["optimizer"]
    for state, text in (
        ({"_extra_state": nameless}, f"{op} state: expected F32 (12, 5), got F32 (12, 11)."),
        (narrow.state_dict(), f"{op} values: expected shape (12, 5), got (12, 4)."),
        (
            {"_extra_state": {}},
            f"{op} state: expected what state_dict() returns, got none of keys,",
        ),
    ):
        with refused(text):
            module.load_state_dict(state)
        assert torch.equal(before, rows_of(module))
    bounded = HashEmbedding(DIM, optimizer=Adagrad(), max_capacity=3)
    text = f"{op} keys: expected at most max_capacity = 3 rows, got 12."
    with refused(text):
        bounded.load_state_dict(module.state_dict())


def test_repr_names_what_matters():
    module = filled(HashEmbedding(DIM, optimizer=SGD(lr=0.5), update="step"))
    assert repr(module).startswith("HashEmbedding(5, rows=12, optimizer=SGD(lr=0.5")
    assert repr(module).endswith("update='step')")
    assert not list(module.parameters()) and not list(module.buffers())
