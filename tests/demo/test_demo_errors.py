# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with what the user gave: one sentence, and nothing half-written."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from conftest import TINY, prose_text, python_text

from examples.learn_from_preferences import data
from examples.learn_from_preferences.__main__ import main
from examples.learn_from_preferences.settings import DemoError, settings_for


def failing(text: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    code = main(["--text", str(text), "--out", str(out), *more], TINY)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert not out.exists()
    sentence = captured.err.strip()
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


def test_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        failing(tmp_path / "no", tmp_path / "out", capsys)
        == f"--text {tmp_path}/no: no such folder."
    )


def test_a_file_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert "expected a folder, got a file" in failing(tmp_path / "file", tmp_path / "out", capsys)


def test_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    assert "no files in it; expected UTF-8 text" in failing(
        tmp_path / "text", tmp_path / "out", capsys
    )


def test_only_binary_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.bin").write_bytes(b"abc\0def" * 100)
    (text / "b.txt").write_bytes(b"\xff\xfe\xfd" * 100)
    (text / "c.txt").write_bytes(b" \n")
    assert "no text files in it; expected UTF-8 text, found 2 binary, 1 empty" in failing(
        text, tmp_path / "out", capsys
    )


def test_unreadable_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = python_text(tmp_path / "text")

    def refuse(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    assert "the folder cannot be read (Permission denied)" in failing(
        text, tmp_path / "out", capsys
    )


def test_too_little_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = python_text(tmp_path / "text", files=3, functions=5)
    sentence = failing(text, tmp_path / "out", capsys)
    assert "too little text" in sentence
    assert f"at least {data.LEAST_TRAIN_BYTES} bytes to learn from" in sentence
    assert f"{data.LEAST_HELDOUT_BYTES} held out" in sentence


def test_no_places_for_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for file in range(12):
        (text / f"{file}.py").write_text(f"value = other + {file}\n" * 600)
    assert "found 0 functions (def ...:)" in failing(text, tmp_path / "out", capsys)
    for path in text.iterdir():
        path.rename(path.with_suffix(".txt"))
    for path in text.iterdir():
        path.write_text(f"words without an end {path.name[0]} " * 600)
    assert "found 0 ends of sentences" in failing(text, tmp_path / "out", capsys)


def test_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--minutes", "0", "--out", str(tmp_path / "out")])
    assert code == 2
    assert capsys.readouterr().err == "--minutes: expected a number > 0, got 0.\n"
    with pytest.raises(DemoError, match=r"--minutes: expected a number > 0, got -1\."):
        settings_for(-1, 0)
    with pytest.raises(DemoError, match=r"--minutes: expected a number > 0, got nan\."):
        settings_for(float("nan"), 0)


def test_out_cannot_be_written(
    tmp_path: Path, python_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    assert main(["--text", str(python_folder), "--out", str(out), "--quiet"], TINY) == 2
    assert f"--out {out}: cannot be written to" in capsys.readouterr().err


def test_damaged_checkpoint(
    tmp_path: Path, python_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    assert main(["--text", str(python_folder), "--out", str(tmp_path), "--quiet"], TINY) == 2
    sentence = capsys.readouterr().err
    assert "the checkpoint cannot be read" in sentence
    assert "Pass --restart to begin anew." in sentence


def test_binary_files_are_skipped_and_counted(tmp_path: Path) -> None:
    text = python_text(tmp_path / "text")
    (text / "a.bin").write_bytes(b"abc\0def")
    (text / "notes.txt").write_text("not Python")
    corpus = data.load(text, TINY)
    assert corpus.kind == "python"
    assert corpus.skipped == {"binary": 1, "not Python": 1}


def test_kind_is_chosen_by_bytes(tmp_path: Path) -> None:
    text = prose_text(tmp_path / "text")
    (text / "one.py").write_text("x = 1\n")
    assert data.load(text, TINY).kind == "prose"


def test_text_beyond_the_limit_is_left_out(python_folder: Path) -> None:
    whole = data.load(python_folder, TINY)
    size = sum(map(len, whole.train)) + sum(map(len, whole.heldout))
    limited = dataclasses.replace(TINY, most_text_bytes=size * 3 // 4)
    assert data.load(python_folder, limited).skipped["beyond the size limit"] > 0


def test_copies_are_not_on_both_sides(tmp_path: Path) -> None:
    text = python_text(tmp_path / "text")
    for path in list(text.iterdir()):
        (text / f"copy_of_{path.name}").write_text(path.read_text())
    corpus = data.load(text, TINY)
    assert corpus.skipped == {"copies": 12}
    assert not set(corpus.train) & set(corpus.heldout)


def test_a_tenth_is_held_out() -> None:
    assert data._held_out({"big": 900, "a": 60, "b": 50, "c": 40}) == {"a", "b"}
    assert data._held_out({"only": 900}) == set()
