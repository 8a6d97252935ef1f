# SPDX-License-Identifier: Apache-2.0
"""Every error text of the sketch, and that a refused call has changed nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hotloop import table
from hotloop.table import ErrorSketch
from table_checks import grouped, refused

H, W = np.ones((2, 3), np.float32), np.ones((4, 5, 3), np.float32)
AT, SKETCH = np.zeros((2, 4), np.int32), np.zeros((4, 32, 3), np.int64)
Y = np.full(2, 0.5, np.float32)
READ_ONLY = SKETCH.copy()
READ_ONLY.flags.writeable = False


def buckets(hidden: Any = H, projections: Any = W, **more: Any) -> Callable[[], Any]:
    return lambda: table.lsh_buckets(hidden, projections, **more)


def write(
    at: Any = AT, y: Any = Y, yb: Any = Y, sketch: Any = SKETCH, **more: Any
) -> Callable[[], Any]:
    return lambda: table.lsh_error_sketch_write(at, y, yb, sketch, **more)


def read(at: Any = AT, base: Any = Y, sketch: Any = SKETCH, **more: Any) -> Callable[[], Any]:
    return lambda: table.lsh_error_sketch(at, base, sketch, **more)


def make(**arguments: Any) -> Callable[[], Any]:
    return lambda: ErrorSketch(**{"dim": 3, "repeats": 2, "bits": 2, **arguments})


def project(dim: Any = 3, **arguments: Any) -> Callable[[], Any]:
    return lambda: table.lsh_projections(dim, **arguments)


def compensate(*arguments: Any) -> Callable[[], Any]:
    return lambda: ErrorSketch(3, repeats=2, bits=2).compensate(*arguments)


def load(**changes: Any) -> Callable[[], Any]:
    sketch = ErrorSketch(3, repeats=2, bits=2)
    return lambda: sketch.load_state_dict({**sketch.state_dict(), **changes})


def load_part() -> Any:
    return ErrorSketch(3, repeats=2, bits=2).load_state_dict({"sketch": SKETCH, "writes": 0})


HASH, WRITE, READ, LOAD = (
    "lsh_buckets", "lsh_error_sketch_write", "lsh_error_sketch", "ErrorSketch.load_state_dict",
)  # fmt: skip
SEED = "seed: expected an integer >= 0 and <= 18446744073709551615, got -1."
VALUES = [
    ("lsh_projections", project(0), "dim: expected an integer >= 1, got 0."),
    ("lsh_projections", project(repeats=0), "repeats: expected an integer >= 1, got 0."),
    ("lsh_projections", project(bits=25), "bits: expected an integer >= 1 and <= 24, got 25."),
    ("lsh_projections", project(seed=-1), SEED),
    (HASH, buckets(projections=W[0]), "projections: expected 3 dimension(s), got shape (5, 3)."),
    (HASH, buckets(projections=W[:, :0]), "projections: expected shape (R, L, d) with L from 1 to 24, got (4, 0, 3). "
     "Use lsh_projections(...)."),
    (HASH, buckets(projections=np.ones((1, 25, 3), np.float32)), "projections: expected shape (R, L, d) with L from 1"),
    (HASH, buckets(projections=W[..., :0]), "projections: expected shape (R, L, d) with L from 1 to 24, got (4, 5"),
    (HASH, buckets(H[:, :2]), "hidden: expected shape (n, 3) like projections, got (2, 2). Pass hidden vectors"),
    (HASH, buckets(H[0]), "hidden: expected 2 dimension(s), got shape (3,)."),
    (HASH, buckets(impl="gpu"), "impl: expected one of auto, reference, cpu, cuda, triton, got 'gpu'."),
    (WRITE, write(AT[:, :3]), "sketch: expected shape (3, 2^L, 3) for the repeats of buckets, got (4, 32, 3). Start"),
    (WRITE, write(sketch=SKETCH[..., :2]), "sketch: expected shape (4, 2^L, 3) for the repeats of buckets, got (4, 32, "
     "2)."),
    (WRITE, write(sketch=np.asfortranarray(SKETCH)), "sketch: expected a contiguous array, got one with gaps"),
    (WRITE, write(sketch=READ_ONLY), "sketch: expected a writable array, got a read-only one. Pass a copy."),
    (WRITE, write(AT + 32), "buckets: expected 0 to 31, got 32 at [0, 0] (8 of 8). Use lsh_buckets(...)."),
    (WRITE, write(AT - 1), "buckets: expected 0 to 31, got -1 at [0, 0] (8 of 8)."),
    (WRITE, write(y=Y[:1]), "labels: expected shape (2,) like the rows of buckets, got (1,). Pass one number per row."),
    (WRITE, write(y=np.array([0, 2])), "labels: expected 0 to 1, got 2 at [1] (1 of 2). Pass probabilities."),
    (WRITE, write(y=np.array([np.nan, 0])), "labels: expected 0 to 1, got nan at [0] (1 of 2)."),
    (WRITE, write(yb=Y[:1]), "base_predictions: expected shape (2,) like the rows of buckets, got (1,)."),
    (WRITE, write(yb=Y - 1), "base_predictions: expected 0 to 1, got -0.5 at [0] (2 of 2). Pass probabilities."),
    (READ, read(sketch=SKETCH[:3]), "sketch: expected shape (4, 2^L, 3) for the repeats of buckets, got (3, 32, 3)."),
    (READ, read(AT + 32), "buckets: expected 0 to 31, got 32 at [0, 0] (8 of 8)."),
    (READ, read(base=Y[:1]), "base_prediction: expected shape (2,) like the rows of buckets, got (1,)."),
    (READ, read(similarity="share"), "similarity: expected one of count, const, got 'share'."),
    (READ, read(temperature=0.0), "temperature: expected a number > 0, got 0.0."),
    (READ, read(gamma=-1), "gamma: expected a number >= 0 and <= 1, got -1."),
    (READ, read(lam=1.5), "lam: expected a number >= 0 and <= 1, got 1.5."),
    ("ErrorSketch", make(dim=0), "dim: expected an integer >= 1, got 0."),
    ("ErrorSketch", make(repeats=0), "repeats: expected an integer >= 1, got 0."),
    ("ErrorSketch", make(bits=0), "bits: expected an integer >= 1 and <= 24, got 0."),
    ("ErrorSketch", make(similarity="x"), "similarity: expected one of count, const, got 'x'."),
    ("ErrorSketch", make(temperature=-1), "temperature: expected a number > 0"),
    ("ErrorSketch", make(gamma=2), "gamma: expected a number >= 0 and <= 1, got 2."),
    ("ErrorSketch", make(lam=2), "lam: expected a number >= 0 and <= 1, got 2."),
    ("ErrorSketch", make(seed=-1), SEED),
    ("ErrorSketch.compensate", compensate(H, Y[:1]), "base_prediction: expected shape (2,) like the rows of hidden"),
    (LOAD, load(sketch=np.zeros((2, 8, 3), np.int64)), "sketch: expected (2, 4, 3), got (2, 8, 3). Make the sketch "
     "with the same arguments."),
    (LOAD, load(dim=4), "dim: expected 3, got 4. Make the sketch with the same arguments."),
    (LOAD, load(seed=1), "seed: expected 0, got 1. Make the sketch with the same arguments."),
    (LOAD, load(writes=-1), "writes: expected an integer >= 0, got -1."),
    (LOAD, load_part, "state: expected what state_dict() returns, got none of dim, seed."),
]  # fmt: skip
TYPES = [
    (HASH, buckets(projections=W.astype(float)), "projections: expected dtype float32, got float64. Convert it first."),
    (HASH, buckets(H.astype(int)), "hidden: expected dtype float32, float64, float16, bfloat16, got int64."),
    (HASH, buckets(torch.ones(2, 3)), "hidden: expected a numpy array like projections, got torch."),
    (WRITE, write(AT.astype(np.int64)), "buckets: expected dtype int32, got int64. Convert it first."),
    (WRITE, write(sketch=SKETCH.astype(float)), "sketch: expected dtype int64, got float64."),
    (WRITE, write(sketch=torch.zeros(4, 32, 3).long()), "sketch: expected a numpy array like buckets, got torch."),
    (WRITE, write(y=0.5), "labels: expected a NumPy, torch or CuPy array, got float. Use numpy.asarray(...)."),
    (WRITE, write(yb=torch.ones(2)), "base_predictions: expected a numpy array like buckets, got torch."),
    (READ, read(base=torch.ones(2)), "base_prediction: expected a numpy array like buckets, got torch."),
    ("ErrorSketch", make(like=1.0), "like: expected a NumPy, torch or CuPy array, got float."),
    ("ErrorSketch", make(bits=1.5), "bits: expected an integer, got float."),
    (LOAD, load(sketch=torch.zeros(2, 4, 3).long()), "sketch: expected a numpy array like this sketch, got torch."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "op", "call", "text"), grouped({ValueError: VALUES, TypeError: TYPES})
)
def test_errors(error: Any, op: str, call: Callable[[], Any], text: str) -> None:
    with refused(f"[{op}] {text}", error):
        call()
    assert not SKETCH.any()


def test_checks_find_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    bad, nan = H.copy(), np.array([0.5, np.nan])
    bad[1, 2] = np.inf
    cases = [
        (HASH, buckets(bad), "hidden", "inf at [1, 2] (1 of 6)"),
        (READ, read(base=nan), "base_prediction", "nan at [1] (1 of 2)"),
    ]
    for _, call, _, _ in cases:
        call()
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    for op, call, name, got in cases:
        with refused(f"[{op}] {name}: expected finite values, got {got}. Unset"):
            call()


@pytest.mark.parametrize("call", [buckets(impl="cuda"), write(impl="triton"), read(impl="cuda")])
def test_impls_there_are_none_of(call: Callable[[], Any]) -> None:
    with pytest.raises(
        NotImplementedError, match=r"(?s)no implementation fits .*refused: this op has none"
    ):
        call()
