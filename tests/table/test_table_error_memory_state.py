# SPDX-License-Identifier: Apache-2.0
"""``ErrorMemory`` against a Python deque, its admission, its draws, its state."""

from __future__ import annotations

import copy
import io
import pickle
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hotloop import core, table
from hotloop.front import native
from hotloop.table import ErrorMemory
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from table_cases import samples

DIM = 3
# Few directions: equal similarities are the rule, and which sample is taken depends on its age.
DIRECTIONS = np.random.default_rng(7).normal(size=(4, DIM)).astype(np.float32)


def offered(count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hidden = DIRECTIONS[rng.integers(0, len(DIRECTIONS), count)]
    return (
        hidden,
        rng.integers(0, 2, count).astype(np.float32),
        rng.random(count).astype(np.float32),
    )


class AgainstDeque(RuleBasedStateMachine):
    """Every rule at once: eviction, admission by error and by chance, reset, save and load."""

    @initialize(
        capacity=st.integers(1, 12),
        k=st.integers(1, 6),
        sigma=st.sampled_from([None, 0.0, 0.5]),
        rate=st.sampled_from([1.0, 0.6, 0.0]),
        seed=st.integers(0, 2**64 - 1),
    )
    def start(self, capacity: int, k: int, sigma: float | None, rate: float, seed: int) -> None:
        self.settings: dict[str, Any] = {
            "k": k,
            "gamma": 0.3,
            "sigma": sigma,
            "sample_rate": rate,
            "seed": seed,
        }
        self.memory = ErrorMemory(capacity, DIM, **self.settings)
        self.model: deque[tuple[np.ndarray, float, float]] = deque(maxlen=capacity)
        self.count = 0

    @rule(count=st.integers(0, 30), seed=st.integers(0, 9999))
    def write(self, count: int, seed: int) -> None:
        hidden, label, base = offered(count, seed)
        admitted = 0
        for h, y, yb in zip(hidden, label, base):
            u = core.philox_uniform(self.settings["seed"], 1, first_item=self.count)[0, 0]
            self.count += 1
            sigma = self.settings["sigma"]
            wide = abs(float(y) - float(yb))
            if (sigma is None or wide > sigma) and u <= self.settings["sample_rate"]:
                self.model.append((h, float(y), float(yb)))
                admitted += 1
        assert self.memory.write(hidden, label, base) == admitted

    @rule()
    def reset(self) -> None:
        self.memory.reset()
        self.model.clear()

    @rule(more=st.integers(0, 5))
    def save_and_load(self, more: int) -> None:
        other = ErrorMemory(self.memory.capacity, DIM, **self.settings)
        other.write(*offered(more, more))
        other.load_state_dict(copy.deepcopy(self.memory.state_dict()))
        self.memory = other

    @invariant()
    def same(self) -> None:
        if not hasattr(self, "memory"):
            return
        assert self.memory.size == len(self.model)
        stored = [np.array(x, np.float32) for x in zip(*self.model)] or [
            np.zeros(n, np.float32) for n in ((0, DIM), 0, 0)
        ]
        state = self.memory.state_dict()
        for name, x in zip(("keys", "labels", "base_predictions"), stored):
            np.testing.assert_array_equal(state[name], x)
        assert state["offered"] == self.count
        query, base = DIRECTIONS + np.float32(0.1), np.full(len(DIRECTIONS), 0.5)
        for impl in ("cpu", "reference"):
            found = self.memory.compensate(query, base, return_neighbors=True, impl=impl)
            wanted = table.error_memory_compensate(
                query,
                base,
                *stored,
                k=self.settings["k"],
                gamma=0.3,
                return_neighbors=True,
                impl=impl,
            )
            np.testing.assert_array_equal(found.prediction, wanted.prediction)
            np.testing.assert_array_equal(found.weights, wanted.weights)
            # Slots are places, the deque counts ages.
            labels = np.array([y for _, y, _ in self.model])
            near = self.memory._labels[found.neighbors]
            np.testing.assert_array_equal(near, labels[wanted.neighbors] if near.size else near)


AgainstDeque.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAgainstDeque = AgainstDeque.TestCase


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_kinds_and_dtypes(kind: str, dtype: str) -> None:
    if kind == "numpy" and dtype == "bfloat16":
        pytest.skip("NumPy has none")
    x = samples(4, 9, 5)
    call: Any = x.arguments(np.float64)
    if kind == "torch":
        call = [torch.from_numpy(v) for v in call]
        like = torch.empty(0, dtype=getattr(torch, dtype))
        call = [v.to(like.dtype) if v.ndim == 2 else v for v in call]
    else:
        like = np.empty(0, dtype)
        call = [v.astype(dtype) if v.ndim == 2 else v for v in call]
    memory = ErrorMemory(5, 5, k=3, like=like)
    memory.write(*call[2:])
    found = memory.compensate(*call[:2])
    wanted = table.error_memory_compensate(*call[:2], *(v[4:] for v in call[2:]), k=3)
    assert type(found) is type(wanted)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    assert memory.state_dict()["keys"].dtype == like.dtype


def test_one_by_one_or_together_keeps_the_same() -> None:
    hidden, label, base = offered(100, 0)
    one, other = (ErrorMemory(40, DIM, sample_rate=0.5, sigma=0.2, seed=9) for _ in range(2))
    one.write(hidden, label, base)
    for at in np.split(np.arange(100), [1, 2, 30, 95]):
        other.write(hidden[at], label[at], base[at])
    for a, b in zip(one.state_dict().values(), other.state_dict().values()):
        np.testing.assert_array_equal(a, b)


def binomial_bound(n: int, p: float) -> float:
    """|count - n p| exceeds it with probability below 1e-6 (4.9 standard deviations; n p (1 - p) is large)."""
    return 4.9 * float(np.sqrt(n * p * (1 - p))) + 1


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_share_that_is_kept(rate: float) -> None:
    n = 50000
    memory = ErrorMemory(1, DIM, sample_rate=rate, seed=3)
    kept = memory.write(*offered(n, 0))
    assert abs(kept - n * rate) <= binomial_bound(n, rate)
    assert abs(kept - n * (rate + 0.02)) > binomial_bound(n, rate), "the test could not tell"
    # The count goes on: the next draws are others.
    memory = ErrorMemory(n, DIM, sample_rate=rate, seed=3)
    first = memory.write(*offered(1000, 0)), memory.state_dict()["keys"].sum()
    memory.reset()
    again = memory.write(*offered(1000, 0)), memory.state_dict()["keys"].sum()
    assert first != again


def test_writes_copy() -> None:
    memory = ErrorMemory(4, DIM, k=1)
    hidden, label, base = offered(2, 0)
    memory.write(hidden, label, base)
    hidden[:] = 0
    assert memory.state_dict()["keys"].any()
    state = memory.state_dict()
    memory.write(*offered(4, 1))
    assert state["keys"].shape == (2, DIM)
    grown = torch.ones(2, DIM, requires_grad=True)
    other = ErrorMemory(4, DIM, like=grown)
    other.write(grown, grown[:, 0], grown[:, 1])
    assert not other.state_dict()["keys"].requires_grad


def test_state_survives_files() -> None:
    x = torch.from_numpy(DIRECTIONS)
    memory = ErrorMemory(3, DIM, k=2, like=x)
    memory.write(x, x[:, 0], x[:, 1])
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = ErrorMemory(3, DIM, k=2, like=x)
    other.load_state_dict(torch.load(file, weights_only=True))
    base = torch.full((4,), 0.5)
    assert torch.equal(memory.compensate(x, base), other.compensate(x, base))
    third = pickle.loads(pickle.dumps(memory))
    assert torch.equal(memory.compensate(x, base), third.compensate(x, base))
    larger = ErrorMemory(7, DIM, k=2, like=x)
    larger.load_state_dict(memory.state_dict())
    assert torch.equal(memory.compensate(x, base), larger.compensate(x, base))


def test_every_instruction_set(level: str) -> None:
    memory = ErrorMemory(500, DIM, k=60)
    memory.write(*offered(800, 2))
    base = np.full(len(DIRECTIONS), 0.5)
    found = memory.compensate(DIRECTIONS, base, return_neighbors=True, impl="cpu")
    assert native.core.last_simd_level() == level
    wanted = memory.compensate(DIRECTIONS, base, return_neighbors=True, impl="reference")
    np.testing.assert_array_equal(found.neighbors, wanted.neighbors)
