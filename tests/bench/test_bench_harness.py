# SPDX-License-Identifier: Apache-2.0
"""Results before numbers, rows as they come, targets judged where they can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import _harness, _row
from bench._case import Case, Contender, Cost, Inputs, Lazy, Missing, Target, Verdict
from bench._check import CheckFailed, relative_error
from bench._harness import run_case
from bench._options import Options
from bench._timing import Sampler

Make = Callable[..., Case]
QUICK = Options(quick=True, quiet=True)


def square(inputs: Inputs) -> Tensor:
    x: Tensor = inputs["x"]
    return (x * x).sum()


def wrong_value(inputs: Inputs) -> Tensor:
    return square(inputs) * 1.001


def wrong_gradient(inputs: Inputs) -> Tensor:
    x: Tensor = inputs["x"]
    return square(inputs) + 0.01 * (x - x.detach()).sum()


def not_a_number(inputs: Inputs) -> Tensor:
    return square(inputs) * float("nan")


def raises(inputs: Inputs) -> Tensor:
    raise RuntimeError("no kernel for this\nand a long trace")


OURS = Contender("hotloop cpu", "ours", square)


def test_every_contender_gets_a_row(make_case: Make, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    floor = Contender("floor", "floor", lambda x: None)
    lazy = Lazy("lazy", lambda: Contender("lazy", "rival", square))
    outcome = run_case(make_case(OURS, lazy, floor), QUICK, out)
    assert _row.read(out) == outcome.rows
    rows = {row["impl"]: row for row in outcome.rows}
    assert set(rows) == {"torch", "hotloop cpu", "lazy", "floor", "roof"}
    assert set(rows["hotloop cpu"]["ratios"]) == {"torch", "lazy", "floor"}
    assert rows["torch"]["ratios"] == {}
    assert rows["roof"]["roof_share"] == 1.0
    assert rows["floor"]["errors"] == []
    assert max(rows["hotloop cpu"]["errors"]) < 1e-6
    assert rows["hotloop cpu"]["quick"]


@pytest.mark.parametrize("forward", [wrong_value, wrong_gradient, not_a_number])
@pytest.mark.parametrize("role", ["ours", "rival"])
def test_contenders_that_disagree_print_no_number(
    make_case: Make, tmp_path: Path, forward: Callable[[Inputs], Tensor], role: str
) -> None:
    out = tmp_path / "rows.jsonl"
    wrong = Contender("wrong", role, forward)  # type: ignore[arg-type]
    more = (wrong,) if role == "ours" else (OURS, wrong)
    with pytest.raises(CheckFailed, match=r"wrong is off by .* allowed"):
        run_case(make_case(*more), QUICK, out)
    assert not out.exists()


def test_a_wrong_plain_torch_prints_no_number(make_case: Make) -> None:
    case = make_case(OURS)
    wrong = [Contender("torch", "plain", lambda x: square(x) * 1.1), OURS]
    object.__setattr__(case, "contenders", wrong)
    with pytest.raises(CheckFailed, match="torch is off by"):
        run_case(case, QUICK, None)


def test_keep_going_leaves_out_the_rival_but_never_ours(make_case: Make) -> None:
    keep = Options(quick=True, quiet=True, keep_going=True)
    outcome = run_case(make_case(OURS, Contender("wrong", "rival", wrong_value)), keep, None)
    assert "wrong is off by" in outcome.failed["wrong"]
    assert "wrong" not in {row["impl"] for row in outcome.rows}
    with pytest.raises(CheckFailed):
        run_case(make_case(Contender("hotloop cpu", "ours", wrong_value)), keep, None)


def test_a_stated_looser_limit_is_used(make_case: Make) -> None:
    loose = Contender("wrong", "rival", wrong_value, k=1e3, why="a test")
    assert run_case(make_case(OURS, loose), QUICK, None).failed == {}


def test_what_raises_is_reported_in_one_line(make_case: Make) -> None:
    outcome = run_case(make_case(OURS, Contender("broken", "rival", raises)), QUICK, None)
    assert outcome.failed == {"broken": "RuntimeError: no kernel for this"}
    assert "hotloop cpu" in {row["impl"] for row in outcome.rows}
    outcome = run_case(make_case(Contender("hotloop cpu", "ours", raises)), QUICK, None)
    assert outcome.rows == []
    assert "hotloop cpu" in outcome.failed


def test_without_ours_the_case_is_skipped_with_the_reason(make_case: Make) -> None:
    outcome = run_case(make_case(Missing("hotloop cpu", "not there yet")), QUICK, None)
    assert (outcome.rows, outcome.skipped) == ([], {"hotloop cpu": "not there yet"})


def test_generated_code_is_left_out_below_the_native_instruction_set(make_case: Make) -> None:
    generated = Contender("torch.compile", "compiled", raises, compiles=True)
    outcome = run_case(make_case(OURS, generated), replace(QUICK, simd="avx2"), None)
    assert "crashes there" in outcome.skipped["torch.compile"]
    assert outcome.failed == {}


def test_only_names_the_rivals(make_case: Make) -> None:
    rival = Contender("rival", "rival", raises)
    outcome = run_case(make_case(OURS, rival), Options(quick=True, quiet=True, only="x"), None)
    assert {row["impl"] for row in outcome.rows} == {"hotloop cpu", "roof"}
    assert outcome.failed == {}


def test_an_interrupt_leaves_the_whole_rounds_so_far(
    make_case: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"

    def interrupted(round_: int) -> float:
        if round_ == 3:
            raise KeyboardInterrupt
        return 1e-3

    def samplers(per_step: object, calls: dict[str, object], sets: int) -> dict[str, Sampler]:
        return {name: Sampler("wall", interrupted) for name in calls}

    monkeypatch.setattr(_harness, "cpu_samplers", samplers)
    monkeypatch.setattr(_harness, "_WARM_UP_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        run_case(make_case(OURS), Options(quiet=True), out)
    assert [(row["impl"], row["rounds"]) for row in _row.read(out)] == [
        ("torch", 3), ("hotloop cpu", 3), ("roof", 3),
    ]  # fmt: skip


def test_targets_are_judged_but_not_in_a_quick_run(
    make_case: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_harness, "_WARM_UP_S", 0.0)
    targets = (
        Target("a", "torch", 1e6),
        Target("b", "torch", 1e-6),
        Target("c", "absent", 1.0),
        Target("d", "torch", 1.0, "memory"),
    )
    for quick, verdicts in ((False, [True, False, None, None]), (True, [None] * 4)):
        options = Options(quick=quick, quiet=True, seconds=0.01, memory=False)
        rows = run_case(make_case(OURS, targets=targets), options, None).rows
        ours = next(row for row in rows if row["role"] == "ours")
        assert [t["met"] for t in ours["targets"]] == verdicts


def test_cost_is_its_formula() -> None:
    assert Cost("flops", "6*n*d*v", {"n": 2, "d": 3, "v": 5}).amount == 180.0


def test_relative_error() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(truth.float(), truth) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0]), truth) == float("inf")
    assert relative_error(torch.tensor([3.0, float("nan")]), truth) == float("inf")


def test_who_follows_whom_changes_from_round_to_round(
    make_case: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns that only rotate would leave each contender behind the same other one."""

    def order_of(seed: int) -> list[str]:
        order: list[str] = []

        def samplers(per_step: object, calls: dict[str, object], sets: int) -> dict[str, Sampler]:
            def sampler(name: str) -> Sampler:
                return Sampler("wall", lambda round_: order.append(name) or 1e-3)  # type: ignore[func-returns-value]

            return {name: sampler(name) for name in calls}

        monkeypatch.setattr(_harness, "cpu_samplers", samplers)
        monkeypatch.setattr(_harness, "_WARM_UP_S", 0.0)
        monkeypatch.setattr(_harness, "_MOST_ROUNDS", 60)
        options = Options(quiet=True, memory=False, seconds=1e9, order_seed=seed)
        rows = run_case(make_case(OURS, Contender("rival", "rival", square)), options, None).rows
        assert {row["order_seed"] for row in rows} == {seed}
        return order

    order = order_of(3)
    names = set(order)
    assert len(names) == 4
    for begin in range(0, len(order), 4):
        assert set(order[begin : begin + 4]) == names
    followers = {name: {b for a, b in pairwise(order) if a == name} for name in names}
    assert all(followers[name] >= names - {name} for name in names), followers
    assert order == order_of(3)
    assert order != order_of(4)


def test_without_a_judge_a_contender_only_has_to_run(make_case: Make) -> None:
    def judge(contender: Contender, inputs: Inputs) -> Verdict:
        return Verdict([1.0], "is off")

    case = replace(make_case(OURS, Contender("broken", "rival", raises)), truth=None, judge=judge)
    with pytest.raises(CheckFailed, match="is off"):
        run_case(case, QUICK, None)
    outcome = run_case(case, replace(QUICK, judge=False), None)
    assert outcome.failed == {"broken": "RuntimeError: no kernel for this"}
    assert {row["impl"] for row in outcome.rows} == {"torch", "hotloop cpu", "roof"}
    assert all(row["errors"] == [] for row in outcome.rows)
