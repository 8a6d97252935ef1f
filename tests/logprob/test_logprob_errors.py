# SPDX-License-Identifier: Apache-2.0
"""What the front doors of the fused head refuse, and the text that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotloop.logprob import (
    bonsai_synthesis_loss,
    linear_cross_entropy,
    linear_logprob,
    mi_alpha_bound,
    token_logprob,
)
from logprob_cases import by_impl
from refusals import Table, assert_refused, refused

H, W, B = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
Y, OUT = torch.tensor([0, 4, -100]), torch.tensor([0, 5, -100])
Z = torch.zeros(3, 5)
OFFSETS, FALLING = torch.tensor([0, 1, 3]), torch.tensor([0, 2, 1, 3])
SHORT = OFFSETS[:2]

HEAD: Table = {
    r"hidden: expected shape \(\.\.\., 4\) to match weight \(5, 4\), got \(3, 3\)": H[:, :3],
    r"weight: expected device meta like hidden, got cpu\. Move it first": {"hidden": H.to("meta")},
    r"weight: expected 2 dimension\(s\), got shape \(4,\)": W[0],
    r"weight: expected a vocabulary of at least 1, got shape \(0, 4\)": W[:0],
    r"labels: expected shape \(3,\), one per row of hidden, got \(2,\)": Y[:2],
    r"labels: expected device cpu like hidden, got meta\. Move them first": Y.to("meta"),
    r"labels: expected 0 to 4 or ignore_index=-100, got 5 at \[1\] \(\d+ of \d+\)\. Use ignore": OUT,
    r"labels: expected 0 to 4 .*, got -1 at \[2\]": torch.tensor([0, 1, -1]),
    r"bias: expected shape \(5,\), one per row of weight, got \(4,\)": torch.zeros(4),
    r"bias: expected 1 dimension\(s\), got shape \(5, 1\)": torch.zeros(5, 1),
    r"bias: expected device cpu like hidden, got meta": B.to("meta"),
    r"cu_seqlens: expected int32 or int64 offsets .* float32 \(3,\)": OFFSETS.float(),
    r"cu_seqlens: expected int32 or int64 offsets of shape": OFFSETS[:0],
    r"cu_seqlens: expected offsets that rise from 0 to 3, the number of tokens, got \[0, 1\]": SHORT,
    r"cu_seqlens: expected offsets that rise from 0 .*, got \[0, 2, 1, 3\]": FALLING,
    r"cu_seqlens: expected offsets that rise from 0 to 3, .*, got \[1, 3\]": torch.tensor([1, 3]),
    r"cu_seqlens: expected device cpu, got meta": OFFSETS.to("meta"),
    r"cu_seqlens: expected hidden of shape \(tokens, width\) beside it, got \(1, 3, 4\)\. Pack the sequences": {
        "hidden": H.unsqueeze(0),
        "labels": Y.unsqueeze(0),
        "cu_seqlens": OFFSETS,
    },
}
HEAD_TYPES: Table = {
    r"hidden: expected a torch\.Tensor, got list\. Use torch\.as_tensor": [[0.0]],
    r"hidden: expected dtype float32, float64, float16, bfloat16, got int32": H.int(),
    r"weight: expected dtype float64 like hidden, got float32\. Convert one": {
        "hidden": H.double()
    },
    r"weight: expected dtype float32, .*, got bool": W.bool(),
    r"labels: expected a torch\.Tensor, got list": [0, 1, 2],
    r"labels: expected dtype int64 or int32, got float32": Y.float(),
    r"bias: expected dtype float32, .*, got int64": torch.zeros(5, dtype=torch.int64),
    r"cu_seqlens: expected a torch\.Tensor, got list": [0, 3],
}
COMMON: Table = {
    r"temperature: expected a number > 0, got 0\.0": 0.0,
    r"temperature: expected a number > 0, got nan": float("nan"),
    r"temperature: expected a magnitude from 1e-18 to 1e\+18, got 1e-39": 1e-39,
    r"logit_scale: expected a magnitude from 1e-18 to 1e\+18, got -1e\+30": -1e30,
    r"softcap: expected a magnitude from 1e-18 to 1e\+18, got 1e-40": 1e-40,
    r"softcap: expected a number > 0, got -1\.0\. Pass None for no cap": -1.0,
    r"statistics: expected one of entropy, lse, sum_p2, mean_logit, argmax_hit, got 'p'": "p",
    r"impl: expected one of auto, reference, cpu, cuda, triton, got 'gpu'": "gpu",
}
COMMON_TYPES: Table = {
    r"temperature: expected a number > 0, got str\. Pass a float": "1",
    r"temperature: expected a number > 0, got bool": True,
    r"logit_scale: expected a number, got NoneType": None,
}
LOGITS: Table = {
    r"logits: expected shape \(\.\.\., vocabulary\), got \(3, 0\)": Z[:, :0],
    r"logits: expected shape \(\.\.\., vocabulary\), got \(\)": torch.tensor(1.0),
    r"labels: expected shape \(3,\), one per row of logits, got \(2,\)": Y[:2],
    r"labels: expected 0 to 4 or ignore_index=-100, got 9 at \[0\]": torch.tensor([9, 1, 1]),
}
LOGIT_TYPES: Table = {
    r"logits: expected a torch\.Tensor, got list": [[0.0]],
    r"logits: expected dtype float32, .*, got int64": Z.long(),
}


@by_impl
@refused(HEAD | COMMON, HEAD_TYPES | COMMON_TYPES)
def test_linear_logprob(
    changes: dict[str, Any], kind: type[Exception], text: str, impl: str
) -> None:
    arguments = {"hidden": H, "weight": W, "labels": Y, "bias": B, "impl": impl, **changes}
    assert_refused(linear_logprob, arguments, kind, text)


@by_impl
@refused(LOGITS | COMMON, LOGIT_TYPES | COMMON_TYPES)
def test_token_logprob(
    changes: dict[str, Any], kind: type[Exception], text: str, impl: str
) -> None:
    arguments = {"logits": Z, "labels": Y, "impl": impl, **changes}
    assert_refused(token_logprob, arguments, kind, text)


@refused(
    {
        "reduction: expected one of none, mean, sum, got 'max'": "max",
        "label_smoothing: expected a number >= 0 and < 1, got 1.0": 1.0,
        "z_loss: expected a number >= 0, got -1.0": -1.0,
        "softcap: expected a number > 0, got 0.0. Pass None for no cap": 0.0,
        "labels: expected 0 to 4 or ignore_index=-100, got 5": Y + 1,
    },
    {"logit_scale: expected a number, got str": "1"},
)
def test_linear_cross_entropy(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    arguments = {"hidden": H.clone().requires_grad_(), "weight": W, "labels": Y, **changes}
    assert_refused(linear_cross_entropy, arguments, kind, text)


F, Q = torch.zeros(3, 3), torch.zeros(3)


@refused(
    {
        r"scores: expected shape \(n, n\) with n >= 2, got \(2, 3\)": F[:2],
        r"scores: expected shape \(n, n\) with n >= 2, got \(1, 1\)": {
            "scores": F[:1, :1],
            "log_baseline": Q[:1],
        },
        r"log_baseline: expected shape \(3,\), got \(2,\)": Q[:2],
        r"alpha: expected a number >= 0 and <= 1, got 1\.5": 1.5,
    },
    {"scores: expected dtype": F.int()},
)
def test_mi_alpha_bound(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    assert_refused(mi_alpha_bound, {"scores": F, "log_baseline": Q, **changes}, kind, text)


@refused(
    {
        "head_logits: expected 3 dimension": {"head_logits": Z, "pseudo_labels": Y},
        "reduction: expected one of none, mean, sum": "max",
    },
    {},
)
def test_bonsai(changes: dict[str, Any], kind: type[Exception], text: str) -> None:
    arguments = {"head_logits": Z.repeat(2, 1, 1), "pseudo_labels": Y.repeat(2, 1), **changes}
    assert_refused(bonsai_synthesis_loss, arguments, kind, text)


def test_labels_of_bonsai() -> None:
    with pytest.raises(ValueError, match=r"labels: expected shape \(2, 3\)"):
        bonsai_synthesis_loss(Z.repeat(2, 1, 1), Y[None])


def test_one_statistic_may_be_a_string() -> None:
    assert linear_logprob(H, W, Y, statistics="entropy").entropy is not None


def test_a_forced_impl_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        NotImplementedError,
        match=r"(?s)hidden \(3, 4\) float32 on cpu with impl='triton':.*triton +refused",
    ):
        linear_logprob(H, W, Y, impl="triton")
    with pytest.raises(NotImplementedError, match=r"cuda +refused: this op has none"):
        token_logprob(Z, Y, impl="cuda")
    with pytest.raises(NotImplementedError, match=r"no implementation fits scores \(3, 3\)"):
        mi_alpha_bound(F, Q, impl="cpu")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias"])
def test_checks_find_what_is_not_finite(
    name: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"hidden": H.clone(), "weight": W.clone(), "bias": B.clone()}
    tensors[name].view(-1)[3] = bad
    linear_logprob(labels=Y, **tensors)
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    at = r"\[3\]" if name == "bias" else r"\[0, 3\]"
    text = rf"{name}: expected finite values, got {bad} at {at} \(1 of "
    assert_refused(linear_logprob, {"labels": Y, **tensors}, ValueError, text)
    monkeypatch.setenv("HOTLOOP_CHECK", "0")
    linear_logprob(labels=Y, **tensors)


def test_checks_of_given_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    token_logprob(Z, Y)
    z = Z.clone()
    z[1, 2] = torch.nan
    text = r"logits: expected finite values, got nan at \[1, 2\] \(1 of 15\)"
    assert_refused(token_logprob, {"logits": z, "labels": Y}, ValueError, text)
