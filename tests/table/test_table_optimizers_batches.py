# SPDX-License-Identifier: Apache-2.0
"""Duplicate ids: merged in a stated order, and rows of a matrix updated by them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_no_worse_than_torch, with_threads
from hotloop import table
from hotloop.front import impl as _impl
from hypothesis import given, settings
from hypothesis import strategies as st
from table_cases import Case, by_case
from torch import Tensor

IMPLS = ("cpu", "reference")


def batch(n: int, ids: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, ids, (n,), generator=g), torch.randn(n, dim, generator=g)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
# None; one; no columns; few ids often; many ids rarely; more than a thread's grain.
@pytest.mark.parametrize(
    "shape",
    [(0, 5, 3), (1, 5, 3), (4, 2, 0), (500, 7, 13), (500, 9000, 1), (6000, 3000, 64)],
    ids=str,
)
def test_merge_duplicates(impl: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    ids, grads = batch(*shape)
    grads = grads.to(dtype)
    done = table.merge_duplicates(ids, grads, impl=impl)
    assert _impl.last_impl("merge_duplicates") == impl
    order = list(dict.fromkeys(ids.tolist()))
    assert done.ids.tolist() == order
    assert torch.equal(done.ids[done.inverse], ids)
    assert torch.equal(done.counts, torch.bincount(done.inverse, minlength=len(order)))
    assert done.grads.dtype == torch.float32
    assert done.counts.dtype == done.inverse.dtype == torch.int64
    zeros = torch.zeros(len(order), shape[2])
    same = zeros.index_add(0, done.inverse, grads.float())
    truth = zeros.double().index_add(0, done.inverse, grads.double())
    assert_no_worse_than_torch(done.grads, same, truth)


def test_sums_are_in_the_order_of_the_batch() -> None:
    """float32 addition that depends on the order tells the order."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, 4000)
    grads = (rng.normal(size=(4000, 70)) * 10.0 ** rng.integers(-4, 5, (4000, 1))).astype(
        np.float32
    )
    wanted: dict[int, np.ndarray] = {}
    for i, g in zip(ids.tolist(), grads):
        wanted[i] = wanted[i] + g if i in wanted else g.copy()
    for threads in (1, 2):
        done = with_threads(threads, lambda: table.merge_duplicates(ids, grads, impl="cpu"))
        assert np.array_equal(done.grads, np.array(list(wanted.values())))
    backwards = table.merge_duplicates(ids[::-1].copy(), grads[::-1], impl="cpu")
    again = {int(i): g for i, g in zip(backwards.ids, backwards.grads)}
    assert not all(np.array_equal(again[i], g) for i, g in wanted.items())


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3), max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_ids_merge_as_a_dictionary_would(ids: list[int]) -> None:
    grads = np.arange(len(ids), dtype=np.float32)[:, None] + np.float32([0, 0.5])
    wanted: dict[int, Any] = {}
    for i, g in zip(ids, grads):
        wanted[i] = wanted.get(i, 0) + g
    for impl in IMPLS:
        done = table.merge_duplicates(np.array(ids, np.int64), grads, impl=impl)
        assert done.ids.tolist() == list(wanted)
        assert np.array_equal(done.grads, np.array(list(wanted.values())).reshape(-1, 2))


@pytest.mark.alone
@pytest.mark.parametrize("step", [1, 64, 2**20, 2**32, 2**44])
def test_ids_that_follow_a_pattern_do_not_collide(step: int) -> None:
    ids = np.arange(65536, dtype=np.int64) * step
    grads = np.zeros((65536, 1), np.float32)
    began = time.perf_counter()
    done = table.merge_duplicates(ids, grads, impl="cpu")
    assert len(done.ids) == len(np.unique(ids))
    # 1 ms where ids spread, many seconds where they all start at one slot.
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize("impl", IMPLS)
def test_ids_and_gradients_of_other_kinds(impl: str) -> None:
    ids, grads = batch(40, 9, 6)
    wanted = table.merge_duplicates(ids, grads, impl=impl)
    small = table.merge_duplicates(ids.int(), grads, impl=impl)
    assert small.ids.dtype == torch.int32
    buffer = torch.zeros(40, 12)
    buffer[:, ::2] = grads
    interleaved = torch.zeros(80, dtype=torch.int64)
    interleaved[::2] = ids
    strided = table.merge_duplicates(interleaved[::2], buffer[:, ::2], impl=impl)
    numpy = table.merge_duplicates(ids.numpy(), grads.numpy(), impl=impl)
    for other in (small, strided, numpy):
        for a, b in zip(other, wanted):
            assert np.array_equal(np.asarray(a), b.numpy())
    if impl == "reference":
        assert table.merge_duplicates(ids, grads.double()).grads.dtype == torch.float64


