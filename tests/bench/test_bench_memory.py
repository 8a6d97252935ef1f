# SPDX-License-Identifier: Apache-2.0
"""Peak memory counts what stays between steps, for ours as for any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hotloop.front import buffers as kept
from processes import printed
from torch import Tensor

from bench import __main__ as command
from bench import _memory, _peaks
from bench._case import Bench, Case, Contender, Inputs, Missing
from bench._options import Options
from bench.logprob import linear_cross_entropy

Make = Callable[..., Case]
MIB = 2**20


def with_a_workspace(inputs: Inputs) -> Tensor:
    """Takes 40 MiB from what hotloop keeps between steps, writes them, and gives them back."""
    buffer = kept.workspace.take(40 * MIB)
    buffer.fill_(1)
    kept.workspace.give(buffer)
    x: Tensor = inputs["x"]
    return x.square().sum()


def test_a_workspace_that_stays_between_steps_counts(make_case: Make) -> None:
    contender = Contender("hotloop cpu", "ours", with_a_workspace)
    peak = _memory._cpu(make_case(contender), contender)
    kept.workspace.take(0)
    if peak is None:
        pytest.skip("the peak of the resident size cannot be reset here")
    assert 38 * MIB / 1e6 <= peak[0] <= 60 * MIB / 1e6


def test_peaks_are_printed_and_kept(
    make_case: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def peak(case: Case, contender: Contender, options: Options) -> _memory.Peak | None:
        return {"torch": (30.0, 20.0), "hotloop cpu": (12.5, 2.5)}.get(contender.name)

    monkeypatch.setattr(_memory, "peak", peak)
    ours = Contender("hotloop cpu", "ours", with_a_workspace)
    more = (ours, Contender("rival", "rival", with_a_workspace), Missing("other", "not there"))
    case = make_case(*more, Contender("floor", "floor", with_a_workspace))
    monkeypatch.setattr(
        "bench._registry.select", lambda op: [Bench("toy.square", "", lambda options: [case])]
    )
    out = tmp_path / "memory.jsonl"
    for _ in range(2):
        assert command.main(["memory", "toy.square", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "12.5 MB" in printed
    assert "without rival: its step failed" in printed
    assert "without other: not there" in printed
    rows = _peaks.read(out)
    assert [(row["impl"], row["peak_mb"]) for row in rows] == [
        ("torch", 30.0),
        ("hotloop cpu", 12.5),
    ]
    assert all(tuple(row) == _peaks.FIELDS for row in rows)


def test_a_head_takes_its_gradients_and_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of 2048 x 20000 in bfloat16 are 82 MB; ours takes 8 MiB of them at a time, and 3 MB of gradients."""
    monkeypatch.setenv("HOTLOOP_WORKSPACE_MB", "8")
    case = linear_cross_entropy._case("cpu", "bfloat16", (2048, 64, 20000), masked=0.0)
    ours = next(c for c in case.contenders if isinstance(c, Contender) and c.role == "ours")
    threads = torch.get_num_threads()
    peak = _memory._cpu(replace(case, threads=1), ours)
    torch.set_num_threads(threads)
    kept.workspace.take(0)
    if peak is None:
        pytest.skip("the peak of the resident size cannot be reset here")
    gradients = 2 * (2048 * 64 + 20000 * 64) / 1e6
    assert 8 * MIB / 1e6 < peak[0] - gradients < 24


@pytest.mark.slow
def test_without_products_the_peak_is_the_same() -> None:
    """Zeros in the place of products: what is allocated is what it was, and so are the pages that are touched."""
    script = (
        "import sys; from bench import _memory; from bench.logprob import linear_cross_entropy as bench;"
        "case = bench._case('cpu', 'float32', (2048, 64, 20000), masked=0.0);"
        "named = {c.name: c for c in case.contenders};"
        "_memory.report(case, named[sys.argv[1]], sys.argv[2] == 'yes')"
    )
    for name in ("hotloop cpu", "torch"):
        peaks = []
        for products in ("yes", "no"):
            said = printed(script, name, products, **_memory._ALLOCATOR)
            answer = json.loads(said.splitlines()[-1])
            if answer is None:
                pytest.skip("the peak of the resident size cannot be reset here")
            peaks.append(answer[0])
        assert peaks[1] == pytest.approx(peaks[0], rel=0.03, abs=3)
