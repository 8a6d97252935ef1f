"""What the divergences refuse, and the text that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotloop import logprob

S, T, Y = torch.zeros(3, 5), torch.zeros(3, 5), torch.tensor([0, 4, -100])
H, W, TH, TW = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, 2), torch.zeros(5, 2)
OF_LOGITS = (
    "forward_kl_distill", "reverse_kl_distill", "generalized_jsd_distill", "balanced_divergence_kd",
    "log_cosh_logit_distill",
)  # fmt: skip
OF_HEADS = ("linear_kl", "linear_jsd", "linear_distill")

LOGITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_logits": [0.0]}, TypeError, r"student_logits: expected a torch\.Tensor, got list"),
    (
        {"student_logits": S.int()},
        TypeError,
        r"student_logits: expected dtype float32, .*, got int32",
    ),
    (
        {"teacher_logits": T.int()},
        TypeError,
        r"teacher_logits: expected dtype float32, .*, got int32",
    ),
    (
        {"teacher_logits": T[:2]},
        ValueError,
        r"teacher_logits: expected shape .* like student_logits \(3, 5\), got \(2, 5\)",
    ),
    (
        {"student_logits": S[:, :0], "teacher_logits": T[:, :0]},
        ValueError,
        r"teacher_logits: expected shape",
    ),
    (
        {"teacher_logits": T.double()},
        TypeError,
        r"teacher_logits: expected dtype float32 like student_logits, got float64",
    ),
    (
        {"teacher_logits": T.to("meta")},
        ValueError,
        r"teacher_logits: expected device cpu like student_logits, got meta",
    ),
    (
        {"labels": Y[:2]},
        ValueError,
        r"labels: expected shape \(3,\), one per row of student_logits, got \(2,\)",
    ),
    ({"labels": Y.float()}, TypeError, r"labels: expected dtype int64 or int32"),
]
HEADS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": 1.0}, TypeError, r"student_hidden: expected a torch\.Tensor, got float"),
    ({"student_hidden": H[:, :2]}, ValueError, r"student_hidden: expected shape \(\.\.\., 4\) to match student_weight"),
    ({"student_weight": W.double()}, TypeError, r"student_weight: expected dtype float32 like student_hidden"),
    ({"teacher_hidden": TH.int()}, TypeError, r"teacher_hidden: expected dtype float32, .*, got int32"),
    ({"teacher_hidden": TH[:, :1]}, ValueError, r"teacher_hidden: expected shape \(\.\.\., 2\) to match teacher"),
    (
        {"teacher_hidden": TH[:2]}, ValueError,
        r"teacher_weight: expected 3 rows over a vocabulary of 5 like the student, got 2 over 5\. Distil within",
    ),
    ({"teacher_weight": TW[:4]}, ValueError, r"teacher_weight: expected 3 rows over a vocabulary of 5 .* got 3 over 4"),
    (
        {"teacher_hidden": TH.double(), "teacher_weight": TW.double()}, TypeError,
        r"teacher_weight: expected dtype float32 like student_weight, got float64",
    ),
    ({"labels": torch.tensor([0, 9, 1])}, ValueError, r"labels: expected 0 to 4 or ignore_index=-100, got 9"),
]  # fmt: skip
COMMON: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"temperature": 1e19},
        ValueError,
        r"temperature: expected a magnitude from 1e-18 to 1e\+18, got 1e\+19",
    ),
    (
        {"temperature": 1001.0},
        ValueError,
        r"temperature: expected at most 1000 for float32, got 1001\.0: the divergence, about 1 / T\^2, would be lost "
        r"in the rounding of the log-probabilities\. Pass float64",
    ),
    ({"temperature": 0.0}, ValueError, r"temperature: expected a number > 0, got 0\.0"),
    ({"reduction": "max"}, ValueError, r"reduction: expected one of none, mean, sum, got 'max'"),
    (
        {"impl": "fast"},
        ValueError,
        r"impl: expected one of auto, reference, cpu, cuda, triton, got 'fast'",
    ),
    ({"impl": "cuda"}, NotImplementedError, r"no implementation fits"),
]


@pytest.mark.parametrize("op", OF_LOGITS)
@pytest.mark.parametrize(
    ("change", "kind", "text"), [*LOGITS, *COMMON], ids=lambda x: x if isinstance(x, str) else ""
)
def test_of_logits(change: dict[str, Any], kind: type[Exception], text: str, op: str) -> None:
    with pytest.raises(kind, match=rf"^\[{op}\] {text}"):
        getattr(logprob, op)(**{"student_logits": S, "teacher_logits": T, "labels": Y, **change})


@pytest.mark.parametrize("op", OF_HEADS)
@pytest.mark.parametrize(
    ("change", "kind", "text"), [*HEADS, *COMMON], ids=lambda x: x if isinstance(x, str) else ""
)
def test_of_heads(change: dict[str, Any], kind: type[Exception], text: str, op: str) -> None:
    arguments = {
        "student_hidden": H,
        "student_weight": W,
        "teacher_hidden": TH,
        "teacher_weight": TW,
        "labels": Y,
    }
    with pytest.raises(kind, match=rf"^\[{op}\] {text}"):
        getattr(logprob, op)(**{**arguments, **change})


def test_arguments_of_single_ops() -> None:
    heads = (H, W, TH, TW)
    with pytest.raises(
        ValueError, match=r"\[linear_kl\] direction: expected one of forward, reverse, got 'both'"
    ):
        logprob.linear_kl(*heads, direction="both")
    for call, arguments in ((logprob.linear_jsd, heads), (logprob.generalized_jsd_distill, (S, T))):
        for beta in (-0.1, 1.1):
            with pytest.raises(
                ValueError, match=rf"beta: expected a number >= 0 and <= 1, got {beta}"
            ):
                call(*arguments, beta=beta)
    for delta in (0.5, float("nan")):
        with pytest.raises(
            ValueError, match=r"\[balanced_divergence_kd\] delta: expected a number >= 1"
        ):
            logprob.balanced_divergence_kd(S, T, delta=delta)
    with pytest.raises(
        ValueError,
        match=r"\[linear_distill\] divergence_kind: expected one of forward_kl, reverse_kl, .*, got 'kl'",
    ):
        logprob.linear_distill(*heads, divergence_kind="kl")
    with pytest.raises(
        ValueError,
        match=r"\[linear_kl\] student_bias: expected shape \(5,\), one per row of student_weight",
    ):
        logprob.linear_kl(*heads, student_bias=torch.zeros(4))
    with pytest.raises(
        ValueError,
        match=r"\[linear_jsd\] teacher_bias: expected shape \(5,\), one per row of teacher_weight",
    ):
        logprob.linear_jsd(*heads, teacher_bias=torch.zeros(4))


def test_log_cosh_has_no_triton_kernel() -> None:
    with pytest.raises(
        NotImplementedError, match=r"triton +refused: log_cosh has no Triton kernel yet"
    ):
        logprob.log_cosh_logit_distill(S, T, impl="triton")


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_checks_find_what_is_not_finite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"student_logits": S.clone(), "teacher_logits": T.clone()}
    arguments[name][2, 1] = torch.inf
    logprob.forward_kl_distill(**arguments)
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    with pytest.raises(
        ValueError,
        match=rf"\[forward_kl_distill\] {name}: expected finite values, got inf at \[2, 1\]",
    ):
        logprob.forward_kl_distill(**arguments)
    heads = {
        "student_hidden": H,
        "student_weight": W,
        "teacher_hidden": TH,
        "teacher_weight": TW.clone(),
    }
    heads["teacher_weight"][0, 0] = torch.nan
    with pytest.raises(
        ValueError,
        match=r"\[linear_kl\] teacher_weight: expected finite values, got nan at \[0, 0\]",
    ):
        logprob.linear_kl(**heads)
