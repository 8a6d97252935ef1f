# SPDX-License-Identifier: Apache-2.0
"""Hash modules and what moves models elsewhere: checkpoints, exported programs, scripts, processes, devices."""

from __future__ import annotations

import copy

import pytest
import torch
from hotloop.table import Adagrad, Table
from hotloop.table.modules import HashEmbedding, HashEmbeddingBag
from module_cases import DIM, UNIVERSE, filled, rows_of
from table_checks import assert_rows, refused
from torch import nn


def model(rows: int = 0) -> nn.Sequential:
    made = nn.Sequential(HashEmbedding(DIM, optimizer=Adagrad(lr=0.1)), nn.Linear(DIM, 2))
    if rows:
        made(torch.arange(rows)).square().sum().backward()
    return made


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # said of a single process
@pytest.mark.parametrize("rows", [0, 3, 9])
@pytest.mark.parametrize("how", ["dcp", "safetensors"])
def test_checkpoints_that_hold_tensors_of_known_shapes(how, rows, tmp_path):
    """Dense parameters by them, rows by Table.save; the module that loads may hold any number of rows."""
    source, other = model(5), model(rows)
    for one in (source, other):
        one[0].rows_in_state_dict = False
        assert sorted(one.state_dict()) == ["1.bias", "1.weight"]
    if how == "dcp":
        import torch.distributed.checkpoint as dcp

        dcp.save({"model": source.state_dict()}, checkpoint_id=tmp_path / "dense")
        state = {"model": other.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / "dense")
        other.load_state_dict(state["model"])
    else:
        files = pytest.importorskip("safetensors.torch")
        files.save_file(source.state_dict(), tmp_path / "dense.safetensors")
        other.load_state_dict(files.load_file(tmp_path / "dense.safetensors"))
        files.save_model(source, tmp_path / "model.safetensors")
        files.load_model(other, tmp_path / "model.safetensors")
    source[0].table.save(tmp_path / "rows")
    other[0] = HashEmbedding(DIM, table=Table.load(tmp_path / "rows"))
    ids = torch.arange(5)
    for _ in range(2):
        out = [one(ids) for one in (source, other)]
        assert torch.equal(*out)
        for x in out:
            x.square().sum().backward()
    assert_rows(other[0].table, source[0].table)


def test_a_state_with_rows_is_taken_whatever_the_module_writes():
    source, other = model(5), model()
    other[0].rows_in_state_dict = False
    other.load_state_dict(source.state_dict())
    assert len(other[0].table) == 5
    assert copy.deepcopy(other)[0].rows_in_state_dict is False
    text = 'Missing key(s) in state_dict: "0._extra_state"'
    with refused(text, RuntimeError):
        source.load_state_dict(other.state_dict())


@pytest.mark.filterwarnings("ignore")  # torch's own, that scripts are deprecated
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("how", ["torch.export", "torch.jit.trace", "torch.jit.script"])
@pytest.mark.parametrize("kind", [HashEmbedding, HashEmbeddingBag])
def test_programs_are_refused_with_the_way_out(kind, how, training):
    """A trace would hold the rows of one batch as constants, an exported program the number of a table of now."""
    module = filled(kind(DIM, optimizer=Adagrad())).train(training)
    whole = nn.Sequential(module, nn.Linear(DIM, 2))
    ids = UNIVERSE[:, None]
    text = f"[{kind.__name__}] module: expected to run in this process, got {how}: a program would"
    make = {
        "torch.export": lambda: torch.export.export(whole, (ids,)),
        "torch.jit.trace": lambda: torch.jit.trace(whole, ids),
        "torch.jit.script": lambda: torch.jit.script(whole),
    }[how]
    with torch.no_grad(), refused(text, NotImplementedError):
        make()


def test_the_number_of_a_table_that_is_gone():
    module = filled(HashEmbedding(DIM, optimizer=Adagrad()))
    args = (module._held.anchor.detach(), UNIVERSE, None, None, 2**40, False, False)
    text = (
        f"[hotloop::table_lookup] number: expected that of a module of this process, got {2**40}."
    )
    with refused(text, RuntimeError):
        torch.ops.hotloop.table_lookup(*args)


def test_processes_and_devices_that_would_copy_rows_are_refused():
    whole = model(3)
    text = (
        "[HashEmbedding] share_memory: expected rows to stay in one process, got a module to share"
    )
    with refused(text, NotImplementedError):
        whole.share_memory()
    text = "[HashEmbedding] module: expected one process per device, got nn.DataParallel"
    with refused(text, NotImplementedError):
        whole[0]._replicate_for_data_parallel()


@pytest.mark.parametrize("move", [nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16)])
def test_rows_keep_their_type_where_parameters_change_theirs(move):
    module = filled(HashEmbedding(DIM, optimizer=Adagrad()))
    before = rows_of(module)
    moved = move(nn.Sequential(module, nn.Linear(DIM, 1)))[0]
    assert moved(UNIVERSE).dtype == torch.float32 and torch.equal(moved(UNIVERSE), before)
