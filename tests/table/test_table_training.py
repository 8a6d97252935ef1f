# SPDX-License-Identifier: Apache-2.0
"""Clipping, loss scaling, accumulation, schedules and freezing of hash modules: the same program on torch's modules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hotloop.table import (
    FTRL,
    SGD,
    Adagrad,
    Adam,
    Constant,
    RowwiseAdagrad,
    Table,
    TableOptimizer,
)
from hotloop.table.modules import HashEmbedding, HashEmbeddingBag
from module_cases import (
    DIM,
    PAD,
    RULES,
    UNIVERSE,
    dense_ids,
    dense_like,
    draw,
    filled,
    rows_of,
    seeded,
    target,
)
from table_checks import refused
from torch import nn

MODES = ("rows", "padded", "sum", "weighted", "mean", "max")


def make(mode: str, rule: str, **settings: object) -> nn.Module:
    settings = {"optimizer": RULES[rule][0], "update": "step", **settings}
    if mode in ("rows", "padded"):
        padding = PAD if mode == "padded" else None
        return filled(HashEmbedding(DIM, padding_idx=padding, **settings))
    return filled(HashEmbeddingBag(DIM, mode="sum" if mode == "weighted" else mode, **settings))


def twin(module: nn.Module, mode: str) -> nn.Module:
    given: dict = {} if mode in ("rows", "padded") else {"mode": module.mode}
    if mode == "padded":
        given["padding_idx"] = int(dense_ids(torch.tensor(PAD)))
    return dense_like(module, torch.float32, **given)


def look_up(module: nn.Module, mode: str, ids, dense: bool):
    weights = torch.rand(ids.shape, generator=seeded(len(ids))) if mode == "weighted" else None
    named = dense_ids(ids) if dense else ids
    return module(named) if mode in ("rows", "padded") else module(named, None, weights)


def backward(module: nn.Module, mode: str, ids, dense: bool) -> None:
    out = look_up(module, mode, ids, dense)
    (out * target(out.shape[:-1], torch.float32)).sum().backward()


def batch(step: int):
    return draw(6 * (step + 2), step).reshape(-1, 3)


@pytest.mark.parametrize("mode", MODES)
def test_kept_gradients_are_those_of_a_dense_table(mode):
    module = make(mode, "sgd")
    dense = twin(module, mode)
    for step in range(3):
        for one in (module, dense):
            backward(one, mode, batch(step), one is dense)
    ids, grads = module.kept_gradients()
    whole = torch.zeros(len(UNIVERSE), DIM)
    whole[dense_ids(ids)] = grads
    torch.testing.assert_close(whole, dense.weight.grad, atol=1e-5, rtol=1e-5)
    assert torch.equal(ids, ids.unique())
    module.zero_grad()
    assert module.kept_gradients().ids.shape == (0,)
    assert module.kept_gradients().grads.shape == (0, DIM)


@pytest.mark.parametrize("rule", ["sgd", "adagrad"])
@pytest.mark.parametrize("mode", MODES)
def test_accumulation_is_one_step_of_torch(mode, rule):
    """Three backwards, one step; Adagrad would see three squares where it is to see one of the sum."""
    module = make(mode, rule)
    dense = twin(module, mode)
    optimizer, rows = RULES[rule][1](dense.parameters()), TableOptimizer(module)
    for _ in range(2):
        for step in range(3):
            for one in (module, dense):
                backward(one, mode, batch(step), one is dense)
        optimizer.step()
        optimizer.zero_grad()
        rows.step()
    torch.testing.assert_close(rows_of(module), dense.weight.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("second", ["rows", "sum", "mean", "max", "weighted"])
@pytest.mark.parametrize("rule", ["adagrad", "adam"])
def test_modules_over_one_table_are_one_step_of_torch(rule, second):
    """One weight that two modules share has one gradient in torch; Adam and Adagrad tell one step from two."""
    first = make("mean", rule)
    other = make(second, rule, table=first.table, optimizer=None)
    dense = [twin(first, "mean"), twin(other, second)]
    dense[1].weight = dense[0].weight
    optimizer, rows = RULES[rule][1](dense[0].parameters()), TableOptimizer([first, other])
    for step in range(4):
        for modules in ((first, other), dense):
            whole = UNIVERSE.reshape(-1, 1)  # every row has a gradient: Adam of torch moves all
            for module, mode, ids in zip(modules, ("mean", second), (whole, batch(step))):
                backward(module, mode, ids, modules is dense)
        optimizer.step()
        optimizer.zero_grad()
        rows.step()
        torch.testing.assert_close(rows_of(first), dense[0].weight.detach(), atol=2e-5, rtol=1e-5)


def test_modules_over_one_table_find_rows_that_were_freed_meanwhile():
    table = Table(2, optimizer=Adagrad(lr=1.0), initializer=Constant(0.0))
    modules = [HashEmbedding(2, table=table, update="step") for _ in range(2)]
    rows = TableOptimizer(modules)
    modules[0](torch.tensor([4, 5, 6])).sum().backward()
    table.erase(torch.tensor([4, 5]))
    table.find_or_insert(torch.tensor([7, 8]))  # they lie where 4 and 5 lay
    modules[1](torch.tensor([5, 6])).sum().backward()
    rows.step()
    whole = table.export()  # one move each by a gradient of 2, and none of 4, 7 and 8
    assert whole.keys.tolist() == [5, 6, 7, 8]
    assert whole.values[:, 0].tolist() == [-1.0, -1.0, 0.0, 0.0]
    assert whole.state[:, 0].tolist() == [4.0, 4.0, 0.0, 0.0]


def test_a_step_over_modules_writes_all_or_nothing():
    table = Table(2, optimizer=SGD(lr=1.0), initializer=Constant(0.0))
    modules = [HashEmbedding(2, table=table, update="step") for _ in range(2)]
    alone = HashEmbedding(2, optimizer=SGD(lr=1.0), initializer=Constant(0.0), update="step")
    rows, ids = TableOptimizer([alone, *modules]), torch.tensor([5])
    for module in (alone, *modules):
        module(ids).sum().backward()
    rows.param_groups[2]["lr"] = 0.5
    text = (
        "[TableOptimizer.step] lr: expected one for all modules over one table, whose gradients are summed, got "
        "1.0 and 0.5. Set that of all their groups, or take summed=False."
    )
    with refused(text):
        rows.step()
    rows.param_groups[2]["lr"] = 1.0
    (modules[1](ids) * math.inf).sum().backward()
    with pytest.raises(ValueError, match="expected finite numbers"):
        rows.step()
    assert not alone.table.find(ids).values.any() and not table.find(ids).values.any()
    modules[1].zero_grad()
    rows.step()
    assert (
        alone.table.find(ids).values.tolist() == table.find(ids).values.tolist() == [[-1.0, -1.0]]
    )


def test_schedules_of_momentum_set_betas():
    """The numbers of torch's own Adam under the same schedule."""
    module, weight = HashEmbedding(2, optimizer=Adam(lr=0.1)), nn.Parameter(torch.zeros(2))
    both = TableOptimizer(module), torch.optim.Adam([weight], lr=0.1)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=6) for o in both]
    for _ in range(5):
        module(torch.tensor([5])).sum().backward()
        weight.grad = torch.ones(2)
        for one in (*both, *schedules):
            one.step()
        (mine,), (theirs,) = (o.param_groups for o in both)
        assert (mine["lr"], mine["betas"]) == (theirs["lr"], theirs["betas"])


