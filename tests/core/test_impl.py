# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: forcing, refusing, and the environment variables."""

from __future__ import annotations

import logging

import pytest
import torch
from fixtures import plain_environment  # noqa: F401
from hotloop.front import environment, impl
from hotloop.logprob import linear_logprob
from hotloop.preference import dpo_loss

H, W, Y = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])
X = torch.zeros(2)
CALLS = {
    "linear_logprob": lambda **how: linear_logprob(H, W, Y, **how),
    "dpo_loss": lambda **how: dpo_loss(X, X, X, X, **how),
}
by_op = pytest.mark.parametrize("op", CALLS)
CANDIDATES = {
    "triton": lambda x: f"device {x.device}",
    "cpu": impl.on_cpu,
    "cuda": impl.on_cuda,
    "reference": impl.everywhere,
}


def choose(forced: str, candidates: dict = CANDIDATES) -> str:
    return impl.choose("some_op", forced, "x", X, candidates)


def test_auto_takes_the_first_that_can() -> None:
    assert choose("auto") == "cpu"
    assert impl.last_impl("some_op") == "cpu"
    assert impl.last_impl("never called") is None


@by_op
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_forced_by_argument(name: str, op: str) -> None:
    assert choose(name) == name
    CALLS[op](impl=name)
    assert impl.last_impl(op) == name


@by_op
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_forced_by_the_environment(name: str, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_IMPL", name)
    CALLS[op]()
    assert impl.last_impl(op) == name


def test_the_argument_beats_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_IMPL", "reference")
    assert choose("cpu") == "cpu"


@by_op
def test_unknown_impl(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accepted = "reference, cpu, .*got 'fast'"
    with pytest.raises(ValueError, match=rf"\[{op}\] impl: expected one of auto, {accepted}"):
        CALLS[op](impl="fast")
    monkeypatch.setenv("HOTLOOP_IMPL", "fast")
    with pytest.raises(ValueError, match=rf"\[{op}\] HOTLOOP_IMPL: expected one of {accepted}"):
        CALLS[op]()


def test_a_forced_impl_that_cannot_run_raises_and_lists_every_reason() -> None:
    with pytest.raises(NotImplementedError) as caught:
        choose("triton")
    assert str(caught.value).splitlines() == [
        "[some_op] no implementation fits x (2,) float32 on cpu with impl='triton':",
        '    reference  available; pass impl="reference" to use it',
        '    cpu        available; pass impl="cpu" to use it',
        "    cuda       refused: device cpu",
        "    triton     refused: device cpu",
        "    details: python -m hotloop info",
    ]


def test_no_impl_at_all() -> None:
    with pytest.raises(NotImplementedError) as caught:
        choose("auto", {"cuda": impl.on_cuda})
    lines = str(caught.value).splitlines()
    assert lines[0] == "[some_op] no implementation fits x (2,) float32 on cpu:"
    assert "    cpu        refused: this op has none" in lines


@by_op
def test_a_forced_impl_never_falls_back(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name in ("triton", "cuda"):
        monkeypatch.setenv("HOTLOOP_IMPL", name)
        with pytest.raises(NotImplementedError, match=rf"\[{op}\] .* with impl='{name}'"):
            CALLS[op]()


def test_log_is_silent_by_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="hotloop"):
        linear_logprob(H, W, Y)
    assert caplog.records == []


def test_log_names_the_op_the_impl_and_the_sizes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOTLOOP_LOG", "1")
    with caplog.at_level(logging.INFO, logger="hotloop"):
        linear_logprob(H, W, Y)
    assert caplog.messages == ["linear_logprob impl=cpu hidden=(2, 3) vocabulary=5"]
    assert caplog.records[0].name == "hotloop"


def test_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.workspace_bytes() == 64 * 2**20
    monkeypatch.setenv("HOTLOOP_WORKSPACE_MB", "0.5")
    assert environment.workspace_bytes() == 2**19
    for bad in ("0", "-1", "many", "nan"):
        monkeypatch.setenv("HOTLOOP_WORKSPACE_MB", bad)
        with pytest.raises(
            ValueError, match=rf"HOTLOOP_WORKSPACE_MB: expected a number of MiB > 0, got '{bad}'"
        ):
            environment.workspace_bytes()
