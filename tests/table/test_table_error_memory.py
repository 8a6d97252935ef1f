# SPDX-License-Identifier: Apache-2.0
"""``error_memory_compensate``: the grid, its laws, its oracles, ties."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_no_worse_than_torch, misaligned, strided
from hotloop import table
from hotloop.front import impl as _impl
from hotloop.front import native
from hotloop.reference import table as reference
from table_cases import plain_error_memory, samples, tensors

CORE = native.core
IMPLS = ("cpu", "reference")
# Queries, slots, dimensions, k. Groups hold 8 queries, panels 8 to 32 slots, blocks at most 512 slots; above 256
# dimensions a block is smaller. k of 64 and less shares one length of the candidate list.
GRID = [
    (0, 5, 3, 2),  # no query
    (3, 0, 4, 2),  # nothing stored
    (1, 1, 1, 1),
    (2, 3, 5, 9),  # fewer slots than k
    (7, 31, 13, 31),  # k = N
    (8, 32, 16, 5),  # a group, a panel
    (9, 33, 17, 6),
    (5, 511, 7, 40),
    (8, 512, 8, 40),  # a block
    (17, 513, 9, 40),
    (3, 2003, 11, 180),  # primes; more than one selection
    (2, 600, 300, 70),  # smaller blocks
    (2, 70, 1031, 7),
    (40, 5000, 24, 1),
    (1, 30000, 6, 64),  # slots shared by the threads
]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GRID, ids=str)
@pytest.mark.parametrize("gamma", [1.0, 0.25])
def test_no_worse_than_plain_torch(shape: Any, dtype: torch.dtype, gamma: float) -> None:
    batch, slots, dim, k = shape
    x = samples(batch, slots, dim)
    query, keys = (torch.from_numpy(v).to(dtype) for v in (x.query, x.keys))
    base, labels, stored = (torch.from_numpy(v) for v in (x.base, x.labels, x.stored_base))
    call = (query, base, keys, labels, stored)
    wide = tuple(v.double() for v in call)
    # Half types are computed in float32, and judged as such.
    same = tuple(v.to(torch.float64 if dtype == torch.float64 else torch.float32) for v in call)
    truth = reference.error_memory_compensate(*wide, k=k, gamma=gamma)
    for impl in IMPLS:
        ours = table.error_memory_compensate(*call, k=k, gamma=gamma, impl=impl)
        assert _impl.last_impl("error_memory_compensate") == impl
        assert ours.dtype == same[0].dtype
        assert_no_worse_than_torch(ours, plain_error_memory(*same, k=k, gamma=gamma), truth)


@pytest.mark.parametrize("shape", [(9, 33, 17, 6), (3, 2003, 11, 180), (2, 600, 300, 70)], ids=str)
def test_every_instruction_set(shape: Any, level: str) -> None:
    batch, slots, dim, k = shape
    call = samples(batch, slots, dim).arguments()
    found = table.error_memory_compensate(*call, k=k, gamma=0.5, return_neighbors=True, impl="cpu")
    assert CORE.last_simd_level() == level
    wanted = table.error_memory_compensate(
        *call, k=k, gamma=0.5, return_neighbors=True, impl="reference"
    )
    np.testing.assert_array_equal(found.neighbors, wanted.neighbors)
    np.testing.assert_allclose(found.weights, wanted.weights, rtol=2e-5, atol=1e-7)
    same = plain_error_memory(*tensors(call, torch.float32), k=k, gamma=0.5)
    truth = reference.error_memory_compensate(*(v.astype(np.float64) for v in call), k=k, gamma=0.5)
    assert_no_worse_than_torch(torch.from_numpy(found.prediction), same, torch.from_numpy(truth))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_neighbours_are_the_most_similar(dtype: Any, impl: str) -> None:
    x = samples(6, 400, 12)
    query, base, keys, labels, stored = x.arguments(dtype)
    found = table.error_memory_compensate(
        query, base, keys, labels, stored, k=10, return_neighbors=True, impl=impl
    )
    unit = [v.astype(np.float64) for v in (query, keys)]
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in unit]
    s = unit[0] @ unit[1].T
    np.testing.assert_array_equal(found.neighbors, np.argsort(-s, axis=1)[:, :10])
    near = np.take_along_axis(s, found.neighbors, 1)
    a = np.exp(near / 0.1)
    np.testing.assert_allclose(found.weights, a / a.sum(1, keepdims=True), rtol=1e-5)
    label = (found.weights * labels[found.neighbors]).sum(1)
    np.testing.assert_allclose(found.prediction, base + 0.9 * (label - base), rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
class TestOracles:
    def test_no_step_gives_the_base_prediction(self, impl: str) -> None:
        call = samples(5, 90, 7).arguments()
        np.testing.assert_array_equal(
            table.error_memory_compensate(*call, lam=0, impl=impl), call[1]
        )

    def test_nothing_stored_gives_the_base_prediction(self, impl: str) -> None:
        call = samples(5, 0, 7).arguments()
        found = table.error_memory_compensate(*call, return_neighbors=True, impl=impl)
        np.testing.assert_array_equal(found.prediction, call[1])
        assert found.weights.shape == found.neighbors.shape == (5, 0)

    def test_a_model_without_errors_is_left_alone(self, impl: str) -> None:
        query, base, keys, _, stored = samples(5, 90, 7).arguments()
        found = table.error_memory_compensate(query, base, keys, stored, stored, gamma=0, impl=impl)
        np.testing.assert_array_equal(found, base)

    def test_full_step_is_attention_over_the_neighbours(self, impl: str) -> None:
        call = samples(5, 90, 7).arguments()
        found = table.error_memory_compensate(*call, lam=1, k=8, return_neighbors=True, impl=impl)
        label = (found.weights * call[3][found.neighbors]).sum(1)
        np.testing.assert_allclose(found.prediction, label, rtol=1e-6, atol=1e-6)

    def test_an_exact_duplicate_gives_back_its_error(self, impl: str) -> None:
        x = samples(1, 300, 9)
        x.query = 3.0 * x.keys[[5, 299, 0]]  # the length does not matter
        x.base = np.array([0.4, 0.5, 0.6], np.float32)
        call = x.arguments()
        found = table.error_memory_compensate(
            *call, k=1, gamma=0, lam=0.5, return_neighbors=True, impl=impl
        )
        at = np.array([5, 299, 0])
        np.testing.assert_array_equal(found.neighbors[:, 0], at)
        wanted = np.clip(x.base + 0.5 * (x.labels[at] - x.stored_base[at]), 0, 1)
        np.testing.assert_allclose(found.prediction, wanted, rtol=1e-6, atol=1e-7)

    def test_predictions_stay_between_zero_and_one(self, impl: str) -> None:
        query, base, keys, labels, stored = samples(50, 90, 7).arguments()
        stored = np.where(labels > 0, 0.0, 1.0)
        found = table.error_memory_compensate(
            query, base, keys, labels, stored, k=1, gamma=0, lam=1, impl=impl
        )
        assert set(np.unique(found)) == {0.0, 1.0}

    def test_high_temperature_is_the_mean_over_neighbours(self, impl: str) -> None:
        call = samples(5, 90, 7).arguments()
        found = table.error_memory_compensate(*call, k=500, lam=1, temperature=1e9, impl=impl)
        np.testing.assert_allclose(found, np.full(5, call[3].mean()), rtol=1e-6)

    def test_low_temperature_is_the_nearest_neighbour(self, impl: str) -> None:
        call = samples(5, 90, 7).arguments()
        near = table.error_memory_compensate(*call, k=1, lam=1, impl=impl)
        found = table.error_memory_compensate(*call, k=50, lam=1, temperature=1e-30, impl=impl)
        np.testing.assert_array_equal(found, near)


@pytest.mark.parametrize("impl", IMPLS)
def test_order_of_the_slots_does_not_matter(impl: str) -> None:
    query, base, keys, labels, stored = samples(9, 700, 12).arguments()
    order = np.random.default_rng(0).permutation(700)
    one = table.error_memory_compensate(query, base, keys, labels, stored, k=30, impl=impl)
    other = table.error_memory_compensate(
        query, base, keys[order], labels[order], stored[order], k=30, impl=impl
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_length_of_vectors_does_not_matter(impl: str) -> None:
    query, base, keys, labels, stored = samples(9, 700, 12).arguments()
    one = table.error_memory_compensate(query, base, keys, labels, stored, k=30, impl=impl)
    for scale in (2.0**-90, 2.0**100):  # squares under- and overflow float32
        other = table.error_memory_compensate(
            (scale * query).astype(np.float32), base, (keys * scale).astype(np.float32),
            labels, stored, k=30, impl=impl,
        )  # fmt: skip
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 7, 64, 130, 399])
def test_of_equal_similarities_the_lower_slot_is_taken(k: int, dtype: Any, level: str) -> None:
    """Three directions only: nearly all similarities are equal."""
    rng = np.random.default_rng(k)
    directions = rng.normal(size=(3, 5))
    keys = directions[rng.integers(0, 3, 1200)].astype(dtype)
    query = directions.astype(dtype)
    y, base = rng.random(1200), rng.random(3)
    for impl in IMPLS:
        found = table.error_memory_compensate(
            query, base, keys, y, y, k=k, return_neighbors=True, impl=impl
        )
        same = (keys[:, None] == query).all(-1)
        for b in range(3):
            wanted = np.flatnonzero(same[:, b])[:k]
            np.testing.assert_array_equal(found.neighbors[b, : len(wanted)], wanted)
        np.testing.assert_array_equal(
            np.sort(found.neighbors, 1)[:, 1:] > np.sort(found.neighbors, 1)[:, :-1], True
        )


def test_threads_and_batches_do_not_matter() -> None:
    call = samples(37, 9001, 16).arguments()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(table.error_memory_compensate(*call, k=50, return_neighbors=True))
    one = [
        table.error_memory_compensate(
            call[0][b : b + 1], call[1][b : b + 1], *call[2:], k=50, return_neighbors=True
        )
        for b in range(37)
    ]
    for other in (*results[1:], [np.concatenate([x[i] for x in one]) for i in range(3)]):
        for a, b in zip(results[0], other):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_no_neighbour(bad: float, impl: str) -> None:
    query, base, keys, labels, stored = samples(3, 100, 6).arguments()
    keys[10:, 2] = bad
    query[1, 0] = bad
    found = table.error_memory_compensate(
        query, base, keys, labels, stored, k=20, return_neighbors=True, impl=impl
    )
    assert found.prediction[1] == base[1]
    np.testing.assert_array_equal(found.neighbors[1], -1)
    for b in (0, 2):
        assert sorted(found.neighbors[b, :10]) == list(range(10))
        np.testing.assert_array_equal(found.neighbors[b, 10:], -1)
        np.testing.assert_array_equal(found.weights[b, 10:], 0)
        np.testing.assert_allclose(found.weights[b].sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_vector_of_length_zero_is_similar_to_nothing(impl: str) -> None:
    query, base, keys, labels, stored = samples(2, 4, 3).arguments()
    keys[1] = 0
    query[1] = 0
    found = table.error_memory_compensate(
        query, base, keys, labels, stored, return_neighbors=True, impl=impl
    )
    np.testing.assert_allclose(found.weights[1], 0.25)
    s = (keys / np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-30)) @ query[0]
    assert list(found.neighbors[0]) == list(np.argsort(-s, kind="stable"))
    assert list(found.neighbors[1]) == [0, 1, 2, 3]


@pytest.mark.parametrize("impl", IMPLS)
def test_layouts(impl: str) -> None:
    call = tensors(samples(5, 77, 6).arguments(), torch.float32)
    wanted = table.error_memory_compensate(*call, k=9, impl=impl)
    for change in (strided, misaligned, lambda x: x.flip(0).flip(0)):
        found = table.error_memory_compensate(*map(change, call), k=9, impl=impl)
        assert torch.equal(found, wanted)
    backwards = [np.ascontiguousarray(x.numpy()[::-1])[::-1] for x in call]
    transposed = [np.asfortranarray(x.numpy()) for x in call]
    for arrays in (backwards, transposed):
        found = table.error_memory_compensate(*arrays, k=9, impl=impl)
        np.testing.assert_array_equal(found, wanted.numpy())
    grown = [x.clone().requires_grad_() for x in call]
    found = table.error_memory_compensate(*grown, k=9, impl=impl)
    assert torch.equal(found, wanted) and not found.requires_grad


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, bool, np.float16])
def test_labels_of_any_number_type(dtype: Any) -> None:
    query, base, keys, labels, stored = samples(5, 77, 6).arguments()
    wanted = table.error_memory_compensate(query, base, keys, labels, stored, k=9)
    found = table.error_memory_compensate(query, base, keys, labels.astype(dtype), stored, k=9)
    np.testing.assert_array_equal(found, wanted)
    other = table.error_memory_compensate(
        *(torch.from_numpy(x) for x in (query, base, keys, labels.astype(dtype), stored)), k=9
    )
    np.testing.assert_array_equal(other.numpy(), wanted)


def test_many_queries_take_several_passes() -> None:
    """Candidates of 32 MiB at a time: with k = N they hold few queries."""
    call = samples(300, 9000, 4).arguments()
    found = table.error_memory_compensate(*call, k=9000, lam=1, temperature=1e9)
    np.testing.assert_allclose(found, np.full(300, call[3].mean()), rtol=1e-6)


def test_inputs_are_not_changed() -> None:
    call = samples(5, 77, 6).arguments()
    copies = [x.copy() for x in call]
    for x in call:
        x.flags.writeable = False
    table.error_memory_compensate(*call, k=9)
    for x, y in zip(call, copies):
        np.testing.assert_array_equal(x, y)