def test_parameters_are_not_added_where_they_would_not_learn():
    rows = TableOptimizer(HashEmbedding(2, optimizer=SGD()))
    text = (
        "[TableOptimizer.add_param_group] param_group: expected no parameters, got a group of them."
    )
    with refused(text, NotImplementedError):
        rows.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(rows.param_groups) == 1


def test_summed_is_an_option_of_step_and_not_its_default():
    a, b = (make("rows", "adagrad") for _ in range(2))
    for module in (a, b):
        for _ in range(2):
            module(UNIVERSE).sum().backward()
    before = rows_of(a)
    assert a.step(summed=True) == 0 and b.step() == 0
    # Adagrad with lr 0.3: one step of 0.3 * 2 / sqrt(4), or 0.3 and 0.3 / sqrt(2).
    torch.testing.assert_close(before - rows_of(a), torch.full_like(before, 0.3))
    torch.testing.assert_close(
        before - rows_of(b), torch.full_like(before, 0.3 + 0.3 / math.sqrt(2))
    )


@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3, math.inf])
@pytest.mark.parametrize("shared", [False, True])
def test_clipping_is_torchs_of_all_gradients_together(shared, norm_type):
    table = Table(DIM, optimizer=SGD(lr=1.0))
    first = filled(HashEmbedding(DIM, table=table, update="step"))
    if shared:
        second = HashEmbeddingBag(DIM, table=table, update="step", mode="sum")
    else:
        second = HashEmbeddingBag(DIM, optimizer=SGD(lr=1.0), update="step", mode="sum")
        filled(second)
    model = nn.ModuleList([first, second, nn.Linear(DIM, 2)])
    dense_first = dense_like(first, torch.float32)
    dense_second = dense_like(second, torch.float32, mode="sum")
    if shared:
        dense_second.weight = dense_first.weight
    dense = nn.ModuleList([dense_first, dense_second, copy.deepcopy(model[2])])
    for one in (model, dense):
        for step in range(2):
            ids = dense_ids(batch(step)) if one is dense else batch(step)
            out = one[2](one[0](ids).sum(1) + one[1](ids))
            (out * torch.arange(1.0, 3.0)).sum().backward()
    assert len(model[0]._held.pending) == 2
    rows = TableOptimizer(model)
    found = rows.clip_grad_norm_(model, 0.7, norm_type)
    wanted = nn.utils.clip_grad_norm_(dense.parameters(), 0.7, norm_type)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(model[2].weight.grad, dense[2].weight.grad)
    # What is kept is scaled as well, and once.
    again = rows.clip_grad_norm_(model[2].parameters(), 1e9, norm_type)
    torch.testing.assert_close(again, torch.tensor(0.7), atol=1e-4, rtol=1e-4)
    for module in (first, second):
        module.step()
    with torch.no_grad():
        for p in {dense_first.weight, dense_second.weight}:
            p -= p.grad
    torch.testing.assert_close(rows_of(first), dense_first.weight.detach())
    torch.testing.assert_close(rows_of(second), dense_second.weight.detach())


