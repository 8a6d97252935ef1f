# SPDX-License-Identifier: Apache-2.0
"""What the layers of a residual stream refuse, and with which words."""

from __future__ import annotations

import math

import pytest
import torch
from hotloop import moe
from hotloop.moe import AdamState, Dispatch, Norm
from row_oracles import (
    RULES,
    Given,
)

IMPLS = ("cpu", "reference")
by_impl = pytest.mark.parametrize("impl", IMPLS)
by_rule = pytest.mark.parametrize("rule", RULES)

ORDER = Dispatch(*map(torch.tensor, ([2, 0, 1, -1], [1, 2, 0, -1], [0, 1, 4], [1, 2])))
X, ROWS, WEIGHTS = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 2)
CALL: Given = {"x": X, "z": ROWS, "topk_weights": WEIGHTS, "dispatch": ORDER}
WIDE = X.double()
BAD: dict[str, tuple[type[Exception], Given]] = {
    r"x: expected 2 dimension\(s\), got shape \(3,\)": (ValueError, {"x": X[0]}),
    r"x: expected dtype .*, got int64": (TypeError, {"x": X.long()}),
    r"z: expected shape \(4, 3\) \(R, D\) like x, got \(4, 2\)": (ValueError, {"z": ROWS[:, :2]}),
    r"z: expected shape \(2, 3\) like x, got \(4, 3\). Pass topk_weights and dispatch": (
        ValueError, {"topk_weights": None, "dispatch": None}
    ),
    r"z: expected no float64 beside x float32, got float64": (TypeError, {"z": ROWS.double()}),
    r"z: expected device cpu like x, got meta": (ValueError, {"z": ROWS.to("meta")}),
    r"topk_weights: expected a value beside dispatch, got None. Pass both": (ValueError, {"topk_weights": None}),
    r"dispatch: expected a value beside topk_weights, got None. Pass both": (ValueError, {"dispatch": None}),
    r"topk_weights: expected shape \(2, 1\) \(T, k\), got \(4, 1\)": (ValueError, {"topk_weights": torch.ones(4, 1)}),
    r"dispatch: expected a Dispatch, got tuple": (TypeError, {"dispatch": tuple(ORDER)}),
    r"dispatch.slot_of_row: expected shape \(3,\) \(R,\) like z": (ValueError, {"z": ROWS[:3]}),
    r"dispatch.row_of_slot: expected -1 to 3, got 9 at \[0\]": (
        ValueError, {"dispatch": ORDER._replace(row_of_slot=torch.tensor([9, 2, 0, -1]))}
    ),
    r"dispatch.slot_of_row: expected the inverse of row_of_slot, got 0 at \[1\]": (
        ValueError, {"dispatch": ORDER._replace(row_of_slot=torch.tensor([2, 2, 0, -1]))}
    ),
    r"shared: expected shape \(2, 3\) \(T, D\), got \(2, 2\)": (ValueError, {"shared": X[:, :2]}),
    r"shared: expected no float64": (TypeError, {"shared": WIDE}),
    r"norm: expected a Norm, got LayerNorm. Pass Norm\(": (TypeError, {"norm": torch.nn.LayerNorm(3)}),
    r"norm.kind: expected one of layer, rms, got 'batch'": (ValueError, {"norm": Norm("batch")}),  # type: ignore[arg-type]
    r"norm.weight: expected shape \(3,\) like the columns of x": (ValueError, {"norm": Norm("rms", torch.ones(2))}),
    r"norm.bias: expected a torch.Tensor, got float": (TypeError, {"norm": Norm("rms", None, 1.0)}),  # type: ignore[arg-type]
    r"norm.eps: expected a number >= 0, got -1": (ValueError, {"norm": Norm("rms", eps=-1.0)}),
    r"norm.eps: expected .*nan": (ValueError, {"norm": Norm("rms", eps=math.nan)}),
    r"post_norm: expected False without a norm, got True. Pass norm=": (ValueError, {"post_norm": True}),
    r"post_norm: expected True or False, got int": (TypeError, {"post_norm": 1}),
    r"impl: expected one of": (ValueError, {"impl": "gpu"}),
}  # fmt: skip
NEEDED: dict[str, Given] = {"residual": {}, "momentum": {"m": None}, "adam": {"state": None, "is_first": True},
                            "robust": {"d": None, "mu": 0.5, "gamma": 1.0}}  # fmt: skip


