# SPDX-License-Identifier: Apache-2.0
"""No option and no label of a loss or a head turns into NaN: what is no number of its range is refused."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from catalog_cases import Call, calls_of
from hotloop._catalog import rooms_with_torch
from hotloop.preference import (
    RunningRewardMean,
    bco_loss,
    cpl_dense_loss,
    dno_loss,
    dpo_loss,
    kto_loss,
    linear_preference_loss,
    robust_dpo_loss,
    sppo_loss,
    vpo_loss,
)
from torch import Tensor

LINEAR = "linear_preference_loss"
EVERY = [
    (op, call)
    for op, call in calls_of(lambda op: op.room in rooms_with_torch() and op.name != LINEAR)
]


def numbers(call: Call) -> list[str]:
    """The arguments that take a number, by their annotations."""
    return [
        p.name
        for p in inspect.signature(call.function).parameters.values()
        if any(word in str(p.annotation) for word in ("float", "Row", "int"))
    ]


NUMBERS = [(op, call, name) for op, call in EVERY for name in numbers(call)]


NOT_READ = {("rpo_sft", "chosen_lengths")}
"""Lengths of a loss that does not average."""


@pytest.mark.parametrize(
    ("op", "call", "name"), NUMBERS, ids=[f"{c.id}-{name}" for _, c, name in NUMBERS]
)
def test_every_number_is_finite(op: Any, call: Call, name: str) -> None:
    """1e39 is finite in Python and infinite in float32. A number that this call does not read may be anything."""
    for value in (math.nan, math.inf, -math.inf, 1e39, -1e39):
        value = (value, 0.5) if name == "weights" else value
        arguments = {**call.arguments(4), name: value}
        if (call.id, name) in NOT_READ:
            assert torch.equal(call.function(**arguments), call.function(**call.arguments(4)))
            continue
        with pytest.raises((ValueError, TypeError), match=rf"^\[{op.name}\] .*expected"):
            call.function(**arguments)


def test_the_text_says_finite() -> None:
    z = torch.zeros(3)
    text = r"^\[dpo_loss\] beta: expected a finite number > 0, got inf\. Leave it out or pass a finite number\.$"
    with pytest.raises(ValueError, match=text):
        dpo_loss(z, z, z, z, beta=math.inf)
    with pytest.raises(ValueError, match=r"beta: expected a finite number > 0, got 1e\+39\.$"):
        dpo_loss(z, z, z, z, beta=1e39)
    with pytest.raises(ValueError, match=r"beta: expected a number > 0, got -1\.0\.$"):
        dpo_loss(z, z, z, z, beta=-1.0)


# -- labels ------------------------------------------------------------------------------------------------

LOGPS = torch.tensor([-1.0, -2.0, -3.0, -4.0])
REF = torch.tensor([-2.0, -2.5, -2.0, -5.0])


@pytest.mark.parametrize("times", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.int8, torch.bfloat16])
@pytest.mark.parametrize("bad", [-1, 2])
def test_marks_are_not_numbers(bad: int, dtype: torch.dtype, times: int) -> None:
    marks = torch.tensor([1, bad, 1, 0]).to(dtype).repeat(times)
    logps, ref = LOGPS.repeat(times), REF.repeat(times)
    text = rf"is_desirable: expected True and False, or 1 and 0, got {bad}(\.0)?\. Pass is_desirable > 0"
    with pytest.raises(ValueError, match=rf"^\[kto_loss\] {text}"):
        kto_loss(logps, ref, marks, kl=0.0)
    with pytest.raises(ValueError, match=rf"^\[bco_loss\] {text}"):
        bco_loss(logps, ref, marks)
    with pytest.raises(ValueError, match=rf"^\[RunningRewardMean\] {text}"):
        RunningRewardMean().update(logps, marks)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64, torch.bfloat16])
def test_marks_of_every_dtype_mean_the_same(dtype: torch.dtype) -> None:
    marks = torch.tensor([1, 0, 1, 0]).to(dtype)
    u = 0.1 * (LOGPS - REF)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(
        kto_loss(LOGPS, REF, marks, kl=0.0), (1 - torch.sigmoid(sign * u)).mean()
    )


def test_a_mark_of_nan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is_desirable: .*got nan"):
        kto_loss(LOGPS, REF, torch.tensor([1.0, math.nan, 0.0, 1.0]), kl=0.0)


@pytest.mark.parametrize("n", [4, 100])
@pytest.mark.parametrize("bad", [-0.1, 1.5, math.nan])
def test_probabilities_given_as_rows_are_in_range(bad: float, n: int) -> None:
    z, p = torch.zeros(n), torch.full((n,), 0.3)
    p[-1] = bad
    got = rf"got {bad:g}\.$"
    with pytest.raises(
        ValueError, match=rf"\[sppo_loss\] win_rate: expected numbers >= 0 and <= 1, {got}"
    ):
        sppo_loss(z, z, p)
    with pytest.raises(
        ValueError, match=rf"\[dno_loss\] label: expected numbers >= 0 and <= 1, {got}"
    ):
        dno_loss(z, z, z, z, label=p)
    with pytest.raises(
        ValueError, match=rf"label_smoothing: expected numbers >= 0 and < 0\.5, {got}"
    ):
        robust_dpo_loss(z, z, z, z, label_smoothing=p)


@pytest.mark.parametrize("n", [1, 7, 4096, 4097, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_both_ends_belong_to_the_range_wherever_the_value_stands(
    dtype: torch.dtype, n: int
) -> None:
    z = torch.zeros(n)
    for place in {0, n // 2, n - 1}:
        p = (torch.arange(2 * n) % 2).to(dtype)[::2] + (torch.arange(n) == place).to(dtype)
        sppo_loss(z, z, p)  # 0, and 1 at one place
        sppo_loss(z, z, torch.zeros(2 * n, dtype=dtype)[::2])
        p[place] = 2
        with pytest.raises(ValueError, match=r"win_rate: .*got 2\.$"):
            sppo_loss(z, z, p)
    if dtype.is_floating_point:
        half = torch.full((n,), 0.5, dtype=dtype)
        with pytest.raises(ValueError, match=r"label_smoothing: .*< 0\.5, got 0\.5\.$"):
            robust_dpo_loss(z, z, z, z, label_smoothing=half)


# -- means over nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("loss", ["orpo", "cpo", "simpo"])
def test_no_chosen_token_that_counts(loss: str, packed: bool) -> None:
    """The likelihood of no tokens is 1: its term is 0, and the other terms stay."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(4, 3, 5, generator=g).requires_grad_()
    w, labels = torch.randn(7, 5, generator=g), torch.tensor([[1, 2, 3]]).repeat(4, 1)
    labels[:2] = -100
    options = {"cpo_alpha": 1.0} if loss == "simpo" else {}
    if packed:
        cu = torch.tensor([0, 3, 6, 9, 12])
        found = linear_preference_loss(
            h.reshape(12, 5), w, labels.reshape(12), cu_seqlens=cu, loss=loss, options=options
        )[0]
    else:
        found = linear_preference_loss(h, w, labels, loss=loss, options=options)[0]
    rejected = torch.log_softmax(h[2:] @ w.T, -1).gather(-1, labels[2:, :, None])[..., 0]
    gap = {"orpo": None, "cpo": -0.1 * rejected.sum(1), "simpo": -2.5 * rejected.mean(1) - 1.25}[
        loss
    ]
    if gap is not None:
        torch.testing.assert_close(found, torch.nn.functional.softplus(-gap).mean())
    found.backward()
    assert bool(found.isfinite())
    assert h.grad is not None
    assert bool(h.grad.isfinite().all())
    assert not h.grad[:2].any()


def test_means_over_nothing_that_a_loss_adds() -> None:
    empty = torch.zeros(0)
    with pytest.raises(
        ValueError,
        match=r"\[kto_loss\] policy_kl_logps: expected at least one row, got shape \(0,\)",
    ):
        kto_loss(LOGPS, REF, torch.ones(4), empty, empty)
    with pytest.raises(
        ValueError, match=r"\[vpo_loss\] .*: expected at least one row beside policy_chosen_logps"
    ):
        vpo_loss(LOGPS, REF, LOGPS, REF, empty, ref_calibration_logps=empty, alpha=0.1)
    with pytest.raises(
        ValueError, match=r"\[cpl_dense_loss\] segment_logps: expected at least 2 segments, got 1"
    ):
        cpl_dense_loss(torch.ones(1), torch.ones(1))


def test_a_head_without_samples_adds_nothing() -> None:
    from hotloop.logprob import bonsai_synthesis_loss

    logits, labels = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [-100, -100, -100]])
    expected: Tensor = torch.nn.functional.cross_entropy(logits[0], labels[0])
    torch.testing.assert_close(bonsai_synthesis_loss(logits, labels), expected)
