# SPDX-License-Identifier: Apache-2.0
"""What the documents say of speed and memory comes from rows of commits that anybody can check out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hotloop import catalog
from hotloop._catalog import rooms
from test_run_tests import ROOT, load

pytestmark = pytest.mark.source
write_docs = load("write_docs")


def row(impl: str, role: str, us: float, **more: Any) -> dict[str, Any]:
    return {
        "op": "logprob.linear_logprob", "impl": impl, "role": role, "mode": "fwd+bwd", "label": "25% masked",
        "shape": [4096, 768, 32000], "dtype": "bfloat16", "median_us": us, "peak_mb": us / 10, "ratios": {},
        "device": "a machine", "threads": 2, "versions": {"torch": "2.13.0"}, "commit": "0123456789ab",
        "order_seed": 0, "time": "2026-01-02T00:00:00+00:00", **more,
    }  # fmt: skip


def rows() -> list[dict[str, Any]]:
    ratios = {"torch": [0.5], "cce torch_compile": [1.25], "roof": [3.0], "four products": [2.0]}
    return [
        row("hotloop cpu", "ours", 1500.0, ratios={k: [*v, v[0], v[0]] for k, v in ratios.items()}),
        row("torch", "plain", 3000.0),
        row("cce torch_compile", "rival", 1200.0),
        row("roof", "roof", 500.0),
        row("four products", "floor", 750.0),
    ]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(write_docs, "RESULTS", tmp_path)
    monkeypatch.setattr(write_docs, "ROOT", tmp_path)
    return tmp_path


def write(path: Path, found: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(x) + "\n" for x in found))


@pytest.mark.parametrize("commit", ["0123456789ab-dirty", "unknown", ""])
@pytest.mark.parametrize("name", ["cpu.jsonl", "memory.jsonl", "gpu.jsonl"])
def test_rows_of_a_changed_tree_are_refused(results: Path, name: str, commit: str) -> None:
    write(results / name, [*rows(), row("trl", "rival", 1.0, commit=commit)])
    with pytest.raises(SystemExit, match=rf"\[docs\] {name}: expected rows of clean commits, got "):
        write_docs.rows_of(name)
    write(results / name, rows())
    assert write_docs.rows_of(name) == rows()


def test_every_row_names_its_nearest_rival_with_memory_and_the_worst_row_is_said(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(results / "cpu.jsonl", rows())
    text = write_docs.results()
    assert "| 1.5 ms | 150 MB | cce torch_compile 0.80, 120 MB |" in text
    assert (
        "The worst row: 0.80 for cce torch_compile, `logprob.linear_logprob, 25% masked`, "
        "4096 x 768 x 32000, bfloat16." in text
    )
    assert "an order drawn anew" in text
    case = ("logprob.linear_logprob", "25%", [4096, 768, 32000])
    monkeypatch.setattr(write_docs, "HIGHLIGHTS", (case, ("logprob.linear_kl", "", [1])))
    assert (
        "| `logprob.linear_logprob, 25% masked` | 4096 x 768 x 32000 bfloat16 | 1.5 ms, 150 MB "
        "| cce torch_compile 0.80, 120 MB | 2.00, 300 MB |" in write_docs.highlights()
    )
    write(results / "cpu.jsonl", [{**r, "order_seed": None} for r in rows()])
    assert "No rows of a clean commit yet" in write_docs.results()
    assert "bench/remeasure.sh" in write_docs.page_results("decode")


def test_a_run_on_a_gpu_is_believed_only_with_a_row_of_it(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_docs.proved()
    assert "| `dpo_loss` | tested | tested | compiled | - |" in write_docs.coverage()
    assert "| `linear_logprob` | tested | tested | - | interpreted |" in write_docs.coverage()
    monkeypatch.setitem(write_docs.STATUS, "preference.dpo_loss", {"cuda": "run on NVIDIA H200"})
    text = write_docs.coverage()
    assert "| `dpo_loss` | tested | tested | run on NVIDIA H200 | - |" in text
    assert "| `ipo_loss` | tested | tested | compiled | - |" in text
    others = sum("cuda" in op.impls for op in catalog() if op.room == "preference") - 1
    assert f"1 run on NVIDIA H200, {others} compiled" in write_docs.rooms_table()
    missing = r"\[docs\] STATUS .*: expected a row of cuda in preference.dpo_loss in .*gpu.jsonl, got none"
    with pytest.raises(SystemExit, match=missing):
        write_docs.proved()
    for impl, op in (
        ("hotloop cuda", "preference.dpo_loss_2"),
        ("hotloop cpu", "preference.dpo_loss"),
    ):
        write(results / "gpu.jsonl", [row(impl, "ours", 1.0, op=op)])
        with pytest.raises(SystemExit, match=missing):
            write_docs.proved()
    write(results / "gpu.jsonl", [row("hotloop cuda", "ours", 1.0, op="preference.dpo_loss")])
    write_docs.proved()
    monkeypatch.setitem(write_docs.STATUS, "preference", {"cuda": "run on NVIDIA H200"})
    write_docs.proved()


def test_every_entry_has_a_row_and_every_room_a_line() -> None:
    text = write_docs.coverage()
    for op in catalog():
        assert text.count(f"\n| `{op.name}` |") == 1
    for room in rooms():
        assert f"\n## {room}\n" in text
        assert f"\n| `hotloop.{room}` | " in write_docs.rooms_table()


def test_the_results_that_are_committed_are_clean() -> None:
    for path in (ROOT / "bench" / "results").glob("*.jsonl"):
        if path.name != "growth_pause.jsonl":
            assert write_docs.rows_of(path.name)


def test_the_remeasurement_that_the_error_names_is_there() -> None:
    assert (ROOT / write_docs._REMEASURE).exists()


def test_the_table_of_memory(results: Path) -> None:
    assert "No rows of a clean commit yet" in write_docs.memory()
    write(results / "memory.jsonl", [r for r in rows() if r["role"] in ("ours", "plain", "rival")])
    assert (
        "| `logprob.linear_logprob, 25% masked` | 4096 x 768 x 32000 | bfloat16 | 150 MB | 120 MB |  | 300 MB |"
        in write_docs.memory()
    )


def test_the_readme_shows_every_row_that_it_names() -> None:
    assert len(write_docs.highlights().splitlines()) == 2 + len(write_docs.HIGHLIGHTS)
