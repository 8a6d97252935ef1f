# SPDX-License-Identifier: Apache-2.0
"""Every refusal of the row optimizers says what was expected, what came, and what to do."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hotloop import table
from hotloop.front import native
from table_cases import CASES, RULES
from table_checks import NO_ARRAY, NO_FLOAT, NO_SEED, grouped, refused

U, D = 3, 5
FIRST = {case.op: case for case in reversed(CASES)}


def z(*shape: int, dtype: Any = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def update(op: str, **changed: Any) -> None:
    """A call that is right but for what is named."""
    given = {"weight": z(U, D), "grad": z(U, D), **FIRST[op].state(U, D)}
    getattr(table, op)(**{**given, **changed})


SHARED = "expected every element to have its own memory, got an expanded array."
NUMPY = np.zeros((U, D), np.float32)
IDS, CODES = torch.tensor([1, 1, 3]), z(2, dtype=torch.int8)
READ_ONLY = NUMPY.copy()
READ_ONLY.flags.writeable = False
DOUBLE = z(U, D, dtype=torch.float64)
HALF = z(U, D, dtype=torch.float16)

ARRAYS = {
    TypeError: [
        ("weight", [[1.0]], f"{NO_ARRAY} list. Use numpy.asarray(...)."),
        ("weight", z(U, D, dtype=torch.int32), f"{NO_FLOAT} int32. Convert it first."),
        ("grad", HALF, "expected dtype float32, got float16. Convert it first."),
        ("grad", DOUBLE, "expected dtype float32, got float64. Convert it first."),
        ("grad", NUMPY, "expected a torch array like weight, got numpy. Convert it first."),
        ("rounding_seed", 0.5, "expected an integer, got float."),
    ],
    ValueError: [
        ("weight", z(D), "expected 2 dimension(s), got shape (5,)."),
        ("weight", z(1, D).expand(U, D), f"{SHARED} Pass a copy."),
        (
            "grad",
            z(U, D + 1),
            "expected shape (3, 5) like weight, got (3, 6). Pass one summed gradient per row.",
        ),
        ("rounding_seed", -1, f"{NO_SEED} -1."),
        (
            "impl",
            "gpu",
            "expected one of auto, reference, cpu, cuda, triton, got 'gpu'. Leave it at 'auto'.",
        ),
    ],
}


@pytest.mark.parametrize("op", RULES)
@pytest.mark.parametrize(("kind", "name", "value", "text"), grouped(ARRAYS))
def test_arrays(op: str, kind: type[Exception], name: str, value: Any, text: str) -> None:
    with refused(f"[{op}] {name}: {text}", kind):
        update(op, **{name: value})


@pytest.mark.parametrize("op", RULES)
def test_weights_and_gradients_together(op: str) -> None:
    with refused(f"[{op}] weight: expected a writable array, got a read-only one. Pass a copy."):
        update(op, weight=READ_ONLY, grad=NUMPY)
    text = "grad: expected dtype float32, float64, got float16. Convert it first."
    with refused(f"[{op}] {text}", TypeError):
        update(op, weight=DOUBLE, grad=HALF)


STATES = {
    ("rowwise_adagrad_update", ValueError): [
        ("state_sum", z(U, D), "expected shape (3,) or (3, 1), got (3, 5).")
    ],
    ("group_adagrad_update", ValueError): [
        ("state_sum", z(U + 1), "expected shape (3,) or (3, 1), got (4,).")
    ],
    ("sparse_adagrad_update", ValueError): [
        ("state_sum", z(U), "expected shape (3, 5), got (3,)."),
        ("state_sum", z(1, D).expand(U, D), SHARED),
    ],
    ("sparse_adagrad_update", TypeError): [
        ("state_sum", HALF, "expected dtype float32, got float16. Convert it first."),
        ("state_sum", 0.0, f"{NO_ARRAY} float."),
    ],
    ("sparse_adam_update", ValueError): [
        ("exp_avg", z(U), "expected shape (3, 5), got (3,)."),
        ("exp_avg_sq", z(U + 1), "expected shape (3,) or (3, 1), got (4,)."),
        ("exp_avg_sq", z(U, D + 1), "expected shape (3, 5), got (3, 6)."),
        ("step", z(U, D), "expected shape (3,) or (3, 1), got (3, 5)."),
        ("step", 0, "expected an integer >= 1 and <= 9007199254740992, got 0."),
    ],
    ("sparse_adam_update", TypeError): [
        ("step", z(U, dtype=torch.int64), "expected dtype float32, got int64. Convert it first."),
        ("step", 1.5, "expected an integer, got float."),
    ],
    ("ftrl_proximal_update", ValueError): [("z", z(U), "expected shape (3, 5), got (3,).")],
    ("ftrl_proximal_update", TypeError): [
        ("n", READ_ONLY, "expected a torch array like weight, got numpy. Convert it first.")
    ],
}


@pytest.mark.parametrize(("op", "kind", "name", "value", "text"), grouped(STATES))
def test_state(op: str, kind: type[Exception], name: str, value: Any, text: str) -> None:
    with refused(f"[{op}] {name}: {text}", kind):
        update(op, **{name: value})


NOT_NEGATIVE = (-1, "expected a number >= 0, got -1.")
NOT_ZERO = (0, "expected a number > 0, got 0.")
NUMBERS = {
    ("sparse_sgd_update", "SGD"): {
        "lr": NOT_NEGATIVE,
        "weight_decay": (float("nan"), "expected a number >= 0, got"),
    },
    ("rowwise_adagrad_update", "RowwiseAdagrad"): dict.fromkeys(
        ("lr", "eps", "weight_decay"), NOT_NEGATIVE
    ),
    ("sparse_adagrad_update", "Adagrad"): {
        "lr": (float("inf"), "expected a finite number >= 0, got inf."),
        "eps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
    },
    ("sparse_adam_update", "Adam"): dict.fromkeys(("lr", "eps", "weight_decay"), NOT_NEGATIVE),
    ("ftrl_proximal_update", "FTRL"): {
        "lr": NOT_ZERO,
        **dict.fromkeys(("beta", "l1", "l2"), NOT_NEGATIVE),
    },
    ("group_adagrad_update", "GroupAdagrad"): {
        "lr": NOT_ZERO,
        **dict.fromkeys(("beta", "l2", "weight_decay"), NOT_NEGATIVE),
    },
}


@pytest.mark.parametrize(("op", "rule"), NUMBERS, ids=lambda x: x)
def test_numbers(op: str, rule: str) -> None:
    for name, (value, text) in NUMBERS[op, rule].items():
        for who, call in ((op, partial(update, op)), (rule, getattr(table, rule))):
            with refused(f"[{who}] {name}: {text}"):
                call(**{name: value})
        with refused(f"[{op}] {name}: expected a number…got str", TypeError):
            update(op, **{name: "much"})


MODES = "expected one of l2, decoupled, got"
CHOICES = {
    ("RowwiseAdagrad", ValueError): [("weight_decay_mode", "L2", f"{MODES} 'L2'.")],
    ("Adagrad", ValueError): [
        ("weight_decay_mode", None, f"{MODES} None."),
        ("initial_accumulator_value", -0.1, "expected a number >= 0"),
    ],
    ("Adam", ValueError): [
        ("weight_decay_mode", "w", f"{MODES} 'w'."),
        ("eps_mode", "keras", "expected one of torch, tensorflow, got 'keras'."),
        ("betas", 0.9, "expected two numbers, got 0.9."),
        ("betas", (0.9, 1.0), "expected a number >= 0 and < 1, got 1.0."),
    ],
    ("Adam", TypeError): [
        ("nesterov", 1, "expected True or False, got int."),
        ("rowwise", "no", "expected True or False, got str."),
    ],
    ("FTRL", TypeError): [("group", 0.5, "expected True or False, got float.")],
    ("SGD", TypeError): [("stochastic_rounding", 1, "expected True or False, got int.")],
}


@pytest.mark.parametrize(("rule", "kind", "name", "value", "text"), grouped(CHOICES))
def test_choices(rule: str, kind: type[Exception], name: str, value: Any, text: str) -> None:
    said = "betas[1]" if isinstance(value, tuple) else name
    with refused(f"[{rule}] {said}: {text}", kind):
        getattr(table, rule)(**{name: value})


def test_first_state() -> None:
    with refused("[Adam.init_state] rows: expected an integer >= 0, got -1."):
        table.Adam().init_state(-1, 2)
    with refused("[SGD.init_state] dim: expected an integer, got float.", TypeError):
        table.SGD().init_state(1, 2.0)


def test_forced_implementations_that_cannot_run() -> None:
    with pytest.raises(NotImplementedError) as refusal:
        table.sparse_sgd_update(DOUBLE, z(U, D), impl="cpu")
    text = str(refusal.value)
    assert text.startswith(
        "[sparse_sgd_update] no implementation fits weight (3, 5) float64 on cpu with impl='cpu':"
    )
    assert "cpu        refused: dtype float64 (supports float32, float16, bfloat16)" in text
    assert "cuda       refused: this op has none" in text
    for call in (
        lambda: table.merge_duplicates(z(U, dtype=torch.int64), DOUBLE, impl="cpu"),
        lambda: table.serving_row_quantize(DOUBLE, impl="cpu"),
        lambda: table.serving_row_dequantize(z(3, dtype=torch.int8), dtype="float64", impl="cpu"),
        lambda: table.serving_row_quantize(z(3), impl="triton"),
    ):
        with refused("no implementation fits", NotImplementedError):
            call()


def dedup(**changed: Any) -> None:
    given = {"weight": z(4, D), "ids": IDS, "grads": z(3, D)}
    rule = {"state": {"state_sum": z(4, D)}, "optimizer": table.Adagrad()}
    table.sparse_dedup_optimize(**{**given, **rule, **changed})


BATCHES = {
    TypeError: [
        ("ids", IDS.float(), "ids: expected dtype int64, int32, got float32. Convert it first."),
        (
            "ids",
            IDS.numpy(),
            "grads: expected a numpy array like ids, got torch. Convert it first.",
        ),
        (
            "weight",
            np.zeros((4, D), np.float32),
            "ids: expected a numpy array like weight, got torch. Convert it first.",
        ),
        (
            "grads",
            z(3, D, dtype=torch.float64),
            "grads: expected dtype float32, float16, bfloat16 for weight float32, got float64. Convert it first.",
        ),
        (
            "optimizer",
            "adagrad",
            "optimizer: expected a row optimizer such as hotloop.table.Adagrad(), got str.",
        ),
    ],
    ValueError: [
        ("ids", IDS[None], "ids: expected 1 dimension(s), got shape (1, 3)."),
        (
            "ids",
            torch.tensor([1, 4, 0]),
            "ids: expected 0 to 3, the rows of weight, got 4. Use a table for ids without a bound.",
        ),
        ("ids", torch.tensor([1, -1, 0]), "ids: expected 0 to 3, the rows of weight, got -1."),
        ("grads", z(2, D), "grads: expected 3 rows, one per id, got shape (2, 5)."),
        ("grads", z(3, 4), "grads: expected 5 columns like weight, got shape (3, 4)."),
        ("weight", z(4), "weight: expected 2 dimension(s), got shape (4,)."),
        (
            "state",
            {},
            "state: expected a dict of ['state_sum'], got []. Use optimizer.init_state(rows, dim, like=weight).",
        ),
        ("state", z(4, D), "state: expected a dict of ['state_sum'], got Tensor."),
        ("state", {"state_sum": z(4)}, "state['state_sum']: expected shape (4, 5), got (4,)."),
        (
            "optimizer",
            table.Adagrad(stochastic_rounding=True),
            "rounding_seed: expected an integer, got None. The optimizer rounds at random: pass another one each step.",
        ),
        ("rounding_seed", -3, f"rounding_seed: {NO_SEED} -3."),
    ],
}


@pytest.mark.parametrize(("kind", "name", "value", "text"), grouped(BATCHES))
def test_batches(kind: type[Exception], name: str, value: Any, text: str) -> None:
    with refused(f"[sparse_dedup_optimize] {text}", kind):
        dedup(**{name: value})


CALLS = {
    ("merge_duplicates", TypeError): [(([1], z(1, 1)), {}, f"ids: {NO_ARRAY} list.")],
    ("merge_duplicates", ValueError): [
        ((IDS, z(3)), {}, "grads: expected 2 dimension(s), got shape (3,)."),
        ((IDS, z(2, 1)), {}, "grads: expected 3 rows, one per id, got shape (2, 1)."),
    ],
    ("serving_row_quantize", TypeError): [
        ((CODES,), {}, f"rows: {NO_FLOAT} int8."),
        (
            (np.zeros(1),),
            {"mode": "bfloat16"},
            "mode: expected int8 or float16 for a numpy array, which has no bfloat16, got 'bfloat16'. Pass a torch "
            "tensor.",
        ),
    ],
    ("serving_row_quantize", ValueError): [
        ((z(1, 1, 1),), {}, "rows: expected 1 or 2 dimension(s), got shape (1, 1, 1)."),
        ((z(1),), {"mode": "int4"}, "mode: expected one of int8, float16, bfloat16, got 'int4'."),
        ((z(1),), {"value_range": 0}, "value_range: expected a number > 0, got 0."),
    ],
    ("serving_row_dequantize", TypeError): [
        ((z(1),), {}, "codes: expected dtype int8, float16, bfloat16, got float32."),
        (
            (CODES.numpy(),),
            {"dtype": "bfloat16"},
            "dtype: expected float32, float64 or float16 for a numpy array, which has no bfloat16",
        ),
    ],
    ("serving_row_dequantize", ValueError): [
        (
            (CODES,),
            {"dtype": "int8"},
            "dtype: expected one of float32, float64, float16, bfloat16, got 'int8'.",
        ),
        ((CODES,), {"value_range": -1}, "value_range: expected a number > 0, got -1."),
    ],
}


@pytest.mark.parametrize(("op", "kind", "args", "given", "text"), grouped(CALLS))
def test_duplicates_and_rows_for_serving(
    op: str, kind: type[Exception], args: Any, given: dict[str, Any], text: str
) -> None:
    with refused(f"[{op}] {text}", kind):
        getattr(table, op)(*args, **given)


def test_checks_find_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    g = z(U, D)
    g[1, 2] = torch.nan
    update("sparse_sgd_update", grad=g)
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    text = (
        "expected finite values, got nan at [1, 2] (1 of 15). Unset HOTLOOP_CHECK to let it pass."
    )
    with refused(f"[sparse_sgd_update] grad: {text}"):
        update("sparse_sgd_update", grad=g)
    with refused("[sparse_dedup_optimize] grads: expected finite values, got nan at [1, 2]"):
        dedup(grads=g)
    with refused("[serving_row_quantize] rows: expected finite values"):
        table.serving_row_quantize(g)
    update("sparse_sgd_update")


def test_the_compiled_loops_refuse_what_would_corrupt_memory() -> None:
    core = native.core.table
    rule = table.Adagrad()._rule()
    w, g, s = (np.zeros((U, D), np.float32) for _ in range(3))
    ids = np.zeros(U, np.int64)

    def rows(rule: Any = rule, w: Any = w, g: Any = g, s: Any = (s,), ids: Any = None) -> None:
        core.update_rows(rule, w, g, list(s), ids, True, 0)

    rows()
    for given, text in (
        ({"rule": {"rule": "lion"}}, "[table] rule: expected a row optimizer, got lion."),
        ({"rule": {"rule": "sgd", "rho": 1.0}}, "[table] rule: no parameter is called rho."),
        ({"w": w.astype(float)}, "weight: expected float32, float16 or bfloat16, got float64"),
        ({"g": g[:, :4]}, "grad: expected float32 like weight"),
        ({"g": g[:2]}, "grad: expected one row per row of weight"),
        ({"s": ()}, "state: expected 1 arrays, got 0"),
        ({"s": (s[:2],)}, "state: expected float32 of one row per weight"),
        ({"ids": np.array([0, 3, 1])}, "ids: expected 0 to 2, got 3 at [1]"),
        ({"ids": np.array([-1, 0, 1])}, "ids: expected 0 to 2, got -1 at [0]"),
        ({"ids": ids[:2]}, "rows: wrong shape"),
    ):
        with refused(text):
            rows(**given)
    with refused("inverse: wrong shape"):
        core.number_ids(ids, ids[:1].copy(), ids.copy(), ids.copy())
    for bad in ([0, 2, 1], [1, 0, 2], [0, -1, 1], [0, 1, 5]):
        with refused("inverse: expected numbers in the order of their first occurrence"):
            core.merge_rows(g, np.array(bad), s)
    with refused("codes: expected bytes of the shape of values"):
        core.quantize(w, np.zeros((U, 4), np.uint8), 1.0, True)
