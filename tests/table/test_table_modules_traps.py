# SPDX-License-Identifier: Apache-2.0
"""Wrong results that a user makes without a word from the library: what hash modules say, to whom, and how often."""

from __future__ import annotations

import copy
import inspect
import re
import warnings

import pytest
import torch
from hotloop.table import SGD, Table
from hotloop.table.modules import HashEmbedding, HashEmbeddingBag
from module_cases import DIM, UNIVERSE, filled
from table_checks import refused
from torch import nn

KINDS = [HashEmbedding, HashEmbeddingBag]
UNTAUGHT = "optimizer: expected a row optimizer in train\\(\\), got None: rows learn nothing"


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_training_without_a_row_optimizer_says_so_once(kind, given):
    module = kind(8, table=Table(8)) if given else kind(8)
    head = nn.Linear(8, 1)
    adam = torch.optim.Adam([*module.parameters(), *head.parameters()])
    with pytest.warns(UserWarning, match=re.escape(f"[{kind.__name__}] ") + UNTAUGHT) as said:
        head(module(torch.tensor([[1, 2]]))).sum().backward()
    assert len(said) == 1 and said[0].filename == __file__
    adam.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(torch.tensor([[1, 2]]))
        copy.deepcopy(module)(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["eval", "freeze", "no_grad", "int8", "optimizer"])
def test_who_does_not_train_or_does_is_left_alone(how, kind):
    trained = filled(HashEmbedding(DIM, optimizer=SGD()))
    table = trained.table if how == "optimizer" else trained.table.quantized("float16")
    module = kind(DIM, table=trained.table.quantized("int8") if how == "int8" else table)
    if how == "eval":
        module.eval()
    if how == "freeze":
        module.requires_grad_(False)
    with torch.set_grad_enabled(how != "no_grad"), warnings.catch_warnings():
        warnings.simplefilter("error")
        module(UNIVERSE[:, None])


@pytest.fixture
def two_ranks():
    """A process group that says it has two ranks, and passes nothing on."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_ddp_does_not_reduce_are_said_once(kind, two_ranks):
    from hotloop.table import salted_hash_bucket

    inner = kind(DIM, optimizer=SGD())
    model = nn.parallel.DistributedDataParallel(nn.Sequential(inner, nn.Linear(DIM, 1)))
    ids = torch.arange(64)
    mine = ids[salted_hash_bucket(ids, 2) == 1][:, None]
    text = re.escape(f"[{kind.__name__}] input: expected the shard of ids of rank 1 of 2 under")
    with pytest.warns(UserWarning, match=text) as said:
        model(ids[:, None])
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids[:, None])
        for sharded, batch in ((False, mine), (True, ids[:, None])):
            other = kind(DIM, optimizer=SGD())
            other.sharded = sharded
            again = nn.parallel.DistributedDataParallel(nn.Sequential(other, nn.Linear(DIM, 1)))
            again(batch)
        inner(ids[:, None])  # outside of the model: nothing to reduce


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("args", "given", "text"),
    [
        ((1000, 16), {}, "num_embeddings: expected embedding_dim alone and keywords, got (1000, 16). A hash"),
        ((16,), {"num_embeddings": 1000}, "num_embeddings: expected one of embedding_dim, … Leave it out: every id"),
        ((16,), {"sparse": True}, "sparse: expected one of … Leave it out: gradients are sparse"),
        ((16,), {"optimzer": SGD()}, "optimzer: expected one of … got an unknown keyword. Did you mean optimizer?"),
        ((16,), {"lr": 0.1}, "lr: expected one of … Give it to the row optimizer: optimizer=SGD("),
        ((16,), {"zzz": 1}, "zzz: expected one of … got an unknown keyword. Leave it out."),
        ((16,), {"max_norm": 1.0}, "max_norm: expected one of … got an unknown keyword. Rows are not renormalised"),
    ],
)  # fmt: skip
def test_arguments_of_others_are_answered_by_the_class_that_was_called(args, given, text, kind):
    with refused(f"[{kind.__name__}] {text}", TypeError):
        kind(*args, **given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"embedding_dim": 0}, ValueError, "embedding_dim: expected an integer >= 1"),
        ({"embedding_dim": "8"}, TypeError, "embedding_dim: "),
        ({"embedding_dim": 8, "dtype": torch.bfloat16}, ValueError, "dtype: expected one of float32, float16"),
        ({"embedding_dim": 8, "capacity": 0}, ValueError, "capacity: expected an integer >= 1"),
        ({"embedding_dim": 8, "optimizer": torch.optim.Adam}, TypeError, "optimizer: expected RowOptimizer or None"),
    ],
)  # fmt: skip
def test_settings_of_the_table_are_answered_by_the_module(given, error, text, kind):
    with refused(f"[{kind.__name__}] {text}", error):
        kind(**given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_module_takes_every_setting_of_a_table_by_name(kind):
    """The signature is what mypy, an editor and inspect see; it follows that of Table."""
    ours, theirs = (dict(inspect.signature(x).parameters) for x in (kind, Table))
    theirs.pop("dim")
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].annotation == parameter.annotation, name
    assert all(p.kind != inspect.Parameter.VAR_KEYWORD for p in ours.values())


def test_subclasses_pass_their_own_arguments():
    class Mine(HashEmbeddingBag):
        def __init__(self, size: int, width: int, *, name: str = "") -> None:
            super().__init__(width, mode="sum", optimizer=SGD())
            self.size, self.name = size, name

    assert Mine(3, 8, name="a").embedding_dim == 8
