# SPDX-License-Identifier: Apache-2.0
"""``Table.update``: every rule against its formula in plain torch, on merged gradients."""

import numpy as np
import pytest
import torch
from helpers import assert_no_worse_than_torch
from hotloop.table import (
    SGD,
    Adagrad,
    Adam,
    Constant,
    RowwiseAdagrad,
    Table,
    Uniform,
)
from table_cases import by_case
from table_checks import refused, unchanged


@pytest.mark.parametrize("dim", [1, 2, 7, 64, 300])
@by_case
def test_rows_move_by_the_rule_on_merged_gradients(level, case, dim):
    """Ten steps, of which every row has a few; our error is at most twice that of the rule in plain torch."""
    rng = np.random.default_rng(dim)
    keys = np.array([5, -9, 2**63 - 1, 0, 77])
    table = Table(dim, optimizer=case.rule, initializer=Uniform(-1, 1))
    start = torch.from_numpy(table.find_or_insert(keys).values)
    plain = {
        d: [start.to(d, copy=True), case.state(5, dim, d)] for d in (torch.float32, torch.float64)
    }
    zeros = 0
    for _ in range(10):
        batch = rng.integers(0, 5, 8)
        grads = rng.normal(size=(8, dim)).astype(np.float32) * np.float32(0.3)
        assert table.update(keys[batch], grads) == 0
        at, places = np.unique(batch, return_inverse=True)
        merged = np.zeros((len(at), dim), np.float32)
        np.add.at(merged, places, grads)  # in the order of the batch, in float32
        for dtype, (weight, state) in plain.items():
            part = {name: x[at] for name, x in state.items()}
            weight[at] = case.plain_call(weight[at], torch.from_numpy(merged).to(dtype), part)
            for name, x in part.items():
                state[name][at] = x
        same, truth = (weight for weight, _ in plain.values())
        found = torch.from_numpy(table.find(keys).values)
        assert_no_worse_than_torch(found, same, truth)
        assert torch.equal(found == 0, truth == 0)
        zeros += int((found == 0).sum())
    assert zeros or dim == 1 or case.name != "ftrl"
    assert (found - start).abs().max() > 0.05


@by_case
def test_threads_and_levels_do_not_change_the_bits(level, case):
    rng = np.random.default_rng(3)
    steps = [
        (rng.zipf(1.3, 4000) % 900, rng.normal(size=(4000, 5)).astype(np.float32)) for _ in range(3)
    ]
    kept = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        table = Table(5, capacity=1, optimizer=case.rule)
        for keys, grads in steps:
            table.update(keys, grads)
        rows = table.export()
        kept.append((rows.keys.tobytes(), rows.values.tobytes(), rows.state.tobytes()))
    assert kept[0] == kept[1] == kept[2]
    assert _bits.setdefault(case.name, kept[0]) == kept[0], f"{level} rounds otherwise"


_bits: dict = {}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", [SGD(lr=0.5), Adagrad(lr=0.5), Adam(lr=0.1)], ids=repr)
def test_half_rows_are_computed_in_float32_and_rounded_once(dtype, rule):
    keys = np.arange(30)
    table = Table(7, optimizer=rule, dtype=dtype, initializer=Uniform(-1, 1))
    wide = Table(7, optimizer=rule)
    rng = np.random.default_rng(1)
    start = table.find_or_insert(torch.from_numpy(keys)).values
    for _ in range(5):
        wide.insert_or_assign(torch.from_numpy(keys), start.float())
        grads = rng.normal(size=(30, 7)).astype(np.float32)
        table.update(keys, grads)
        wide.update(keys, grads)
        found = table.find(torch.from_numpy(keys)).values
        wanted = wide.find(torch.from_numpy(keys)).values.to(found.dtype)
        assert torch.equal(found, wanted)
        start = found


def test_stochastic_rounding_has_no_bias():
    """10^4 rows step by a tenth of a gap: the mean moves by it (5 deviations: false alarm 6e-7), nearest not."""
    n = 10_000
    keys, grads = np.arange(n), np.full((n, 1), -0.1 * 2**-10, np.float32)
    means = []
    for rounding in (True, False):
        rule = SGD(lr=1.0, stochastic_rounding=rounding)
        table = Table(1, dtype="float16", optimizer=rule, initializer=Constant(1.0))
        table.update(keys, grads)
        values = table.find(keys).values.astype(np.float64)
        assert set(np.unique(values)) <= {1.0, 1 + 2**-10}
        means.append((values.mean() - 1) * 2**10)
    assert abs(means[0] - 0.1) < 5 * np.sqrt(0.1 * 0.9 / n)
    assert means[1] == 0


def test_optimizer_state_is_kept_by_assignment_and_lost_with_the_row():
    rule = Adagrad(lr=1.0, initial_accumulator_value=0.5)
    table = Table(2, optimizer=rule)
    keys, ones = np.array([3, 4]), np.ones((2, 2), np.float32)
    table.update(keys, ones)
    table.insert_or_assign(keys[:1], ones[:1])
    table.assign(keys[1:], ones[:1])
    assert table.export().state.tolist() == [[1.5, 1.5]] * 2
    table.erase(keys[:1])
    table.insert_or_assign(keys[:1], ones[:1])
    assert table.export().state.tolist() == [[0.5, 0.5], [1.5, 1.5]]
    assert table.state_width == 2


def test_another_rule_for_one_call_must_have_the_same_state():
    table = Table(2, optimizer=Adagrad(lr=1.0), initializer=Constant(0.0))
    keys, ones = np.array([3]), np.ones((1, 2), np.float32)
    table.update(keys, ones, optimizer=Adagrad(lr=0.0))
    assert table.find(keys).values.tolist() == [[0, 0]]
    table.update(keys, ones)
    np.testing.assert_allclose(table.find(keys).values, -1 / np.sqrt(2), rtol=1e-6)
    for other in (SGD(), Adam(), RowwiseAdagrad()):
        with refused("[Table.update] optimizer: expected the state of Ada"):
            table.update(keys, ones, optimizer=other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dim", [1, 7, 64, 300])
def test_a_gradient_that_is_not_finite_changes_nothing(level, bad, dim):
    table = Table(dim, optimizer=Adam(), track="changes")
    table.update(np.arange(5), np.ones((5, dim), np.float32))
    mark = table.mark()
    for row, column in ((0, 0), (4, dim - 1), (2, dim // 2)):
        grads = np.ones((6, dim), np.float32)
        grads[row, column] = bad
        with unchanged(table), refused(f"finite numbers, got {bad} at [{row}, {column}]"):
            table.update(np.arange(6), grads)
    assert len(table.delta(mark).keys) == 0
