# SPDX-License-Identifier: Apache-2.0
"""The rules: broken code loses to code that compiles, and no cheap answer wins."""

from __future__ import annotations

import pytest
from conftest import WORDS

from examples.learn_from_preferences.data import Prompt
from examples.learn_from_preferences.judge import LEAST_LINES, ProseJudge, PythonJudge

PROMPT = Prompt(b"import os\n\n    def read(self, path, mode):\n", file=0, indent=4)
TOP = Prompt(b"x = 1\n\ndef read(path, mode):\n", file=0, indent=0)
GOOD = b"""\
        handle = open(path, mode)
        if self.cache:
            self.cache[path] = handle
        return handle.read()

    def next(self):
        pass
"""


def score(answer: bytes, prompt: Prompt = PROMPT) -> float:
    return PythonJudge().score(prompt, answer)


def test_good_body_gets_everything() -> None:
    assert score(GOOD) == 1.0


def test_answer_ends_where_the_function_ends() -> None:
    kept = PythonJudge().kept(PROMPT, GOOD)
    assert GOOD[kept:].startswith(b"    def next")
    assert score(GOOD[:kept]) == score(GOOD) == score(GOOD + b"(((\n")


def test_end_of_file_ends_the_answer() -> None:
    assert score(GOOD[: GOOD.index(b"\n    def")] + b"\0((((\n") == score(GOOD)


def test_incomplete_last_line_is_not_judged() -> None:
    lines = b"    a = path.x\n    b = mode.y\n"
    assert score(lines + b"    c = (((", TOP) == score(lines, TOP) == 2 / LEAST_LINES


@pytest.mark.parametrize(
    ("intact", "broken"),
    [
        (b"open(path, mode)", b"open(path, mode"),
        (b"if self.cache:", b"if self.cache"),
        (b"            self.cache[path]", b"          self.cache[path"),
        (b"        return handle.read()", b"       return handle.read()"),
        (b"handle.read()", b"handle.read(')"),
    ],
)
def test_broken_loses_to_intact(intact: bytes, broken: bytes) -> None:
    assert intact in GOOD
    assert score(GOOD.replace(intact, broken)) < score(GOOD)


def test_later_error_loses_less() -> None:
    lines = [b"    a%d = path.call(%s)\n" % (i, b"mode" * (i + 1)) for i in range(6)]
    scores = []
    for broken in range(6):
        answer = b"".join(b"    (((\n" if i == broken else line for i, line in enumerate(lines))
        scores.append(score(answer, TOP))
    assert scores == sorted(scores)
    assert scores[0] == 0.0
    assert scores[-1] > scores[1]


@pytest.mark.parametrize(
    "cheap",
    [
        b"",
        b"\n\n\n\n",
        b"        pass\n",
        b"        pass\n" * 12,
        b"        # open the file\n        # read it\n        # close it\n",
        b'        """Read the file."""\n',
        b"        ...\n        1\n        None\n        path\n        mode\n",
        b"        a = 1\n        b = 2\n        c = 3\n        d = 4\n",
        b"        import os\n        import sys\n        import re\n        import io\n",
        b"    def next(self):\n        return self.cache\n",
    ],
)
def test_cheap_answers_earn_nothing(cheap: bytes) -> None:
    assert score(cheap) == 0.0


@pytest.mark.parametrize(
    "trick",
    [
        b"        return path\n",
        b"        self.call(path)\n" * 10,
        b"".join(b"        a%d = path\n" % i for i in range(10)),
        b"        return path\n        b = mode.x\n        c = mode.y\n        d = mode.z\n",
        b"        a = path; b = mode; c = path.x; d = mode.x\n",
    ],
)
def test_tricks_earn_no_more_than_one_line(trick: bytes) -> None:
    assert score(trick) <= 1 / LEAST_LINES


def test_repetition_lowers_the_score() -> None:
    body = GOOD[: GOOD.index(b"        return")]
    assert score(body + b"        self.call(path)\n" * 8) < score(
        body + b"        self.call(path)\n"
    )


def test_docstring_counts_neither_way() -> None:
    assert score(b'        """Read.\n\n        All of it.\n        """\n' + GOOD) == score(GOOD)


@pytest.mark.parametrize(
    "odd", [b"\xff\xfe(\n", b"    \\\n", b"    x = '\\d'\n", b"(" * 150 + b"\n", b"\r\n\t\n"]
)
def test_any_bytes_can_be_judged(odd: bytes) -> None:
    assert 0.0 <= score(odd, TOP) <= 1.0


def test_prose_known_different_words_win() -> None:
    judge = ProseJudge([WORDS.encode()] * 12)
    prompt = Prompt(b"Before.\n", file=0)
    good = judge.score(prompt, WORDS.encode() + b" ")
    assert good == 1.0
    assert judge.score(prompt, b"the " * 14) < 0.2
    assert (
        judge.score(prompt, b"thr rivver carreis lihgt ovre stnoes whlie odl teres wacth ") == 0.0
    )
    assert judge.score(prompt, b"the ") < 0.2
    assert judge.score(prompt, b"") == judge.score(prompt, b"\xff\n\n ") == 0.0


def test_prose_last_cut_word_is_not_judged() -> None:
    judge = ProseJudge([WORDS.encode()] * 12)
    prompt = Prompt(b"Before.\n", file=0)
    assert judge.score(prompt, b"the river ca") == judge.score(prompt, b"the river ")