@by_rule
@by_impl
@pytest.mark.parametrize("text", BAD)
def test_every_layer_refuses(rule: str, impl: str, text: str) -> None:
    kind, changes = BAD[text]
    op = RULES[rule].op
    with pytest.raises(kind, match=rf"^\[{op.__name__}\] {text}"):
        op(**{**CALL, **NEEDED[rule], "impl": impl, **changes})


OF_A_RULE: dict[str, tuple[str, type[Exception], Given]] = {
    r"m: expected shape \(2, 3\) .*got \(3, 3\)": ("momentum", ValueError, {"m": torch.ones(3, 3)}),
    r"m: expected shape \(2, 3\) .*got \(2, 1\)": ("momentum", ValueError, {"m": torch.ones(2, 1)}),
    r"m: expected no float64 beside x float32": ("momentum", TypeError, {"m": WIDE}),
    r"m: expected float32 like x, or float32, got bfloat16": ("momentum", TypeError, {"m": X.bfloat16()}),
    r"m: expected device cpu like x, got meta": ("momentum", ValueError, {"m": X.to("meta")}),
    r"m: expected a torch.Tensor, got AdamState": ("momentum", TypeError, {"m": AdamState(None, None, None)}),
    r"mu: expected a number, got nan": ("momentum", ValueError, {"mu": math.nan}),
    r"gamma: expected a finite number, got inf": ("momentum", ValueError, {"gamma": math.inf}),
    r"gamma: expected a number, got str": ("momentum", TypeError, {"gamma": "1"}),
    r"mu: expected shape \(\), got \(1,\). Pass a number, or": ("momentum", ValueError, {"mu": torch.ones(1)}),
    r"mu: expected dtype .*, got int64": ("momentum", TypeError, {"mu": torch.tensor(1)}),
    r"mu: expected device cpu like x, got meta": ("momentum", ValueError, {"mu": torch.tensor(1.0, device="meta")}),
    r"state: expected an AdamState or None, got Tensor. Pass step.state": ("adam", TypeError, {"state": X}),
    r"state.v: expected shape \(2, 3\) .*got \(4, 3\)": ("adam", ValueError, {"state": AdamState(X, ROWS, X)}),
    r"is_first: expected True or False, got NoneType": ("adam", TypeError, {"is_first": None}),
    r"betas: expected two numbers, got 0.9": ("adam", TypeError, {"betas": 0.9}),
    r"betas: expected a number >= 0 and < 1, got 1": ("adam", ValueError, {"betas": (1.0, 0.9)}),
    r"eps: expected a number > 0, got 0": ("adam", ValueError, {"eps": 0.0}),
    r"gamma1: expected a number, got nan": ("adam", ValueError, {"gamma1": math.nan}),
    r"d: expected shape \(2, 3\) .*got \(1, 3\)": ("robust", ValueError, {"d": X[:1]}),
    r"alpha: expected a number, got NoneType": ("robust", TypeError, {"alpha": None}),
}  # fmt: skip


@by_impl
@pytest.mark.parametrize("text", OF_A_RULE)
def test_the_state_and_the_numbers_of_a_rule(text: str, impl: str) -> None:
    rule, kind, changes = OF_A_RULE[text]
    op = RULES[rule].op
    with pytest.raises(kind, match=rf"^\[{op.__name__}\] {text}"):
        op(**{**CALL, **NEEDED[rule], "impl": impl, **changes})


def test_checks_look_at_values_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    bad = X.clone()
    bad[1, 2] = math.nan
    for name in ("x", "m", "shared"):
        text = rf"^\[momentum_smoe_layer\] {name}: expected finite values, got nan at \[1, 2\]"
        with pytest.raises(ValueError, match=text):
            moe.momentum_smoe_layer(**{**CALL, "m": X, name: bad})


def test_a_wrong_dispatch_is_found_when_a_compiled_graph_runs() -> None:
    torch.compiler.reset()
    run = torch.compile(moe.residual_smoe_layer, fullgraph=True, backend="aot_eager")
    assert run(**CALL).x.tolist() == [[3.0] * 3, [2.0] * 3]
    wrong = ORDER._replace(row_of_slot=torch.tensor([2, 2, 0, -1]))
    with pytest.raises(ValueError, match="expected the inverse of row_of_slot, got 0"):
        run(**{**CALL, "dispatch": wrong})
