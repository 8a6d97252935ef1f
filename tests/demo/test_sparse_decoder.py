# SPDX-License-Identifier: Apache-2.0
"""The comparison of decoders with and without experts: it runs, goes on where it was, and learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from examples.papers import sparse_decoder
from examples.papers.sparse_decoder import KINDS, Sizes

pytestmark = pytest.mark.source
SMALL = Sizes(
    seconds=0.5, width=32, layers=2, heads=2, ngram_rows=64, context=32, batch=4, windows=4, experts=4, hidden=32
)  # fmt: skip


def text(folder: Path) -> Path:
    """Two files, one of which is held out."""
    line = "the quick brown fox jumps over the lazy dog and comes back again. "
    folder.mkdir()
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"file {i}. " + line * 120)
    return folder


def test_it_runs_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sparse_decoder, "Sizes", lambda: SMALL)
    monkeypatch.setattr(sparse_decoder.Sizes, "seconds", 0.5, raising=False)
    threads = torch.get_num_threads()
    arguments = ["--seconds", "0.5", "--seeds", "1", "--text", str(text(tmp_path / "text"))]
    arguments += ["--out", str(tmp_path / "out")]
    assert sparse_decoder.main(arguments) == 0
    first = (tmp_path / "out" / "runs.jsonl").read_text()
    runs = [json.loads(line) for line in first.splitlines()]
    assert [run["kind"] for run in runs] == list(KINDS)
    assert all(run["heldout"] < 5.6 for run in runs)  # nats per byte of a model that knows nothing
    assert sparse_decoder.main(arguments) == 0
    assert (tmp_path / "out" / "runs.jsonl").read_text() == first
    shown = capsys.readouterr().out
    assert all(f"| {kind} |" in shown for kind in KINDS)
    torch.set_num_threads(threads)


def test_too_little_text_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("short")
    assert sparse_decoder.main(["--text", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "too little text" in capsys.readouterr().err


def test_without_momentum_it_is_the_plain_sparse_decoder() -> None:
    still = dataclasses.replace(SMALL, mu=0.0, gamma=-1.0)
    tokens = torch.randint(1, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    found = [sparse_decoder.made(kind, still, 0).losses(tokens)[0] for kind in KINDS[1:]]  # type: ignore[operator]
    assert torch.equal(*found)
