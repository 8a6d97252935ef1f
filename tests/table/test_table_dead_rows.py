# SPDX-License-Identifier: Apache-2.0
"""Numbers of rows outlive rows: pending gradients and saved lookups name rows that were freed and taken again since."""

import copy

import numpy as np
import pytest
import torch
from hotloop.table import SGD, Constant, HashEmbedding, Table

KEYS = [7, 0, -1, -8, 2**62]


def one(key):
    return torch.tensor([key])


def pending(key):
    """A module with a gradient of 1 kept for ``key``, whose row is the second one."""
    module = HashEmbedding(
        1, optimizer=SGD(lr=1.0), initializer=Constant(0.0), update="step"
    ).train()
    module.table.insert_or_assign(np.array([100]), np.zeros((1, 1), np.float32))
    module(one(key)).sum().backward()
    return module, module.table


@pytest.mark.parametrize("key", KEYS)
def test_a_kept_gradient_finds_its_key_and_no_dead_row(key):
    """A freed row was left with ~key of its last owner, which the next owner's key can be."""
    module, table = pending(key)
    zero = np.zeros((1, 1), np.float32)
    table.erase(np.array([key]))
    table.insert_or_assign(np.array([~key]), zero)
    table.erase(np.array([~key]))
    table.erase(np.array([100]))
    table.insert_or_assign(np.array([key]), zero)
    assert module.step() == 0
    assert table.find(np.array([key])).values.tolist() == [[-1.0]]


@pytest.mark.parametrize("key", KEYS)
def test_a_kept_gradient_of_a_key_that_is_gone_finds_no_row(key):
    module, table = pending(key)
    table.erase(np.array([key]))
    for other in (~key, 55):
        table.insert_or_assign(np.array([other]), np.zeros((1, 1), np.float32))
        table.erase(np.array([other]))
    assert module.step() == 1
    table.insert_or_assign(np.array([~key]), np.zeros((1, 1), np.float32))
    assert table.find(np.array([~key])).values.tolist() == [[0.0]]
    assert table.find(np.array([key])).found.tolist() == [False]


@pytest.mark.parametrize("key", KEYS)
def test_a_kept_gradient_after_the_table_was_emptied(key):
    """Rows of an emptied table are no key's, not even key 0's."""
    module, table = pending(key)
    table.clear()
    assert len(table) == 0
    assert module.step() == 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"track": ("use", "changes")}, {"bounded": True}])
def test_key_0_is_a_key_like_any_other(threads, settings):
    """Rows that are nobody's hold the key 0."""
    torch.set_num_threads(threads)
    settings = dict(settings)
    if settings.pop("bounded", False):
        settings |= {"max_capacity": 5000, "evict_strategy": "lru"}
    table = Table(2, capacity=1, initializer=Constant(1.0), **settings)
    keys = np.array([3, 0, 0, 9, 0, *range(10, 3000)])
    for _ in range(3):
        assert not table.find(np.array([0])).found.any()
        found = table.find_or_insert(keys).found
        assert found[[1, 2, 4]].tolist() == [False, True, True]
        values = np.full((len(keys), 2), 4.0, np.float32)
        assert table.insert_or_assign(keys, values).all()
        assert table.find(np.array([0])).values.tolist() == [[4.0, 4.0]]
        assert copy.deepcopy(table).find(np.array([0, 9])).found.all()
        assert table.erase(np.array([0, 0])).tolist() == [True, False]
        assert not table.contains(np.array([0])).any()
        table.erase(keys)
        assert len(table) == 0
