# SPDX-License-Identifier: Apache-2.0
"""The commands as a user types them, and the parts that need no rival."""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import hotloop
import pytest
import torch
from processes import ROOT, python

import bench
from bench import __main__ as command
from bench import _heads, _options, _registry
from bench._case import Bench, Contender
from bench._check import check
from bench._options import Options
from bench._timing import percentile
from bench.core import pointwise

SCRIPT = ROOT / "bench" / "run_gpu.sh"
QUICK = Options(quick=True)


def test_list_names_every_op() -> None:
    done = python("-m", "bench", "list")
    assert done.returncode == 0, done.stderr
    for op in ("logprob.linear_logprob", "logprob.linear_jsd", "preference.dpo_loss"):
        assert op in done.stdout
    assert len(done.stdout.splitlines()) == len(_registry.benches())


def test_select_takes_ops_rooms_and_globs() -> None:
    assert [b.op for b in _registry.select("logprob.linear_kl")] == ["logprob.linear_kl"]
    assert {b.op.split(".")[0] for b in _registry.select("logprob")} == {"logprob"}
    assert len(_registry.select("all")) == len(_registry.benches())
    assert {b.op for b in _registry.select("*.[di]po_loss")} == {
        "preference.dpo_loss",
        "preference.ipo_loss",
    }
    with pytest.raises(ValueError, match=r"\[bench\] op: expected one of core\..*got 'nothing'"):
        _registry.select("nothing")


def test_an_unknown_op_ends_with_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "nothing"]) == 2
    assert "python -m bench list" in capsys.readouterr().err


def test_options_reach_a_child_process() -> None:
    options = Options(dtype="bfloat16", quick=True, only="a,b", memory=False, seconds=1.5)
    parser = argparse.ArgumentParser()
    _options.add_flags(parser)
    assert _options.from_arguments(parser.parse_args(options.argv())) == options
    assert Options().argv() == []


def test_percentiles_are_those_of_the_standard_library() -> None:
    samples = [3.0, 1.0, 4.0, 1.5, 9.0, 2.6]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    assert percentile(samples, 0.2) == pytest.approx(fifths[0])
    assert percentile(samples, 0.8) == pytest.approx(fifths[3])
    assert percentile(samples, 0.5) == statistics.median(samples)
    assert percentile([2.0], 0.8) == 2.0


@pytest.mark.parametrize("bench", _registry.benches(), ids=lambda bench: bench.op)
def test_ours_and_plain_torch_agree_with_the_reference(bench: Bench) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _agree(bench)
    finally:
        torch.set_num_threads(threads)


def _agree(bench: Bench) -> None:
    if bench.op.startswith("table."):
        pytest.importorskip("hotloop.table", reason="the room of tables is not there")
    for case in bench.cases(QUICK):
        ready = [
            c for c in case.contenders if isinstance(c, Contender) and c.role in ("ours", "plain")
        ]
        assert len(ready) == 2, [c.name for c in case.contenders]
        checked = check(case, ready, case.make_inputs(0))
        assert (checked.broken, checked.disagree) == ({}, {}), case.key


@pytest.mark.parametrize("row", pointwise.rows(), ids=lambda row: row.op)
def test_every_pointwise_loss_agrees_with_its_eager_form(row: pointwise.Row) -> None:
    case = pointwise.case(row, 258, "cpu")
    ready = [c for c in case.contenders if isinstance(c, Contender) and c.role in ("ours", "plain")]
    checked = check(case, ready, case.make_inputs(0))
    assert (checked.broken, checked.disagree) == ({}, {})
    assert set(checked.errors) == {"hotloop cpu", "torch"}


def test_a_file_of_rows_is_all_that_a_new_room_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "rows.py").write_text(
        "from bench.core.pointwise import Row\nROWS = (Row('toy_loss', lambda x: x, ('pc',), quick=True),)"
    )
    monkeypatch.setattr(_registry, "HERE", tmp_path)
    monkeypatch.setattr(bench, "__path__", [*bench.__path__, str(tmp_path)])
    monkeypatch.setattr(hotloop, "toy", None, raising=False)
    (row,) = pointwise.rows()
    (found,) = pointwise.benches()
    assert (row.op, found.op) == ("toy.toy_loss", "toy.toy_loss")
    assert [case.key for case in found.cases(QUICK)] == [
        "toy.toy_loss fwd+bwd 4096 float32",
        "toy.toy_loss fwd+bwd 8 float32",
    ]
    monkeypatch.delitem(sys.modules, "bench.toy.rows")


def test_full_sizes_have_distinct_keys_and_known_rivals_in_targets() -> None:
    for device in ("cpu", "cuda"):
        for each in _registry.benches():
            cases = each.cases(Options(device=device, sweep=True))
            assert len({case.key for case in cases}) == len(cases)
            for case in cases:
                names = {entry.name for entry in case.contenders}
                assert {target.rival for target in case.targets} <= names, case.key


@pytest.mark.parametrize(
    ("how", "share"), [("scattered", 0.25), ("padding", 0.5), ("padding", 0.0)]
)
def test_as_many_labels_are_masked_for_every_seed(how: _heads.Masking, share: float) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        labels = _heads.labels_of(generator, 8, 64, 100, share, how)
        assert int((labels == _heads.IGNORE).sum()) == round(share * 8 * 64)
        if how == "padding":
            masked = (labels == _heads.IGNORE).long()
            assert bool((masked.diff(dim=1) >= 0).all())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_gpu_script_is_well_formed_and_prints_its_steps() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    done = subprocess.run(
        ["bash", str(SCRIPT), "out/none", "--dry-run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    order = (
        "environment", "build", "info", "smoke", "bench-logprob", "bench-dpo", "bench-decode-table",
        "bench-jsd-pairs", "pytest-gpu", "bench-ce", "report", "memcheck", "racecheck",
    )  # fmt: skip
    at = [("\n" + done.stdout).find(f"\n{name} ") for name in order]
    assert -1 not in at
    assert at == sorted(at)
    # Every file with GPU tests is named to pytest, and every op to the benches exists.
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"pytest\.mark\.gpu$|= on_gpu$|mark\.gpu,$", path.read_text(), re.M)
    }
    assert marked == set(re.search(r"pytest (.*?) -m gpu", done.stdout)[1].split())
    for ops in re.findall(r"bench run '([^']*)'", done.stdout):
        assert _registry.select(ops)
    assert not (ROOT / "out" / "none").exists()
    assert subprocess.run(["bash", str(SCRIPT)], capture_output=True, check=False).returncode == 2
