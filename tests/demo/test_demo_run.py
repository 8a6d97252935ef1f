# SPDX-License-Identifier: Apache-2.0
"""The whole program, small: its report, its picture, and its life after being killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, command, without_times

from examples.learn_from_preferences import evaluate, generate, report, train
from examples.learn_from_preferences.__main__ import main
from examples.learn_from_preferences.data import Prompt

PNG = b"\x89PNG\r\n\x1a\n"


def run(folder: Path, out: Path, *more: str, settings: object = TINY) -> int:
    return main(["--text", str(folder), "--out", str(out), *more], settings)  # type: ignore[arg-type]


@pytest.mark.alone
def test_report_of_a_whole_run(
    tmp_path: Path, python_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(TINY, measure=True)
    out = tmp_path / "deep" / "out"
    assert run(python_folder, out, settings=settings) == 0
    printed = capsys.readouterr().out
    assert "win rate" in printed
    found = json.loads((out / "report.json").read_text())
    assert (out / "report.png").read_bytes()[:8] == PNG
    assert sorted(p.name for p in out.iterdir()) == ["checkpoint.pt", "report.json", "report.png"]

    assert found["finished"] is True
    assert found["settings"] == dataclasses.asdict(settings)
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["torch_threads"] == torch.get_num_threads()
    assert found["machine"]["instruction_set"] in ("baseline", "avx2", "avx512")
    curve = found["curve"]
    assert curve[0]["heldout"] > found["heldout_loss"]["before_feedback"] > 0
    assert [point["phase"] for point in curve].count("pairs") == settings.rounds
    feedback = found["feedback"]
    low, high = feedback["interval_95"]
    assert 0 <= low <= feedback["win_rate"] <= high <= 1
    assert feedback["prompts"] == settings.eval_prompts
    assert len(found["rounds"]) == settings.rounds
    assert all(round_["pairs"] > 0 for round_ in found["rounds"])
    assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= set(
        found["rounds"][0]["second_half"]
    )
    assert len(found["head"]) == 4
    for case in found["head"]:
        ours, plain = case["hotloop"], case["torch"]
        assert ours["median_ms"] > 0
        assert plain["median_ms"] > 0
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-2)

    start = time.monotonic()
    assert run(python_folder, out, settings=settings) == 0
    again = capsys.readouterr().out
    assert "finished before" in again
    assert time.monotonic() - start < 5
    assert json.loads((out / "report.json").read_text()) == found

    other = dataclasses.replace(settings, seed=1)
    assert run(python_folder, out, settings=other) == 2
    sentence = capsys.readouterr().err
    assert "it holds a run with other settings or another text" in sentence
    assert json.loads((out / "report.json").read_text()) == found


def test_prose_is_judged_by_its_own_rule(tmp_path: Path, prose_folder: Path) -> None:
    settings = dataclasses.replace(TINY, pretrain_steps=20, rounds=1)
    assert run(prose_folder, tmp_path / "out", "--quiet", settings=settings) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["text"]["kind"] == "prose"
    assert "words" in found["rule"]


def test_quiet_prints_nothing(
    tmp_path: Path, python_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = dataclasses.replace(TINY, pretrain_steps=5, rounds=0)
    assert run(python_folder, tmp_path, "--quiet", settings=settings) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_killed_runs_end_like_an_uninterrupted_one(tmp_path: Path, python_folder: Path) -> None:
    settings = dataclasses.replace(TINY, checkpoint_seconds=0.0)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    text = ("--text", str(python_folder), "--quiet")
    subprocess.run(command(settings, *text, "--out", str(whole)), check=True, env=environment)

    chooser = random.Random(0)
    kills = 0
    for _ in range(40):
        process = subprocess.Popen(
            command(settings, *text, "--out", str(cut)), env=environment, stderr=subprocess.PIPE
        )
        if kills < 4:
            _wait_for_progress(process, cut / "checkpoint.pt")
            time.sleep(chooser.uniform(0.0, 0.25))
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=120)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
        kills += 1
    assert kills >= 2
    expected = json.loads((whole / "report.json").read_text())
    found = json.loads((cut / "report.json").read_text())
    assert found["resumed"] >= 1
    assert without_times(found) == without_times(expected)


def _wait_for_progress(process: subprocess.Popen[bytes], path: Path) -> None:
    """Until this process has written a checkpoint of its own."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.stat().st_mtime_ns != before:
            return
        time.sleep(0.01)


def test_unfinished_run_with_other_settings_is_refused(
    tmp_path: Path,
    python_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = dataclasses.replace(TINY, pretrain_steps=5, rounds=0)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(report, "build", stop)
        assert run(python_folder, tmp_path, "--quiet", settings=settings) == 130
    assert "Start it again to go on" in capsys.readouterr().err
    other = dataclasses.replace(settings, pretrain_steps=6)
    assert run(python_folder, tmp_path, "--quiet", settings=other) == 2
    assert "other settings or another text" in capsys.readouterr().err
    assert run(python_folder, tmp_path, "--quiet", "--restart", settings=other) == 0
    assert json.loads((tmp_path / "report.json").read_text())["settings"]["pretrain_steps"] == 6


def test_cached_steps_equal_the_whole_sequence() -> None:
    model = train.new_model(dataclasses.replace(TINY, layers=2))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
        tokens = torch.randint(0, 256, (3, 40), generator=torch.Generator().manual_seed(0))
        whole = model(tokens)
        cache = model.new_cache(3, 40)
        parts = [model(tokens[:, :20], cache)]
        parts += [model(tokens[:, :end], cache) for end in range(21, 41)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_future_bytes_do_not_reach_the_past() -> None:
    model = train.new_model(TINY)
    tokens = torch.randint(0, 256, (1, 32), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 256
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :20], model(changed)[:, :20])


def test_same_call_same_answers() -> None:
    model = train.new_model(TINY)
    prompts = [Prompt(bytes([65 + i]) * TINY.prompt_bytes, 0) for i in range(3)]
    first = generate.answers(model, prompts, TINY, 5)
    torch.manual_seed(123)
    assert generate.answers(model, prompts, TINY, 5) == first
    assert generate.answers(model, prompts, TINY, 6) != first
    assert {len(answer) for answer in first} == {TINY.answer_bytes}


def test_win_rate_and_interval() -> None:
    old = np.array([[0.0, 0.5], [0.2, 0.2]])
    assert evaluate.win_rates(old, old) == pytest.approx([0.5, 0.5])
    assert evaluate.win_rates(old, old + 1) == pytest.approx([1.0, 1.0])
    assert evaluate.win_rates(old, old[:, :1]) == pytest.approx([0.25, 0.5])

    # 400 values in 400 files against the same values in 20 files: fewer files, wider interval.
    generator = np.random.default_rng(0)
    values = np.repeat(generator.random(20), 20)
    low, high = evaluate.interval(values, np.arange(400), seed=1)
    assert low < values.mean() < high
    wide_low, wide_high = evaluate.interval(values, np.repeat(np.arange(20), 20), seed=1)
    assert wide_high - wide_low > 2 * (high - low)
