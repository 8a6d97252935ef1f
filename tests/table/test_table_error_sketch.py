# SPDX-License-Identifier: Apache-2.0
"""The sketch: hashes, exact counts, its laws, its oracles, its state."""

from __future__ import annotations

import copy
import hashlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_no_worse_than_torch, misaligned, strided
from hotloop import table
from hotloop.front import impl as _impl
from hotloop.front import native
from hotloop.reference import table as reference
from hotloop.table import ErrorSketch
from table_cases import samples

CORE = native.core
IMPLS = ("cpu", "reference")
# Rows, dimensions, repeats, bits. A group is 8 rows, a tile 512 bits: 103 * 5 = 515 end in a second one.
GRID = [
    (0, 3, 2, 4),
    (1, 1, 1, 1),
    (7, 5, 3, 16),
    (8, 13, 32, 16),
    (9, 64, 33, 16),
    (17, 31, 103, 5),
    (5, 7, 41, 24),
    (3, 1031, 7, 11),
]


def sketch_of(
    rows: int, dim: int, repeats: int, bits: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x = samples(rows, rows, dim)
    projections = table.lsh_projections(dim, repeats=repeats, bits=bits, seed=1)
    return x.keys, x.labels, x.stored_base, x.base, projections


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_buckets_are_exact(shape: Any, dtype: str, level: str) -> None:
    """Every instruction set and the reference: the same bits, since products and sums round alike."""
    hidden, _, _, _, projections = sketch_of(*shape)
    h = torch.from_numpy(hidden).to(getattr(torch, dtype))
    w = torch.from_numpy(projections)
    found = table.lsh_buckets(h, w, impl="cpu")
    if shape[0]:
        assert CORE.last_simd_level() == level
    assert found.dtype == torch.int32 and found.shape == (shape[0], shape[2])
    assert torch.equal(found, table.lsh_buckets(h, w, impl="reference"))
    assert torch.equal(found, table.lsh_buckets(strided(h), strided(w)))
    assert torch.equal(found, table.lsh_buckets(misaligned(h), misaligned(w)))
    # Against the definition, wherever rounding cannot matter.
    z = torch.einsum("bd,rld->brl", h.float().double(), w.double())
    clear = (z.abs() > 1e-4).all(-1)
    bits = ((z > 0).long() << torch.arange(shape[3])).sum(-1)
    assert torch.equal(found.long()[clear], bits[clear])
    assert clear.sum() >= 0.5 * clear.numel()


def test_projections_are_the_same_everywhere() -> None:
    w = table.lsh_projections(64, repeats=20, bits=16, seed=1)
    assert hashlib.sha256(w.tobytes()).hexdigest().startswith("3d1e06f89303e9e6")
    np.testing.assert_array_equal(
        table.lsh_projections(5, repeats=7, bits=3, seed=2**64 - 1),
        reference.lsh_projections(5, repeats=7, bits=3, seed=2**64 - 1),
    )
    assert (w != table.lsh_projections(64, repeats=20, bits=16, seed=2)).mean() > 0.99


def same_bit_rate(projections: np.ndarray, angle: float) -> tuple[float, int]:
    pair = np.zeros((2, projections.shape[2]), np.float32)
    pair[:, :2] = [[1, 0], [np.cos(angle), np.sin(angle)]]
    one, other = table.lsh_buckets(pair, projections)
    bits = int(projections.shape[1])
    same = bits - np.array([bin(x).count("1") for x in (one ^ other).tolist()])
    return float(same.mean() / bits), bits * len(one)


@pytest.mark.parametrize("angle", [0.1, 0.7, np.pi / 2, 2.5, np.pi])
def test_probability_of_the_same_bit(angle: float) -> None:
    """1 - angle / pi. False alarm: below 1e-6 per angle (4.9 standard deviations of 64000 independent bits)."""
    rate, n = same_bit_rate(table.lsh_projections(6, repeats=4000, bits=16, seed=5), angle)
    p = 1 - angle / np.pi
    assert abs(rate - p) <= 4.9 * np.sqrt(p * (1 - p) / n) + 1e-12
    # Negative controls: a false claim, and directions that are not rotation invariant.
    assert abs(rate - (p + 0.03)) > 4.9 * np.sqrt(0.25 / n)
    if angle == 0.7:
        signs = np.sign(table.lsh_projections(6, repeats=4000, bits=16, seed=5))
        rate, n = same_bit_rate(signs, angle)
        assert abs(rate - p) > 4.9 * np.sqrt(p * (1 - p) / n)


def test_projections_are_normal_and_independent() -> None:
    """Moments of 400000 numbers within 5 standard errors, and no correlation between neighbours."""
    w = table.lsh_projections(10, repeats=2500, bits=16, seed=3).astype(np.float64).reshape(-1, 10)
    n = w.size
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((w**power).mean() - mean) <= 5 * np.sqrt(variance / n)
    correlation = np.corrcoef(w.T) - np.eye(10)
    assert np.abs(correlation).max() <= 5 / np.sqrt(len(w))
    assert abs((w[1:] * w[:-1]).mean()) <= 5 / np.sqrt(n)


@pytest.mark.parametrize("similarity", ["count", "const"])
@pytest.mark.parametrize("shape", GRID[2:], ids=str)
def test_against_a_dictionary(shape: Any, similarity: str) -> None:
    hidden, labels, stored, base, projections = sketch_of(*shape)
    hidden = np.concatenate([hidden, hidden[::2]])  # some samples twice
    labels, stored = (np.concatenate([x, x[::2]]) for x in (labels, stored))
    buckets = table.lsh_buckets(hidden, projections)
    model: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row, y, yb in zip(buckets.tolist(), labels, stored):
        for r, bucket in enumerate(row):
            model.setdefault((r, bucket), []).append((float(y), float(yb)))
    for impl in IMPLS:
        if impl == "reference" and shape[3] > 16:
            continue
        sketch = np.zeros((shape[2], 2 ** shape[3], 3), np.int64)
        table.lsh_error_sketch_write(buckets, labels, stored, sketch, impl=impl)
        assert _impl.last_impl("lsh_error_sketch_write") == impl
        assert np.count_nonzero(sketch[..., 0]) == len(model)
        for (r, bucket), found in model.items():
            y, yb = np.array(found, np.float64).T
            units = np.rint(np.stack([y, yb]) * 2**32).sum(1)
            assert sketch[r, bucket].tolist() == [len(found), *units.tolist()]
        query = np.concatenate([hidden[:4], -hidden[:3]])
        at = table.lsh_buckets(query, projections)
        y_base = np.resize(base, len(query)).astype(np.float64)
        prediction, weights = table.lsh_error_sketch(
            at, y_base, sketch, similarity=similarity, gamma=0.3, return_weights=True, impl=impl
        )
        for b, row in enumerate(at.tolist()):
            hits = [(r, np.array(model[r, v])) for r, v in enumerate(row) if (r, v) in model]
            if not hits:
                assert prediction[b] == y_base[b]
                continue
            s = np.array([len(x) / len(hidden) if similarity == "count" else 0.0 for _, x in hits])
            a = np.exp(s / 0.1) / np.exp(s / 0.1).sum()
            y, yb = (a @ np.array([x.mean(0) for _, x in hits])).tolist()
            error = 0.3 * (y - y_base[b]) + 0.7 * (y - yb)
            np.testing.assert_allclose(
                prediction[b], np.clip(y_base[b] + 0.9 * error, 0, 1), rtol=0, atol=1e-9
            )
            np.testing.assert_allclose(weights[b, [r for r, _ in hits]], a, rtol=1e-12)
            assert np.count_nonzero(weights[b]) == len(hits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_worse_than_plain_torch(dtype: torch.dtype) -> None:
    hidden, labels, stored, base, projections = sketch_of(300, 6, 40, 4)
    buckets = torch.from_numpy(table.lsh_buckets(hidden, projections))
    y, yb, y_base = (torch.from_numpy(x).to(dtype) for x in (labels, stored, base))
    sketch = torch.zeros(40, 16, 3, dtype=torch.int64)
    table.lsh_error_sketch_write(buckets, y, yb, sketch)

    def plain(kind: torch.dtype) -> torch.Tensor:
        sums = torch.zeros(40, 16, 3, dtype=kind)
        values = torch.stack([torch.ones_like(y), y, yb], -1).to(kind)
        for r in range(40):
            sums[r].index_add_(0, buckets[:, r].long(), values)
        found = sums[torch.arange(40), buckets.long()]
        c = found[..., 0]
        a = (c / 300 / 0.1).softmax(-1)
        label, past = ((a * found[..., i] / c).sum(-1) for i in (1, 2))
        error = 0.5 * (label - y_base.to(kind)) + 0.5 * (label - past)
        return (y_base.to(kind) + 0.9 * error).clamp(0, 1)

    for impl in IMPLS:
        ours = table.lsh_error_sketch(buckets, y_base, sketch, gamma=0.5, impl=impl)
        assert ours.dtype == dtype
        # The unit of 2^-32 is all the error there is in float64.
        eps = 1e-9 if dtype == torch.float64 else 1e-6
        assert_no_worse_than_torch(ours, plain(dtype), plain(torch.float64), eps=eps)


@pytest.mark.parametrize("impl", IMPLS)
class TestOracles:
    def test_a_single_sample_comes_back(self, impl: str) -> None:
        sketch = ErrorSketch(7, repeats=5, bits=6, gamma=0.0, lam=1.0)
        h = samples(1, 1, 7).keys
        for y, yb, base in ((1.0, 0.25, 0.125), (0.0, 0.375, 0.5)):
            sketch.reset()
            sketch.write(h, np.array([y]), np.array([yb]), impl=impl)
            found = sketch.compensate(h, np.array([base]), return_weights=True, impl=impl)
            np.testing.assert_allclose(found.prediction, [base + y - yb], rtol=1e-9)
            np.testing.assert_allclose(found.weights, np.full((1, 5), 0.2), rtol=1e-12)

    def test_empty_or_no_step_gives_the_base_prediction(self, impl: str) -> None:
        x = samples(6, 6, 7)
        sketch = ErrorSketch(7, repeats=5, bits=6)
        np.testing.assert_array_equal(sketch.compensate(x.query, x.base, impl=impl), x.base)
        sketch = ErrorSketch(7, repeats=5, bits=6, lam=0.0)
        sketch.write(x.keys, x.labels, x.stored_base, impl=impl)
        np.testing.assert_array_equal(sketch.compensate(x.query, x.base, impl=impl), x.base)

    def test_a_model_without_errors_is_left_alone(self, impl: str) -> None:
        x = samples(6, 50, 7)
        sketch = ErrorSketch(7, repeats=5, bits=3, gamma=0.0)
        sketch.write(x.keys, x.stored_base, x.stored_base, impl=impl)
        np.testing.assert_array_equal(sketch.compensate(x.query, x.base, impl=impl), x.base)

    def test_equal_similarities_are_the_mean_over_repeats(self, impl: str) -> None:
        x = samples(6, 50, 7)
        sketch = ErrorSketch(7, repeats=5, bits=2, similarity="const", lam=1.0)
        sketch.write(x.keys, x.labels, x.stored_base, impl=impl)
        at = table.lsh_buckets(x.query, sketch.projections)
        found = sketch.sketch[np.arange(5), at].astype(float)
        wanted = (found[..., 1] * 2.0**-32 / found[..., 0]).mean(1)
        np.testing.assert_allclose(sketch.compensate(x.query, x.base, impl=impl), wanted, rtol=1e-6)


def test_order_threads_and_cuts_do_not_matter() -> None:
    x = samples(5, 999, 12)
    order = np.random.default_rng(0).permutation(999)
    made = []
    for threads, cuts, at in ((1, [], slice(None)), (2, [1, 500], order), (3, [998], order[::-1])):
        torch.set_num_threads(threads)
        sketch = ErrorSketch(12, repeats=9, bits=5)
        columns = [v[at] for v in (x.keys, x.labels, x.stored_base)]
        for part in zip(*(np.split(v, cuts) for v in columns)):
            sketch.write(*part)
        assert sketch.writes == 999
        made.append(sketch.sketch)
    np.testing.assert_array_equal(made[0], made[1])
    np.testing.assert_array_equal(made[0], made[2])


def test_sketches_of_shards_add_up() -> None:
    x = samples(5, 100, 12)
    whole, one, other = (ErrorSketch(12, repeats=9, bits=5) for _ in range(3))
    whole.write(x.keys, x.labels, x.stored_base)
    one.write(x.keys[:37], x.labels[:37], x.stored_base[:37])
    other.write(x.keys[37:], x.labels[37:], x.stored_base[37:])
    np.testing.assert_array_equal(whole.sketch, one.sketch + other.sketch)


def test_counts_do_not_saturate() -> None:
    """float32 stops counting at 2^24."""
    sketch = ErrorSketch(2, repeats=1, bits=1, lam=1.0)
    h = np.array([[1.0, 1.0]])
    bucket = int(table.lsh_buckets(h, sketch.projections)[0, 0])
    sketch.sketch[0, bucket] = [2**24, 2**24 * 2**32, 0]
    sketch.writes = 2**24
    sketch.write(np.tile(h, (3, 1)), np.zeros(3), np.ones(3))
    assert sketch.sketch[0, bucket].tolist() == [2**24 + 3, 2**24 * 2**32, 3 * 2**32]
    found = sketch.compensate(h, np.array([0.5]))
    np.testing.assert_allclose(found, [2**24 / (2**24 + 3)], rtol=1e-12)
    assert found[0] < 1


def test_state() -> None:
    x = samples(5, 100, 12)
    sketch = ErrorSketch(12, repeats=9, bits=5, seed=4)
    sketch.write(x.keys, x.labels, x.stored_base)
    wanted = sketch.compensate(x.query, x.base)
    state = copy.deepcopy(sketch.state_dict())
    other = ErrorSketch(12, repeats=9, bits=5, seed=4)
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.compensate(x.query, x.base), wanted)
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(sketch)).compensate(x.query, x.base), wanted
    )
    sketch.reset()
    assert (
        sketch.writes == 0
        and not sketch.sketch.any()
        and other.sketch.any()
        and state["sketch"].any()
    )
    like = torch.empty(0)
    third = ErrorSketch(12, repeats=9, bits=5, seed=4, like=like)
    third.load_state_dict({**state, "sketch": torch.from_numpy(state["sketch"])})
    found = third.compensate(torch.from_numpy(x.query), torch.from_numpy(x.base))
    np.testing.assert_array_equal(found.numpy(), wanted)
    third.reset()
    assert not third.state_dict()["sketch"].any()
