# SPDX-License-Identifier: Apache-2.0
"""A tiny text, tiny settings, and a way to start the program as a user does."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401  torch.compile looks it up in the module that is called conftest
from fixtures import threads

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.learn_from_preferences.settings import Settings  # noqa: E402

TINY = Settings(
    width=32,
    layers=1,
    heads=2,
    ngram_rows=64,
    prompt_bytes=40,
    answer_bytes=56,
    pretrain_steps=60,
    pretrain_batch=8,
    pretrain_lr=1e-2,
    loss_points=3,
    heldout_windows=8,
    rounds=2,
    round_prompts=12,
    answers=4,
    least_gap=0.01,
    pair_batch=8,
    eval_prompts=16,
    eval_answers=2,
    sample_batch=24,
    draft_width=16,
    draft_steps=30,
    serve_prompts=8,
    serve_batch=4,
    measure=False,
    measure_repeats=1,
    large_repeats=1,
    large_rows=512,
    large_width=16,
    large_vocabulary=512,
)

FUNCTION = """def {name}_{n}(self, {a}, {b}):
    {a} = {b}.{name}({a})
    if {a} in self.{name}:
        self.{name}[{n}] = {b}
    {b}.update({a})
    return {a} + {b}


"""
NAMES = ("load", "store", "merge", "split", "count", "close")
WORDS = "the river carries light over stones while old trees watch birds cross quiet water"
ARGUMENTS = ("left", "right", "item", "value", "node")


def python_text(folder: Path, files: int = 12, functions: int = 45) -> Path:
    """A folder of modules that compile."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(files):
        parts = [
            FUNCTION.format(
                name=NAMES[(file + n) % 6], n=n + file, a=ARGUMENTS[n % 5], b=ARGUMENTS[(n + 2) % 5]
            )
            for n in range(functions)
        ]
        (folder / f"module_{file}.py").write_text("".join(parts))
    return folder


def prose_text(folder: Path, files: int = 12, sentences: int = 150) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = WORDS.split()
    for file in range(files):
        lines = [
            " ".join(words[(n * (k + 1) + file) % len(words)] for k in range(9)).capitalize()
            + ".\n"
            for n in range(sentences)
        ]
        (folder / f"page_{file}.txt").write_text("".join(lines))
    return folder


def command(settings: Settings, *arguments: str) -> list[str]:
    """A command line that runs the program with these settings."""
    code = (
        "import json, sys\n"
        "from examples.learn_from_preferences.__main__ import main\n"
        "from examples.learn_from_preferences.settings import Settings\n"
        "sys.exit(main(sys.argv[2:], Settings(**json.loads(sys.argv[1]))))\n"
    )
    return [sys.executable, "-c", code, json.dumps(dataclasses.asdict(settings)), *arguments]


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    """What two runs with one seed must agree on."""
    kept = {
        name: value
        for name, value in report.items()
        if name not in ("seconds", "machine", "resumed", "head")
    }
    kept["serving"] = {
        name: {k: v for k, v in facts.items() if "second" not in k}
        if isinstance(facts, dict)
        else facts
        for name, facts in report["serving"].items()
    }
    kept["curve"] = [
        {name: value for name, value in point.items() if name != "seconds"}
        for point in report["curve"]
    ]
    return kept


# Threads cost more than they give on a model this small, most of all on a busy machine.
one_thread = threads(1)


@pytest.fixture(scope="session")
def python_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return python_text(tmp_path_factory.mktemp("python"))


@pytest.fixture(scope="session")
def prose_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prose_text(tmp_path_factory.mktemp("prose"))
