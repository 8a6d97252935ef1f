# SPDX-License-Identifier: Apache-2.0
"""What the divergences refuse, and the text that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotloop import logprob
from refusals import Table, assert_refused, each, refused

S, T, Y = torch.zeros(3, 5), torch.zeros(3, 5), torch.tensor([0, 4, -100])
H, W, TH, TW = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, 2), torch.zeros(5, 2)
OF_LOGITS = (
    "forward_kl_distill", "reverse_kl_distill", "generalized_jsd_distill", "balanced_divergence_kd",
    "log_cosh_logit_distill",
)  # fmt: skip
OF_HEADS = ("linear_kl", "linear_jsd", "linear_distill")

LOGITS: Table = {
    r"teacher_logits: expected shape .* like student_logits \(3, 5\), got \(2, 5\)": T[:2],
    r"teacher_logits: expected shape": {"student_logits": S[:, :0], "teacher_logits": T[:, :0]},
    r"teacher_logits: expected device cpu like student_logits, got meta": T.to("meta"),
    r"labels: expected shape \(3,\), one per row of student_logits, got \(2,\)": Y[:2],
}
LOGIT_TYPES: Table = {
    r"student_logits: expected a torch\.Tensor, got list": [0.0],
    r"student_logits: expected dtype float32, .*, got int32": S.int(),
    r"teacher_logits: expected dtype float32, .*, got int32": T.int(),
    r"teacher_logits: expected dtype float32 like student_logits, got float64": T.double(),
    r"labels: expected dtype int64 or int32": Y.float(),
}
HEADS: Table = {
    r"student_hidden: expected shape \(\.\.\., 4\) to match student_weight": H[:, :2],
    r"teacher_hidden: expected shape \(\.\.\., 2\) to match teacher": TH[:, :1],
    r"teacher_weight: expected 3 rows over a vocabulary of 5 like the student, got 2 over 5\. Distil within": {
        "teacher_hidden": TH[:2]
    },
    r"teacher_weight: expected 3 rows over a vocabulary of 5 .* got 3 over 4": TW[:4],
    r"labels: expected 0 to 4 or ignore_index=-100, got 9": torch.tensor([0, 9, 1]),
}
HEAD_TYPES: Table = {
    r"student_hidden: expected a torch\.Tensor, got float": 1.0,
    r"student_weight: expected dtype float32 like student_hidden": W.double(),
    r"teacher_hidden: expected dtype float32, .*, got int32": TH.int(),
    r"teacher_weight: expected dtype float32 like student_weight, got float64": {
        "teacher_hidden": TH.double(),
        "teacher_weight": TW.double(),
    },
}
COMMON: Table = {
    r"temperature: expected a magnitude from 1e-18 to 1e\+18, got 1e\+19": 1e19,
    r"temperature: expected at most 1000 for float32, got 1001\.0: the divergence, about 1 / T\^2, would be lost "
    r"in the rounding of the log-probabilities\. Pass float64": 1001.0,
    r"temperature: expected a number > 0, got 0\.0": 0.0,
    r"reduction: expected one of none, mean, sum, got 'max'": "max",
    r"impl: expected one of auto, reference, cpu, cuda, triton, got 'fast'": "fast",
}
TWO_LOGITS: dict[str, Any] = {"student_logits": S, "teacher_logits": T, "labels": Y}
TWO_HEADS = {
    "student_hidden": H,
    "student_weight": W,
    "teacher_hidden": TH,
    "teacher_weight": TW,
    "labels": Y,
}
ARGUMENTS = {**dict.fromkeys(OF_LOGITS, TWO_LOGITS), **dict.fromkeys(OF_HEADS, TWO_HEADS)}
BETA = {f"beta: expected a number >= 0 and <= 1, got {beta}": beta for beta in (-0.1, 1.1)}
OF_ONE_OP: dict[str, Table] = {
    "linear_kl": {
        "direction: expected one of forward, reverse, got 'both'": "both",
        r"student_bias: expected shape \(5,\), one per row of student_weight": torch.zeros(4),
    },
    "linear_jsd": {
        **BETA,
        r"teacher_bias: expected shape \(5,\), one per row of teacher_weight": torch.zeros(4),
    },
    "generalized_jsd_distill": BETA,
    "balanced_divergence_kd": {
        "delta: expected a number >= 1, got 0.5": 0.5,
        "delta: expected a number >= 1, got nan": float("nan"),
    },
    "linear_distill": {
        "divergence_kind: expected one of forward_kl, reverse_kl, .*, got 'kl'": "kl"
    },
}


def wrong(op: str, changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    assert_refused(getattr(logprob, op), {**ARGUMENTS[op], **changes}, kind, text)


@pytest.mark.parametrize("op", OF_LOGITS)
@refused(LOGITS | COMMON, LOGIT_TYPES)
def test_of_logits(changes: dict[str, Any], kind: type[Exception], text: str, op: str) -> None:
    wrong(op, changes, kind, text)


@pytest.mark.parametrize("op", OF_HEADS)
@refused(HEADS | COMMON, HEAD_TYPES)
def test_of_heads(changes: dict[str, Any], kind: type[Exception], text: str, op: str) -> None:
    wrong(op, changes, kind, text)


@pytest.mark.parametrize("op", OF_ONE_OP)
def test_arguments_of_single_ops(op: str) -> None:
    for row in each(OF_ONE_OP[op], {}):
        text, changes, kind = row.values
        wrong(op, changes, kind, text)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_no_divergence_has_a_cuda_loop(op: str) -> None:
    wrong(op, {"impl": "cuda"}, NotImplementedError, "no implementation fits")


def test_log_cosh_has_no_triton_kernel() -> None:
    text = r"[^!]*triton +refused: log_cosh has no Triton kernel yet"
    wrong("log_cosh_logit_distill", {"impl": "triton"}, NotImplementedError, text)


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_checks_find_what_is_not_finite(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"student_logits": S.clone(), "teacher_logits": T.clone()}
    arguments[name][2, 1] = torch.inf
    logprob.forward_kl_distill(**arguments)
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    text = rf"{name}: expected finite values, got inf at \[2, 1\]"
    wrong("forward_kl_distill", arguments, ValueError, text)
    weight = TW.clone()
    weight[0, 0] = torch.nan
    text = r"teacher_weight: expected finite values, got nan at \[0, 0\]"
    wrong("linear_kl", {"teacher_weight": weight}, ValueError, text)
