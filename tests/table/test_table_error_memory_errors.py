# SPDX-License-Identifier: Apache-2.0
"""Every error text of the error memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hotloop import table
from hotloop.table import ErrorMemory
from table_checks import NO_ARRAY, NO_FLOAT, NO_SEED, grouped, refused

Q, B = np.ones((2, 3), np.float32), np.full(2, 0.5, np.float32)
KEYS, Y = np.ones((5, 3), np.float32), np.zeros(5, np.float32)
OP = "error_memory_compensate"


def call(**changes: Any) -> Any:
    base: dict[str, Any] = {
        "query": Q, "base_prediction": B, "keys": KEYS, "labels": Y, "base_predictions": Y,
    }  # fmt: skip
    return table.error_memory_compensate(**{**base, **changes})


VALUES = [
    ({"keys": KEYS[0]}, "keys: expected 2 dimension(s), got shape (3,)."),
    ({"keys": KEYS[:, :0]}, "keys: expected vectors of at least one number, got shape (5, 0). Pass (N, d)."),
    ({"query": Q[0]}, "query: expected 2 dimension(s), got shape (3,)."),
    ({"query": Q[:, :2]}, "query: expected shape (n, 3) like keys, got (2, 2). Pass hidden vectors of one model."),
    ({"base_prediction": B[:1]}, "base_prediction: expected shape (2,) like the rows of query, got (1,). Pass one"),
    ({"base_prediction": Q}, "base_prediction: expected 1 dimension(s), got shape (2, 3)."),
    ({"labels": Y[1:]}, "labels: expected shape (5,) like the rows of keys, got (4,). Pass one number per row."),
    ({"base_predictions": B}, "base_predictions: expected shape (5,) like the rows of keys, got (2,)."),
    ({"k": 0}, "k: expected an integer >= 1, got 0."),
    ({"temperature": 0}, "temperature: expected a number > 0, got 0."),
    ({"temperature": float("nan")}, "temperature: expected a number > 0"),
    ({"gamma": 1.1}, "gamma: expected a number >= 0 and <= 1, got 1.1."),
    ({"lam": -0.1}, "lam: expected a number >= 0 and <= 1, got -0.1."),
    ({"impl": "gpu"}, "impl: expected one of auto, reference, cpu, cuda, triton, got 'gpu'."),
]  # fmt: skip
TYPES = [
    ({"query": [[1.0]]}, "query: expected a NumPy, torch or CuPy array, got list. Use numpy.asarray(...)."),
    ({"keys": None}, "keys: expected a NumPy, torch or CuPy array, got NoneType."),
    ({"keys": KEYS.astype(int)}, "keys: expected dtype float32, float64, float16, bfloat16, got int64. Convert it"),
    ({"query": Q.astype(">f4")}, "query: expected dtype float32, float64, float16, bfloat16, got >f4."),
    ({"labels": Y.astype(complex)}, "labels: expected dtype float32, float64, float16, bfloat16, int64, int32, uint8, "
     "bool, got complex128."),
    ({"query": torch.ones(2, 3)}, "query: expected a numpy array like keys, got torch. Convert it first."),
    ({"base_prediction": torch.ones(2)}, "base_prediction: expected a numpy array like query, got torch."),
    ({"labels": torch.ones(5)}, "labels: expected a numpy array like keys, got torch."),
    ({"base_predictions": 0.5}, "base_predictions: expected a NumPy, torch or CuPy array, got float."),
    ({"k": 1.5}, "k: expected an integer, got float."),
    ({"gamma": "1"}, "gamma: expected a number >= 0 and <= 1, got str. Pass a float."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "changes", "text"), grouped({ValueError: VALUES, TypeError: TYPES})
)
def test_errors(error: Any, changes: Any, text: str) -> None:
    with refused(f"[{OP}] {text}", error):
        call(**changes)


@pytest.mark.parametrize("impl", ["cuda", "triton"])
def test_impls_there_are_none_of(impl: str) -> None:
    with refused(
        f"no implementation fits query (2, 3) float32 on cpu …{impl}", NotImplementedError
    ):
        call(impl=impl)


@pytest.mark.parametrize("name", ["query", "base_prediction", "keys", "labels", "base_predictions"])
def test_checks_find_what_is_not_finite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = {"query": Q, "base_prediction": B, "keys": KEYS, "labels": Y, "base_predictions": Y}[
        name
    ].copy()
    at = tuple(n - 1 for n in x.shape)
    x[at] = np.inf
    call(**{name: x})
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    call()
    text = f"[{OP}] {name}: expected finite values, got inf at {list(at)} (1 of {x.size}). Unset HOTLOOP_CHECK"
    with refused(text):
        call(**{name: x})


MEMORY = {
    ValueError: [
        ({"capacity": 0}, "capacity: expected an integer >= 1, got 0."),
        ({"dim": 0}, "dim: expected an integer >= 1, got 0."),
        ({"k": 0}, "k: expected an integer >= 1, got 0."),
        ({"temperature": -1}, "temperature: expected a number > 0"),
        ({"gamma": 2}, "gamma: expected a number >= 0 and <= 1, got 2."),
        ({"lam": 2}, "lam: expected a number >= 0 and <= 1, got 2."),
        ({"sigma": -0.5}, "sigma: expected a number >= 0, got -0.5."),
        ({"sample_rate": 1.5}, "sample_rate: expected a number >= 0 and <= 1, got 1.5."),
        ({"seed": -1}, f"seed: {NO_SEED} -1."),
    ],
    TypeError: [
        ({"capacity": 1.0}, "capacity: expected an integer, got float."),
        ({"like": np.zeros(1, int)}, f"like: {NO_FLOAT} int64."),
        ({"like": "float32"}, f"like: {NO_ARRAY} str."),
    ],
}


@pytest.mark.parametrize(("error", "arguments", "text"), grouped(MEMORY))
def test_arguments_of_a_memory(error: Any, arguments: Any, text: str) -> None:
    with refused(f"[ErrorMemory] {text}", error):
        ErrorMemory(**{"capacity": 4, "dim": 3, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((Q[:, :2], B, B), ValueError, "hidden: expected shape (n, 3) like the memory, got (2, 2)."),
        ((Q, B[:1], B), ValueError, "label: expected shape (2,) like the rows of hidden, got (1,)."),
        ((Q, B, B[:1]), ValueError, "base_prediction: expected shape (2,) like the rows of hidden, got (1,)."),
        ((torch.ones(2, 3), B, B), TypeError, "hidden: expected a numpy array like the memory, got torch."),
        ((Q.astype(int), B, B), TypeError, "hidden: expected dtype float32, float64, float16, bfloat16, got int64."),
    ],
)  # fmt: skip
def test_refused_writes_change_nothing(arguments: Any, error: Any, text: str) -> None:
    memory = ErrorMemory(4, 3)
    memory.write(Q, B, B)
    before = memory.state_dict()
    with refused(f"[ErrorMemory.write] {text}", error):
        memory.write(*arguments)
    for name, x in memory.state_dict().items():
        np.testing.assert_array_equal(x, before[name])
    if error is ValueError and "label" not in text:
        with pytest.raises(
            ValueError,
            match=r"\[ErrorMemory\.compensate\] (hidden|base_prediction): expected shape",
        ):
            memory.compensate(arguments[0], arguments[2])


def test_checks_of_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    memory = ErrorMemory(4, 3)
    bad = np.array([0.5, np.nan])
    with refused("[ErrorMemory.write] label: expected finite values, got nan at [1]"):
        memory.write(Q, bad, B)
    with refused("[ErrorMemory.compensate] base_prediction: expected finite values"):
        memory.compensate(Q, bad)
    assert memory.size == 0


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"keys": np.ones((5, 3), np.float32)}, ValueError, "keys: expected at most 4 rows, got 5. Make a larger"),
        ({"keys": Q[:, :2]}, ValueError, "keys: expected shape (n, 3) like the memory, got (2, 2)."),
        ({"labels": B[:1]}, ValueError, "labels: expected shape (2,) like the rows of keys, got (1,)."),
        ({"base_predictions": Q}, ValueError, "base_predictions: expected 1 dimension(s), got shape (2, 3)."),
        ({"offered": -1}, ValueError, "offered: expected an integer >= 0, got -1."),
        ({"keys": torch.ones(2, 3)}, TypeError, "keys: expected a numpy array like the memory, got torch."),
    ],
)  # fmt: skip
def test_refused_states_change_nothing(changes: Any, error: Any, text: str) -> None:
    memory = ErrorMemory(4, 3)
    memory.write(Q, B, B)
    before = memory.state_dict()
    with refused(f"[ErrorMemory.load_state_dict] {text}", error):
        memory.load_state_dict({**before, **changes})
    for name, x in memory.state_dict().items():
        np.testing.assert_array_equal(x, before[name])
    text = "state: expected what state_dict() returns, got none of labels, offered."
    with refused(f"[ErrorMemory.load_state_dict] {text}"):
        memory.load_state_dict({"keys": Q, "base_predictions": B})
