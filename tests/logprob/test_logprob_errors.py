"""What the front doors of the fused head refuse, and the text that says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hotloop.logprob import linear_logprob, mi_alpha_bound, token_logprob

H, W, B = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(5)
Y = torch.tensor([0, 4, -100])
Z = torch.zeros(3, 5)
OFFSETS = torch.tensor([0, 1, 3])

HEAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"hidden": [[0.0]]}, TypeError, r"hidden: expected a torch\.Tensor, got list\. Use torch\.as_tensor"),
    ({"hidden": H.int()}, TypeError, r"hidden: expected dtype float32, float64, float16, bfloat16, got int32"),
    ({"hidden": H[:, :3]}, ValueError, r"hidden: expected shape \(\.\.\., 4\) to match weight \(5, 4\), got \(3, 3\)"),
    ({"hidden": H.double()}, TypeError, r"weight: expected dtype float64 like hidden, got float32\. Convert one"),
    ({"hidden": H.to("meta")}, ValueError, r"weight: expected device meta like hidden, got cpu\. Move it first"),
    ({"weight": W[0]}, ValueError, r"weight: expected 2 dimension\(s\), got shape \(4,\)"),
    ({"weight": W[:0]}, ValueError, r"weight: expected a vocabulary of at least 1, got shape \(0, 4\)"),
    ({"weight": W.bool()}, TypeError, r"weight: expected dtype float32, .*, got bool"),
    ({"labels": [0, 1, 2]}, TypeError, r"labels: expected a torch\.Tensor, got list"),
    ({"labels": Y.float()}, TypeError, r"labels: expected dtype int64 or int32, got float32"),
    ({"labels": Y[:2]}, ValueError, r"labels: expected shape \(3,\), one per row of hidden, got \(2,\)"),
    ({"labels": Y.to("meta")}, ValueError, r"labels: expected device cpu like hidden, got meta\. Move them first"),
    (
        {"labels": torch.tensor([0, 5, -100])}, ValueError,
        r"labels: expected 0 to 4 or ignore_index=-100, got 5 at \[1\] \(\d+ of \d+\)\. Use ignore_index",
    ),
    ({"labels": torch.tensor([0, 1, -1])}, ValueError, r"labels: expected 0 to 4 .*, got -1 at \[2\]"),
    ({"bias": torch.zeros(4)}, ValueError, r"bias: expected shape \(5,\), one per row of weight, got \(4,\)"),
    ({"bias": torch.zeros(5, 1)}, ValueError, r"bias: expected 1 dimension\(s\), got shape \(5, 1\)"),
    ({"bias": torch.zeros(5, dtype=torch.int64)}, TypeError, r"bias: expected dtype float32, .*, got int64"),
    ({"bias": B.to("meta")}, ValueError, r"bias: expected device cpu like hidden, got meta"),
    ({"cu_seqlens": OFFSETS.float()}, ValueError, r"cu_seqlens: expected int32 or int64 offsets .* float32 \(3,\)"),
    ({"cu_seqlens": OFFSETS[:0]}, ValueError, r"cu_seqlens: expected int32 or int64 offsets of shape"),
    (
        {"cu_seqlens": torch.tensor([0, 2])}, ValueError,
        r"cu_seqlens: expected offsets that rise from 0 to 3, the number of tokens, got \[0, 2\]",
    ),
    ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, ValueError, r"cu_seqlens: expected offsets that rise from 0 to 3"),
    ({"cu_seqlens": torch.tensor([1, 3])}, ValueError, r"cu_seqlens: expected offsets that rise from 0 to 3"),
    ({"cu_seqlens": OFFSETS.to("meta")}, ValueError, r"cu_seqlens: expected device cpu, got meta"),
    ({"cu_seqlens": [0, 3]}, TypeError, r"cu_seqlens: expected a torch\.Tensor, got list"),
    (
        {"hidden": H.unsqueeze(0), "labels": Y.unsqueeze(0), "cu_seqlens": OFFSETS}, ValueError,
        r"cu_seqlens: expected hidden of shape \(tokens, width\) beside it, got \(1, 3, 4\)\. Pack the sequences",
    ),
]  # fmt: skip
COMMON: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"temperature": 0.0}, ValueError, r"temperature: expected a number > 0, got 0\.0"),
    ({"temperature": float("nan")}, ValueError, r"temperature: expected a number > 0, got nan"),
    ({"temperature": "1"}, TypeError, r"temperature: expected a number > 0, got str\. Pass a float"),
    ({"temperature": 1e-39}, ValueError, r"temperature: expected a magnitude from 1e-18 to 1e\+18, got 1e-39"),
    ({"logit_scale": -1e30}, ValueError, r"logit_scale: expected a magnitude from 1e-18 to 1e\+18, got -1e\+30"),
    ({"softcap": 1e-40}, ValueError, r"softcap: expected a magnitude from 1e-18 to 1e\+18, got 1e-40"),
    ({"temperature": True}, TypeError, r"temperature: expected a number > 0, got bool"),
    ({"logit_scale": None}, TypeError, r"logit_scale: expected a number, got NoneType"),
    ({"softcap": -1.0}, ValueError, r"softcap: expected a number > 0, got -1\.0\. Pass None for no cap"),
    (
        {"statistics": ("entropy", "p")}, ValueError,
        r"statistics: expected one of entropy, lse, sum_p2, mean_logit, argmax_hit, got 'p'",
    ),
    ({"impl": "gpu"}, ValueError, r"impl: expected one of auto, reference, cpu, cuda, triton, got 'gpu'"),
]  # fmt: skip
LOGITS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logits": [[0.0]]}, TypeError, r"logits: expected a torch\.Tensor, got list"),
    ({"logits": Z.long()}, TypeError, r"logits: expected dtype float32, .*, got int64"),
    (
        {"logits": Z[:, :0]},
        ValueError,
        r"logits: expected shape \(\.\.\., vocabulary\), got \(3, 0\)",
    ),
    (
        {"logits": torch.tensor(1.0)},
        ValueError,
        r"logits: expected shape \(\.\.\., vocabulary\), got \(\)",
    ),
    (
        {"labels": Y[:2]},
        ValueError,
        r"labels: expected shape \(3,\), one per row of logits, got \(2,\)",
    ),
    (
        {"labels": torch.tensor([9, 1, 1])},
        ValueError,
        r"labels: expected 0 to 4 or ignore_index=-100, got 9 at \[0\]",
    ),
]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "kind", "text"), [*HEAD, *COMMON], ids=lambda x: x if isinstance(x, str) else ""
)
def test_linear_logprob(
    change: dict[str, Any], kind: type[Exception], text: str, impl: str
) -> None:
    arguments = {"hidden": H, "weight": W, "labels": Y, "bias": B, "impl": impl, **change}
    with pytest.raises(kind, match=rf"^\[linear_logprob\] {text}"):
        linear_logprob(**arguments)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "kind", "text"), [*LOGITS, *COMMON], ids=lambda x: x if isinstance(x, str) else ""
)
def test_token_logprob(change: dict[str, Any], kind: type[Exception], text: str, impl: str) -> None:
    arguments = {"logits": Z, "labels": Y, "impl": impl, **change}
    with pytest.raises(kind, match=rf"^\[token_logprob\] {text}"):
        token_logprob(**arguments)


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
    with pytest.raises(
        ValueError,
        match=rf"\[linear_logprob\] {name}: expected finite values, got {bad} at {at} \(1 of ",
    ):
        linear_logprob(labels=Y, **tensors)
    monkeypatch.setenv("HOTLOOP_CHECK", "0")
    linear_logprob(labels=Y, **tensors)


def test_checks_of_given_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    token_logprob(Z, Y)
    z = Z.clone()
    z[1, 2] = torch.nan
    with pytest.raises(
        ValueError,
        match=r"\[token_logprob\] logits: expected finite values, got nan at \[1, 2\] \(1 of 15\)",
    ):
        token_logprob(z, Y)


def test_mi_alpha_bound() -> None:
    f, q = torch.zeros(3, 3), torch.zeros(3)
    for change, kind, text in (
        (
            {"scores": f[:2]},
            ValueError,
            r"scores: expected shape \(n, n\) with n >= 2, got \(2, 3\)",
        ),
        (
            {"scores": f[:1, :1], "log_baseline": q[:1]},
            ValueError,
            r"scores: expected shape \(n, n\) with n >= 2",
        ),
        ({"scores": f.int()}, TypeError, r"scores: expected dtype"),
        ({"log_baseline": q[:2]}, ValueError, r"log_baseline: expected shape \(3,\), got \(2,\)"),
        ({"alpha": 1.5}, ValueError, r"alpha: expected a number >= 0 and <= 1, got 1\.5"),
    ):
        with pytest.raises(kind, match=rf"\[mi_alpha_bound\] {text}"):
            mi_alpha_bound(**{"scores": f, "log_baseline": q, **change})
    with pytest.raises(
        NotImplementedError, match=r"\[mi_alpha_bound\] no implementation fits scores \(3, 3\)"
    ):
        mi_alpha_bound(f, q, impl="cpu")
