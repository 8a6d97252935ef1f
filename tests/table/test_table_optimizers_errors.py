"""Every refusal of the row optimizers says what was expected, what came, and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hotloop import table
from hotloop.front import native
from table_cases import BY_NAME

F32 = torch.float32
U, D = 3, 5


def z(*shape: int, dtype: Any = F32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def update(op: str, **changed: Any) -> Callable[[], None]:
    """A call that is right but for what is named."""
    names = {
        "sparse_sgd_update": (),
        "rowwise_adagrad_update": ("state_sum",),
        "sparse_adagrad_update": ("state_sum",),
        "sparse_adam_update": ("exp_avg", "exp_avg_sq", "step"),
        "ftrl_proximal_update": ("z", "n"),
        "group_adagrad_update": ("state_sum",),
    }[op]
    scalar = {"step"} | (
        {"state_sum"} if op in ("rowwise_adagrad_update", "group_adagrad_update") else set()
    )
    given = {
        "weight": z(U, D),
        "grad": z(U, D),
        **{n: z(U) if n in scalar else z(U, D) for n in names},
    }
    return lambda: getattr(table, op)(**{**given, **changed})


OPS = (
    "sparse_sgd_update",
    "rowwise_adagrad_update",
    "sparse_adagrad_update",
    "sparse_adam_update",
    "ftrl_proximal_update",
    "group_adagrad_update",
)
READ_ONLY = np.zeros((U, D), np.float32)
READ_ONLY.flags.writeable = False

ARRAYS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"weight": [[1.0]]},
        TypeError,
        "weight: expected a NumPy, torch or CuPy array, got list. Use numpy.asarray(...).",
    ),
    (
        {"weight": z(U, D, dtype=torch.int32)},
        TypeError,
        "weight: expected dtype float32, float64, float16, bfloat16, got int32. Convert it first.",
    ),
    ({"weight": z(D)}, ValueError, "weight: expected 2 dimension(s), got shape (5,)."),
    (
        {"weight": READ_ONLY, "grad": np.zeros((U, D), np.float32)},
        ValueError,
        "weight: expected a writable array, got a read-only one. Pass a copy.",
    ),
    (
        {"weight": z(1, D).expand(U, D)},
        ValueError,
        "weight: expected every element to have its own memory, got an expanded array. Pass a copy.",
    ),
    (
        {"grad": z(U, D, dtype=torch.float16)},
        TypeError,
        "grad: expected dtype float32, got float16. Convert it first.",
    ),
    (
        {"grad": z(U, D, dtype=torch.float64)},
        TypeError,
        "grad: expected dtype float32, got float64. Convert it first.",
    ),
    (
        {"weight": z(U, D, dtype=torch.float64), "grad": z(U, D, dtype=torch.float16)},
        TypeError,
        "grad: expected dtype float32, float64, got float16. Convert it first.",
    ),
    (
        {"grad": np.zeros((U, D), np.float32)},
        TypeError,
        "grad: expected a torch array like weight, got numpy. Convert it first.",
    ),
    (
        {"grad": z(U, D + 1)},
        ValueError,
        "grad: expected shape (3, 5) like weight, got (3, 6). Pass one summed gradient per row.",
    ),
    (
        {"rounding_seed": -1},
        ValueError,
        "rounding_seed: expected an integer >= 0 and <= 18446744073709551615, got -1.",
    ),
    ({"rounding_seed": 0.5}, TypeError, "rounding_seed: expected an integer, got float."),
    (
        {"impl": "gpu"},
        ValueError,
        "impl: expected one of auto, reference, cpu, cuda, triton, got 'gpu'. Leave it at 'auto'.",
    ),
]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("changed", "error", "text"), ARRAYS, ids=[a[2].split(",")[0] for a in ARRAYS]
)
def test_arrays(op: str, changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(f"[{op}] {text}")):
        update(op, **changed)()


STATES = [
    (
        "rowwise_adagrad_update",
        {"state_sum": z(U, D)},
        ValueError,
        "state_sum: expected shape (3,) or (3, 1), got (3, 5).",
    ),
    (
        "group_adagrad_update",
        {"state_sum": z(U + 1)},
        ValueError,
        "state_sum: expected shape (3,) or (3, 1), got (4,).",
    ),
    (
        "sparse_adagrad_update",
        {"state_sum": z(U)},
        ValueError,
        "state_sum: expected shape (3, 5), got (3,).",
    ),
    (
        "sparse_adagrad_update",
        {"state_sum": z(U, D, dtype=torch.float16)},
        TypeError,
        "state_sum: expected dtype float32, got float16. Convert it first.",
    ),
    (
        "sparse_adagrad_update",
        {"state_sum": 0.0},
        TypeError,
        "state_sum: expected a NumPy, torch or CuPy array, got float.",
    ),
    (
        "sparse_adagrad_update",
        {"state_sum": z(1, D).expand(U, D)},
        ValueError,
        "state_sum: expected every element to have its own memory, got an expanded array.",
    ),
    (
        "sparse_adam_update",
        {"exp_avg": z(U)},
        ValueError,
        "exp_avg: expected shape (3, 5), got (3,).",
    ),
    (
        "sparse_adam_update",
        {"exp_avg_sq": z(U + 1)},
        ValueError,
        "exp_avg_sq: expected shape (3,) or (3, 1), got (4,).",
    ),
    (
        "sparse_adam_update",
        {"exp_avg_sq": z(U, D + 1)},
        ValueError,
        "exp_avg_sq: expected shape (3, 5), got (3, 6).",
    ),
    (
        "sparse_adam_update",
        {"step": z(U, D)},
        ValueError,
        "step: expected shape (3,) or (3, 1), got (3, 5).",
    ),
    (
        "sparse_adam_update",
        {"step": torch.zeros(U, dtype=torch.int64)},
        TypeError,
        "step: expected dtype float32, got int64. Convert it first.",
    ),
    (
        "sparse_adam_update",
        {"step": 0},
        ValueError,
        "step: expected an integer >= 1 and <= 9007199254740992, got 0.",
    ),
    ("sparse_adam_update", {"step": 1.5}, TypeError, "step: expected an integer, got float."),
    ("ftrl_proximal_update", {"z": z(U)}, ValueError, "z: expected shape (3, 5), got (3,)."),
    (
        "ftrl_proximal_update",
        {"n": np.zeros((U, D), np.float32)},
        TypeError,
        "n: expected a torch array like weight, got numpy. Convert it first.",
    ),
]


@pytest.mark.parametrize(
    ("op", "changed", "error", "text"), STATES, ids=[f"{s[0]}-{s[3][:30]}" for s in STATES]
)
def test_state(op: str, changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(f"[{op}] {text}")):
        update(op, **changed)()


LR0 = "expected a number >= 0, got"
NUMBERS = {
    ("sparse_sgd_update", "SGD"): {"lr": (-1, LR0), "weight_decay": (float("nan"), LR0)},
    ("rowwise_adagrad_update", "RowwiseAdagrad"): {
        "lr": (-1, LR0),
        "eps": (-1, LR0),
        "weight_decay": (-1, LR0),
    },
    ("sparse_adagrad_update", "Adagrad"): {
        "lr": (float("inf"), "expected a finite number >= 0, got inf."),
        "eps": (-1, LR0),
        "weight_decay": (-1, LR0),
    },
    ("sparse_adam_update", "Adam"): {"lr": (-1, LR0), "eps": (-1, LR0), "weight_decay": (-1, LR0)},
    ("ftrl_proximal_update", "FTRL"): {
        "lr": (0, "expected a number > 0, got 0."),
        "beta": (-1, LR0),
        "l1": (-1, LR0),
        "l2": (-1, LR0),
    },
    ("group_adagrad_update", "GroupAdagrad"): {
        "lr": (0, "expected a number > 0, got 0."),
        "beta": (-1, LR0),
        "l2": (-1, LR0),
        "weight_decay": (-1, LR0),
    },
}


@pytest.mark.parametrize(("op", "rule"), NUMBERS, ids=lambda x: x)
def test_numbers(op: str, rule: str) -> None:
    for name, (value, text) in NUMBERS[op, rule].items():
        for who, call in (
            (op, update(op, **{name: value})),
            (rule, partial(getattr(table, rule), **{name: value})),
        ):
            with pytest.raises(ValueError, match=re.escape(f"[{who}] {name}: {text}")):
                call()
        with pytest.raises(
            TypeError, match=re.escape(f"[{op}] {name}: expected a number") + ".*got str"
        ):
            update(op, **{name: "much"})()


CHOICES = [
    (
        "RowwiseAdagrad",
        {"weight_decay_mode": "L2"},
        ValueError,
        "weight_decay_mode: expected one of l2, decoupled, got 'L2'.",
    ),
    (
        "Adagrad",
        {"weight_decay_mode": None},
        ValueError,
        "weight_decay_mode: expected one of l2, decoupled, got None.",
    ),
    (
        "Adagrad",
        {"initial_accumulator_value": -0.1},
        ValueError,
        "initial_accumulator_value: expected a number >= 0",
    ),
    (
        "Adam",
        {"weight_decay_mode": "w"},
        ValueError,
        "weight_decay_mode: expected one of l2, decoupled, got 'w'.",
    ),
    (
        "Adam",
        {"eps_mode": "keras"},
        ValueError,
        "eps_mode: expected one of torch, tensorflow, got 'keras'.",
    ),
    ("Adam", {"betas": 0.9}, ValueError, "betas: expected two numbers, got 0.9."),
    (
        "Adam",
        {"betas": (0.9, 1.0)},
        ValueError,
        "betas[1]: expected a number >= 0 and < 1, got 1.0.",
    ),
    ("Adam", {"nesterov": 1}, TypeError, "nesterov: expected True or False, got int."),
    ("Adam", {"rowwise": "no"}, TypeError, "rowwise: expected True or False, got str."),
    ("FTRL", {"group": 0.5}, TypeError, "group: expected True or False, got float."),
    (
        "SGD",
        {"stochastic_rounding": 1},
        TypeError,
        "stochastic_rounding: expected True or False, got int.",
    ),
]


@pytest.mark.parametrize(
    ("rule", "changed", "error", "text"), CHOICES, ids=[c[3][:40] for c in CHOICES]
)
def test_choices(rule: str, changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(f"[{rule}] {text}")):
        getattr(table, rule)(**changed)


def test_first_state() -> None:
    with pytest.raises(
        ValueError, match=re.escape("[Adam.init_state] rows: expected an integer >= 0, got -1.")
    ):
        table.Adam().init_state(-1, 2)
    with pytest.raises(
        TypeError, match=re.escape("[SGD.init_state] dim: expected an integer, got float.")
    ):
        table.SGD().init_state(1, 2.0)


def test_forced_implementations_that_cannot_run() -> None:
    w = z(U, D, dtype=torch.float64)
    with pytest.raises(NotImplementedError) as refused:
        table.sparse_sgd_update(w, z(U, D), impl="cpu")
    text = str(refused.value)
    assert text.startswith(
        "[sparse_sgd_update] no implementation fits weight (3, 5) float64 on cpu with impl='cpu':"
    )
    assert "cpu        refused: dtype float64 (supports float32, float16, bfloat16)" in text
    assert "cuda       refused: this op has none" in text
    for call in (
        lambda: table.merge_duplicates(
            torch.zeros(2, dtype=torch.int64), z(2, 3, dtype=torch.float64), impl="cpu"
        ),
        lambda: table.serving_row_quantize(z(3, dtype=torch.float64), impl="cpu"),
        lambda: table.serving_row_dequantize(
            torch.zeros(3, dtype=torch.int8), dtype="float64", impl="cpu"
        ),
        lambda: table.serving_row_quantize(z(3), impl="triton"),
    ):
        with pytest.raises(NotImplementedError, match="no implementation fits"):
            call()


def dedup(**changed: Any) -> None:
    rule = changed.pop("optimizer", table.Adagrad())
    given = {"weight": z(4, D), "ids": torch.tensor([1, 1, 3]), "grads": z(3, D), "optimizer": rule}
    given["state"] = {"state_sum": z(4, D)}
    table.sparse_dedup_optimize(**{**given, **changed})


BATCHES = [
    (
        {"ids": torch.tensor([1.0, 1, 3])},
        TypeError,
        "ids: expected dtype int64, int32, got float32. Convert it first.",
    ),
    ({"ids": torch.tensor([[1]])}, ValueError, "ids: expected 1 dimension(s), got shape (1, 1)."),
    (
        {"ids": torch.tensor([1, 4, 0])},
        ValueError,
        "ids: expected 0 to 3, the rows of weight, got 4. Use a table for ids without a bound.",
    ),
    (
        {"ids": torch.tensor([1, -1, 0])},
        ValueError,
        "ids: expected 0 to 3, the rows of weight, got -1.",
    ),
    (
        {"ids": np.array([1, 1, 3])},
        TypeError,
        "grads: expected a numpy array like ids, got torch. Convert it first.",
    ),
    (
        {"weight": np.zeros((4, D), np.float32)},
        TypeError,
        "ids: expected a numpy array like weight, got torch. Convert it first.",
    ),
    ({"grads": z(2, D)}, ValueError, "grads: expected 3 rows, one per id, got shape (2, 5)."),
    ({"grads": z(3, 4)}, ValueError, "grads: expected 5 columns like weight, got shape (3, 4)."),
    (
        {"grads": z(3, D, dtype=torch.float64)},
        TypeError,
        "grads: expected dtype float32, float16, bfloat16 for weight float32, got float64. Convert it first.",
    ),
    ({"weight": z(4)}, ValueError, "weight: expected 2 dimension(s), got shape (4,)."),
    (
        {"state": {}},
        ValueError,
        "state: expected a dict of ['state_sum'], got []. Use optimizer.init_state(rows, dim, like=weight).",
    ),
    ({"state": z(4, D)}, ValueError, "state: expected a dict of ['state_sum'], got Tensor."),
    (
        {"state": {"state_sum": z(4)}},
        ValueError,
        "state['state_sum']: expected shape (4, 5), got (4,).",
    ),
    (
        {"optimizer": "adagrad"},
        TypeError,
        "optimizer: expected a row optimizer such as hotloop.table.Adagrad(), got str.",
    ),
    (
        {"optimizer": table.Adagrad(stochastic_rounding=True)},
        ValueError,
        "rounding_seed: expected an integer, got None. The optimizer rounds at random: pass another one each step.",
    ),
    (
        {"rounding_seed": -3},
        ValueError,
        "rounding_seed: expected an integer >= 0 and <= 18446744073709551615, got -3.",
    ),
]


@pytest.mark.parametrize(("changed", "error", "text"), BATCHES, ids=[b[2][:40] for b in BATCHES])
def test_batches(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(f"[sparse_dedup_optimize] {text}")):
        dedup(**changed)


def test_merge() -> None:
    ids = torch.tensor([1, 2])
    for call, error, text in (
        (
            lambda: table.merge_duplicates([1], z(1, 1)),
            TypeError,
            "ids: expected a NumPy, torch or CuPy array, got list.",
        ),
        (
            lambda: table.merge_duplicates(ids, z(2)),
            ValueError,
            "grads: expected 2 dimension(s), got shape (2,).",
        ),
        (
            lambda: table.merge_duplicates(ids, z(3, 1)),
            ValueError,
            "grads: expected 2 rows, one per id, got shape (3, 1).",
        ),
    ):
        with pytest.raises(error, match=re.escape(f"[merge_duplicates] {text}")):
            call()


def test_quantize() -> None:
    codes = torch.zeros(2, dtype=torch.int8)
    for op, call, error, text in (
        (
            "serving_row_quantize",
            lambda: table.serving_row_quantize(codes),
            TypeError,
            "rows: expected dtype float32, float64, float16, bfloat16, got int8.",
        ),
        (
            "serving_row_quantize",
            lambda: table.serving_row_quantize(z(1, 1, 1)),
            ValueError,
            "rows: expected 1 or 2 dimension(s), got shape (1, 1, 1).",
        ),
        (
            "serving_row_quantize",
            lambda: table.serving_row_quantize(z(1), mode="int4"),
            ValueError,
            "mode: expected one of int8, float16, bfloat16, got 'int4'.",
        ),
        (
            "serving_row_quantize",
            lambda: table.serving_row_quantize(z(1), value_range=0),
            ValueError,
            "value_range: expected a number > 0, got 0.",
        ),
        (
            "serving_row_quantize",
            lambda: table.serving_row_quantize(np.zeros(1), mode="bfloat16"),
            TypeError,
            "mode: expected int8 or float16 for a numpy array, which has no bfloat16, got 'bfloat16'. Pass a torch "
            "tensor.",
        ),
        (
            "serving_row_dequantize",
            lambda: table.serving_row_dequantize(z(1)),
            TypeError,
            "codes: expected dtype int8, float16, bfloat16, got float32.",
        ),
        (
            "serving_row_dequantize",
            lambda: table.serving_row_dequantize(codes, dtype="int8"),
            ValueError,
            "dtype: expected one of float32, float64, float16, bfloat16, got 'int8'.",
        ),
        (
            "serving_row_dequantize",
            lambda: table.serving_row_dequantize(codes, value_range=-1),
            ValueError,
            "value_range: expected a number > 0, got -1.",
        ),
        (
            "serving_row_dequantize",
            lambda: table.serving_row_dequantize(codes.numpy(), dtype="bfloat16"),
            TypeError,
            "dtype: expected float32, float64 or float16 for a numpy array, which has no bfloat16",
        ),
    ):
        with pytest.raises(error, match=re.escape(f"[{op}] {text}")):
            call()


def test_checks_find_what_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    g = z(U, D)
    g[1, 2] = torch.nan
    update("sparse_sgd_update", grad=g)()
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    with pytest.raises(
        ValueError,
        match=re.escape(
            "[sparse_sgd_update] grad: expected finite values, got nan at [1, 2] (1 of 15). "
            "Unset HOTLOOP_CHECK to let it pass."
        ),
    ):
        update("sparse_sgd_update", grad=g)()
    with pytest.raises(
        ValueError,
        match=r"\[sparse_dedup_optimize\] grads: expected finite values, got nan at \[1, 2\]",
    ):
        dedup(grads=g)
    with pytest.raises(ValueError, match=r"\[serving_row_quantize\] rows: expected finite values"):
        table.serving_row_quantize(g)
    update("sparse_sgd_update")()


def test_the_compiled_loops_refuse_what_would_corrupt_memory() -> None:
    core = native.core
    rule = table.Adagrad()._rule()
    w, g, s = (np.zeros((U, D), np.float32) for _ in range(3))
    ids = np.zeros(U, np.int64)

    def refused(text: str, call: Callable[[], Any]) -> None:
        with pytest.raises(ValueError, match=re.escape(text)):
            call()

    def rows(rule: Any = rule, w: Any = w, g: Any = g, s: Any = (s,), ids: Any = None) -> None:
        core.table.update_rows(rule, w, g, list(s), ids, True, 0)

    rows()
    refused("[table] rule: expected a row optimizer, got lion.", lambda: rows({"rule": "lion"}))
    refused("[table] rule: no parameter is called rho.", lambda: rows({"rule": "sgd", "rho": 1.0}))
    refused(
        "weight: expected float32, float16 or bfloat16, got float64",
        lambda: rows(w=w.astype(float)),
    )
    refused("grad: expected float32 like weight", lambda: rows(g=g[:, :4]))
    refused("grad: expected one row per row of weight", lambda: rows(g=g[:2]))
    refused("state: expected 1 arrays, got 0", lambda: rows(s=()))
    refused("state: expected float32 of one row per weight", lambda: rows(s=(s[:2],)))
    refused("ids: expected 0 to 2, got 3 at [1]", lambda: rows(ids=np.array([0, 3, 1])))
    refused("ids: expected 0 to 2, got -1 at [0]", lambda: rows(ids=np.array([-1, 0, 1])))
    refused("rows: wrong shape", lambda: rows(ids=ids[:2]))
    refused(
        "inverse: wrong shape",
        lambda: core.table.number_ids(ids, ids[:1].copy(), ids.copy(), ids.copy()),
    )
    for bad in ([0, 2, 1], [1, 0, 2], [0, -1, 1], [0, 1, 5]):
        refused(
            "inverse: expected numbers in the order of their first occurrence",
            partial(core.table.merge_rows, g, np.array(bad), s),
        )
    refused(
        "codes: expected bytes of the shape of values",
        lambda: core.table.quantize(w, np.zeros((U, 4), np.uint8), 1.0, True),
    )


def test_cases_are_called_as_their_names_say() -> None:
    assert {case.op for case in BY_NAME.values()} == set(OPS)