@pytest.mark.parametrize("impl", IMPLS)
@by_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_matrix_move_as_gathered_rows_do(
    impl: str, case: Case, dtype: torch.dtype
) -> None:
    rule = case.rule
    w, w2 = (torch.ones(30, 9).to(dtype) for _ in range(2))
    state, state2 = (rule.init_state(30, 9, like=torch.zeros(0)) for _ in range(2))
    for seed in range(4):
        ids, grads = batch(40, 20, 9, seed)
        more = {"rounding_seed": seed, "impl": impl}
        done = table.sparse_dedup_optimize(w, ids, grads, state, rule, **more)
        merged = table.merge_duplicates(ids, grads, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(done, merged))
        part, parts = w2[merged.ids], {k: x[merged.ids] for k, x in state2.items()}
        case.call(part, merged.grads, parts, **more)
        w2[merged.ids] = part
        for name, x in parts.items():
            state2[name][merged.ids] = x
        assert torch.equal(w, w2)
        assert all(torch.equal(state[k], state2[k]) for k in state)


@by_case
def test_without_dedup_each_occurrence_is_a_step(case: Case) -> None:
    ids, grads = batch(30, 6, 5)
    rule = case.rule

    def after(impl: str, one_by_one: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        w = torch.ones(6, 5, dtype=dtype)
        state = rule.init_state(6, 5, like=w)
        g = grads.to(torch.float64) if dtype == torch.float64 else grads
        for i in range(30) if one_by_one else range(1):
            part = slice(i, i + 1) if one_by_one else slice(None)
            table.sparse_dedup_optimize(
                w, ids[part], g[part], state, rule, dedup=one_by_one, impl=impl
            )
        return w

    assert torch.equal(after("cpu", False), after("cpu", True))
    truth = after("reference", True, torch.float64)
    torch.testing.assert_close(after("reference", False, torch.float64), truth, rtol=0, atol=0)
    torch.testing.assert_close(after("cpu", False).double(), truth, rtol=1e-4, atol=1e-5)


def test_without_dedup_threads_do_not_matter_and_adagrad_differs_from_dedup() -> None:
    ids, grads = batch(6000, 300, 64)
    rule = table.Adagrad(lr=0.1)

    def after(dedup: bool) -> Tensor:
        w = torch.zeros(300, 64)
        done = table.sparse_dedup_optimize(
            w, ids, grads, rule.init_state(300, 64, like=w), rule, dedup=dedup
        )
        assert done.counts.sum() == 6000
        return w

    one, two = (with_threads(n, lambda: after(False)) for n in (1, 2))
    assert torch.equal(one, two)
    assert float((one - after(True)).abs().max()) > 0.01


@pytest.mark.parametrize("impl", IMPLS)
def test_the_order_of_a_deduplicated_batch_hardly_matters(impl: str) -> None:
    ids, grads = batch(50, 6, 5)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    rule = table.Adagrad(lr=0.1)
    found = []
    for i, g in ((ids, grads), (ids[order], grads[order])):
        w = torch.zeros(6, 5)
        table.sparse_dedup_optimize(w, i, g, rule.init_state(6, 5, like=w), rule, impl=impl)
        found.append(w)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dedup", [True, False])
def test_half_gradients_and_empty_batches(impl: str, dedup: bool) -> None:
    rule = table.Adam()
    w = torch.ones(4, 5)
    state = rule.init_state(4, 5, like=w)
    none = torch.zeros(0, dtype=torch.int32)
    done = table.sparse_dedup_optimize(
        w, none, torch.zeros(0, 5), state, rule, dedup=dedup, impl=impl
    )
    assert done.ids.shape == (0,)
    assert bool((w == 1).all())
    g = torch.ones(3, 5, dtype=torch.bfloat16)
    done = table.sparse_dedup_optimize(
        w, torch.tensor([3, 3, 0]), g, state, rule, dedup=dedup, impl=impl
    )
    assert done.grads.dtype == torch.float32
    assert state["step"].tolist() == ([1, 0, 0, 1] if dedup else [1, 0, 0, 2])