def test_what_is_kept_after_clipping_has_a_factor_of_its_own():
    module = make("rows", "sgd", optimizer=SGD(lr=1.0))
    before = rows_of(module)
    module(UNIVERSE).sum().backward()
    TableOptimizer(module).clip_grad_norm_(module, math.sqrt(before.numel()) / 2)  # halves
    module(UNIVERSE).sum().backward()
    torch.testing.assert_close(module.kept_gradients().grads, torch.full_like(before, 1.5))
    module.step()
    torch.testing.assert_close(before - rows_of(module), torch.full_like(before, 1.5))


@pytest.mark.parametrize("clipped", [False, True])
def test_loss_scaling_by_torchs_scaler(clipped, compiled):
    """Half the steps overflow: they are skipped, and the others are those of unscaled training."""
    module = make("rows", "adagrad")
    dense = twin(module, "rows")
    call = compiled(module)
    rows, optimizer = TableOptimizer(module), RULES["adagrad"][1](dense.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        overflows = step % 2 == 1
        ids = batch(step)
        factor = torch.tensor(torch.inf if overflows else 3.0)
        scaler.scale(call(ids).sum() * factor).backward()
        if clipped:
            scaler.unscale_(rows)
            rows.clip_grad_norm_([], 2.0)
        before = rows_of(module)
        scaler.step(rows)
        scaler.update()
        rows.zero_grad()
        assert torch.equal(before, rows_of(module)) == overflows
        assert scaler.get_scale() == 1024.0 * 0.5 ** ((step + 1) // 2)
        if not overflows:
            optimizer.zero_grad()
            (dense(dense_ids(ids)).sum() * 3.0).backward()
            if clipped:
                nn.utils.clip_grad_norm_(dense.parameters(), 2.0)
            optimizer.step()
    torch.testing.assert_close(rows_of(module), dense.weight.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("which", ["lambda", "cosine", "onecycle", "plateau"])
def test_schedulers_of_torch(which, update):
    module = make("rows", "sgd", update=update)
    dense = twin(module, "rows")
    rows, optimizer = TableOptimizer(module), torch.optim.SGD(dense.parameters(), lr=0.3)
    kinds = {
        "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
        "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.5, total_steps=9, cycle_momentum=False
        ),
        "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    }
    schedules = [kinds[which](o) for o in (rows, optimizer)]
    rates = set()
    for step in range(5):
        ids = batch(step)
        module(ids).sum().backward()
        rows.step()
        optimizer.zero_grad()
        dense(dense_ids(ids)).sum().backward()
        optimizer.step()
        for schedule in schedules:
            schedule.step(*([1.0] if which == "plateau" else []))
        assert rows.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
        rates.add(rows.param_groups[0]["lr"])
    assert len(rates) > 2
    torch.testing.assert_close(rows_of(module), dense.weight.detach(), atol=1e-5, rtol=1e-5)


def test_a_rate_that_is_a_tensor_and_a_closure():
    module = make("rows", "sgd")
    rows = TableOptimizer(module)
    rows.param_groups[0]["lr"] = torch.tensor(0.25)
    before = rows_of(module)

    def closure():
        loss = module(UNIVERSE).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(rows.step(closure)) == pytest.approx(float(before.sum()), abs=1e-5)
    torch.testing.assert_close(before - rows_of(module), torch.full_like(before, 0.25))


def test_settings_travel_by_state_dict_and_stay_attached():
    model = nn.ModuleList([make("rows", "adam"), make("sum", "adagrad")])
    rows = TableOptimizer(model)
    rows.param_groups[0]["lr"], rows.param_groups[1]["lr"] = 0.5, 0.125
    other = nn.ModuleList([make("rows", "adam"), make("sum", "adagrad", optimizer=Adagrad())])
    theirs = TableOptimizer(other)
    theirs.load_state_dict(copy.deepcopy(rows.state_dict()))
    theirs.param_groups[1]["lr"] *= 2
    before = rows_of(other[1])
    other[1](UNIVERSE[:, None]).sum().backward()
    theirs.step()
    torch.testing.assert_close(before - rows_of(other[1]), torch.full_like(before, 0.25))
    wrong = TableOptimizer([other[1], other[0]])
    text = "[TableOptimizer.load_state_dict] rule: expected ['Adagrad', 'Adam'], got ['Adam', 'Adagrad']."
    with refused(text):
        wrong.load_state_dict(rows.state_dict())


@pytest.mark.parametrize(
    "rule", [SGD(), Adagrad(), RowwiseAdagrad(), Adam(betas=(0.8, 0.9)), FTRL(group=True)]
)
def test_every_rule_is_a_group_of_its_settings(rule):
    module = HashEmbedding(DIM, optimizer=rule)
    (group,) = TableOptimizer(module).param_groups
    assert group["rule"] == type(rule).__name__
    assert group["lr"] == rule.lr and group["stochastic_rounding"] is False
    module(UNIVERSE).sum().backward()
    group["lr"] = -1.0
    with refused(f"[{group['rule']}] lr: expected"):
        module(UNIVERSE).sum().backward()


@pytest.mark.parametrize("update", ["backward", "step"])
def test_requires_grad_false_freezes(update, compiled):
    module = make("rows", "sgd", update=update)
    before = rows_of(module)
    call = compiled(module)
    assert module.requires_grad_(False) is module
    out = call(torch.cat((UNIVERSE, torch.tensor([4711]))))
    assert not out.requires_grad and not out[-1].any()
    head = nn.Linear(DIM, 1)
    head(out).sum().backward()
    module.step()
    assert torch.equal(before, rows_of(module)) and len(module.table) == len(UNIVERSE)
    assert not copy.deepcopy(module)(UNIVERSE).requires_grad
    module.requires_grad_()
    call(UNIVERSE).sum().backward()
    module.step()
    assert not torch.equal(before, rows_of(module))


def rows_of_step() -> TableOptimizer:
    return TableOptimizer(HashEmbedding(2, optimizer=SGD(), update="step"))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: TableOptimizer(nn.Linear(2, 2)), ValueError,
         "[TableOptimizer] modules: expected a HashEmbedding or HashEmbeddingBag with an optimizer, got none."),
        (lambda: TableOptimizer(nn.Linear(2, 2).parameters()), TypeError,
         "[TableOptimizer] modules: expected Module, got Parameter."),
        (lambda: TableOptimizer(HashEmbedding(2, optimizer=SGD()).requires_grad_(False)), ValueError,
         "[TableOptimizer] modules: expected"),
        (lambda: rows_of_step().clip_grad_norm_([1.0], 1.0), TypeError,
         "[TableOptimizer.clip_grad_norm_] parameters: expected Tensor, got float."),
        (lambda: TableOptimizer(HashEmbedding(2, optimizer=SGD())).clip_grad_norm_([], 1.0), ValueError,
         '[TableOptimizer.clip_grad_norm_] update: expected "step", got a module with "backward"'),
        (lambda: rows_of_step().clip_grad_norm_(nn.Linear(2, 2), -1.0), ValueError, "max_norm: expected"),
        (lambda: rows_of_step().clip_grad_norm_(nn.Linear(2, 2), 1.0, 0.0), ValueError, "norm_type: expected"),
        (lambda: rows_of_step().clip_grad_norm_(HashEmbedding(2, optimizer=SGD()), 1.0), ValueError,
         "clip_grad_norm_] parameters: expected a model whose hash modules are this optimizer's, got 1"),
    ],
)  # fmt: skip
def test_errors(call, kind, text):
    with refused(text, kind):
        call()


def test_a_norm_that_is_not_finite():
    module = make("rows", "sgd")
    (module(UNIVERSE).sum() * torch.tensor(torch.nan)).backward()
    rows = TableOptimizer(module)
    with refused("clip_grad_norm_] parameters: expected a finite"):
        rows.clip_grad_norm_(module, 1.0, error_if_nonfinite=True)
    assert rows.clip_grad_norm_(module, 1.0).isnan()
    with refused("[HashEmbedding.step] grads: expected finite"):
        module.step()
    assert float(rows_of_step().clip_grad_norm_(nn.Linear(2, 2), 1.0)) == 0.0


def test_rows_that_moved_in_backward_are_refused_under_a_scaler():
    module = make("rows", "sgd", update="backward")
    rows, scaler = TableOptimizer(module), torch.amp.GradScaler("cpu")
    scaler.scale(module(UNIVERSE).sum()).backward()
    text = '[TableOptimizer] update: expected "step" under a GradScaler, got "backward"'
    with refused(text):
        scaler.step(rows)
