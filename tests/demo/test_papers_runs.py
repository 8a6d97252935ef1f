# SPDX-License-Identifier: Apache-2.0
"""The comparisons of models for docs/fidelity.md: they run, go on where they were, and the page says what runs say."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from examples.papers import momentum_smoe, runs, sparse_decoder

pytestmark = pytest.mark.source
TINY = {
    "momentum_smoe": dataclasses.replace(
        momentum_smoe.Sizes(), width=16, layers=2, heads=2, experts=4, hidden=16, context=32, batch=2,
        steps=20, windows=8,
    ),
    "sparse_decoder": dataclasses.replace(
        sparse_decoder.Sizes(), seconds=0.5, width=32, layers=2, heads=2, ngram_rows=64, context=32, batch=4,
        windows=4, experts=4, hidden=32,
    ),
}  # fmt: skip
ALL = {module.COMPARISON.name: module.COMPARISON for module in (momentum_smoe, sparse_decoder)}
TEXT = b"def alpha(beta):\n    return beta + gamma[0]  # delta\n" * 200
KNOWS_NOTHING = 5.6
"""A little above log(256), nats per byte."""


@pytest.fixture(params=ALL)
def small(request: pytest.FixtureRequest) -> runs.Comparison:
    return dataclasses.replace(ALL[request.param], sizes=TINY[request.param])


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_finished_run_is_kept_and_others_are_made(
    small: runs.Comparison, tmp_path: Path, python_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--text", str(python_folder), "--out", str(tmp_path), "--quiet", "--seeds", "1"]
    assert small.main([*arguments, "--kinds", small.kinds[0]]) == 0
    first = (tmp_path / "runs.jsonl").read_text()
    assert small.main(arguments) == 0
    assert (tmp_path / "runs.jsonl").read_text().startswith(first)
    found = lines(tmp_path / "runs.jsonl")
    assert [run["kind"] for run in found] == list(small.kinds)
    for run in found:
        assert 0 < run["curve"][-1][1] < min(KNOWS_NOTHING, run["curve"][0][1])
    shown = capsys.readouterr().out
    assert all(f"| {kind} |" in shown for kind in small.kinds)
    assert (tmp_path / "table.md").read_text().rstrip() in shown
    assert (tmp_path / "curves.svg").read_text().startswith("<?xml")

    other = dataclasses.replace(small, sizes=dataclasses.replace(small.sizes, mu=0.5))
    assert other.main([*arguments, "--kinds", "momentum"]) == 0
    assert len(lines(tmp_path / "runs.jsonl")) == len(small.kinds) + 1
    assert f"| {small.kinds[0]} |" not in capsys.readouterr().out  # it has other sizes


def test_too_little_text_is_said(
    small: runs.Comparison, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("short")
    assert small.main(["--text", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "too little text" in capsys.readouterr().err


def test_publishing_changes_the_table_and_nothing_else_of_the_page(
    small: runs.Comparison, tmp_path: Path, python_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "DOCS", tmp_path)
    page = f"# Head\n\n<!-- {small.name}:start -->\nold\n<!-- {small.name}:end -->\n\ntail\n"
    (tmp_path / "fidelity.md").write_text(page)
    arguments = ["--text", str(python_folder), "--out", str(tmp_path / "out"), "--quiet"]
    assert small.main([*arguments, "--seeds", "1", "--page"]) == 0
    before, table, after = runs.section((tmp_path / "fidelity.md").read_text(), small.name)
    assert (before + "old" + after) == page
    assert table == small.table(lines(tmp_path / "fidelity" / f"{small.name}.jsonl"))
    assert (tmp_path / "fidelity" / f"{small.name}.svg").exists()


@pytest.mark.parametrize("name", ALL)
def test_the_page_says_what_the_runs_say(name: str) -> None:
    page = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
    assert f"python -m examples.papers.{name}" in page
    table = runs.section(page, name)[1]
    file = ROOT / "docs" / "fidelity" / f"{name}.jsonl"
    if not file.exists():
        assert not re.search(r"\d", table)  # no number without a run
        return
    found = lines(file)
    assert table == ALL[name].table(found)
    assert all(run["sizes"] == dataclasses.asdict(ALL[name].sizes) for run in found)
    seeds = len(found) // len(ALL[name].kinds)
    assert seeds >= 2
    assert sorted((run["kind"], run["seed"]) for run in found) == sorted(
        (kind, seed) for kind in ALL[name].kinds for seed in range(seeds)
    )
    assert (file.parent / f"{name}.svg").exists()


def test_momentum_of_nothing_is_the_plain_decoder() -> None:
    """With mu = 0 and gamma = -1, to the last bit."""
    tokens = torch.randint(1, 256, (2, 8), generator=torch.Generator().manual_seed(0))
    sizes = dataclasses.replace(TINY["momentum_smoe"], mu=0.0, gamma=-1.0)
    found = []
    for kind in ("smoe", "momentum"):
        torch.manual_seed(0)
        found.append(momentum_smoe.Decoder(kind, sizes)(tokens)[0])
    assert torch.equal(*found)
    small = dataclasses.replace(TINY["sparse_decoder"], mu=0.0, gamma=-1.0)
    other = [sparse_decoder.made(kind, small, 0) for kind in ("sparse", "momentum")]
    assert torch.equal(*(model.losses(tokens)[0] for model in other))  # type: ignore[operator]


def test_a_layer_is_that_of_the_released_code() -> None:
    """Written out, with every expert in turn: norms behind the residuals, and a second residual around the first."""
    sizes = dataclasses.replace(TINY["momentum_smoe"], top_k=2)
    x = torch.randn(1, 8, sizes.width, generator=torch.Generator().manual_seed(1))
    for kind in momentum_smoe.KINDS:
        torch.manual_seed(0)
        model = momentum_smoe.Decoder(kind, sizes)
        stream = momentum_smoe.ResidualStream.start(x)
        h, m = x, torch.zeros_like(x)
        for number, layer in enumerate(model.layers):
            stream = layer(stream, model.table[:, :8])
            a = layer.attention_norm(h + layer.attend(h, model.table[:, :8]))
            experts = layer.experts.mixture
            logits, ids = experts.router(a).topk(sizes.top_k)
            (up, up_bias), (down, down_bias) = experts.experts.up, experts.experts.down
            every = [
                (a @ up[e].T + up_bias[e]).relu() @ down[e].T + down_bias[e]
                for e in range(sizes.experts)
            ]
            chosen = torch.stack(every, -2).gather(
                -2, ids[..., None].expand(-1, -1, -1, sizes.width)
            )
            z = (logits.softmax(-1)[..., None] * chosen).sum(-2)
            m = 0.7 * m + z
            if kind == "smoe":
                y = a + z
            elif kind == "adam" and number == 0:
                y = -(0.1 * z) / (0.001 * z.square() + 1e-8).sqrt()
            else:
                y = a - m
            h = layer.norm(a + layer.experts.norm(y))
            torch.testing.assert_close(stream.x, h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("instead", [None, b"AAA"])
def test_an_attack_replaces_about_a_tenth_of_the_words_and_nothing_else(
    instead: bytes | None,
) -> None:
    changed = momentum_smoe.attack(TEXT, 0.1, instead)
    before, after = (momentum_smoe.WORD.findall(text) for text in (TEXT, changed))
    differ = sum(a != b for a, b in zip(before, after)) / len(before)
    same = sum(before.count(word) ** 2 for word in set(before)) / len(before) ** 2
    expected = 0.1 * (1 - same) if instead is None else 0.1
    assert len(after) == len(before)
    assert abs(differ - expected) < 4 * (0.1 / len(before)) ** 0.5
    assert set(after) <= {*before, instead}
    assert momentum_smoe.WORD.sub(b"", changed) == momentum_smoe.WORD.sub(b"", TEXT)
    assert momentum_smoe.attack(TEXT, 0.1, instead) == changed
    assert momentum_smoe.attack(TEXT, 0.0, instead) == TEXT


def test_attacks_replace_the_same_words() -> None:
    swapped, masked = (
        momentum_smoe.WORD.findall(momentum_smoe.attack(TEXT, 0.1, instead))
        for instead in (None, b"AAA")
    )
    words = momentum_smoe.WORD.findall(TEXT)
    assert all(m == b"AAA" for w, s, m in zip(words, swapped, masked) if s != w)
