# SPDX-License-Identifier: Apache-2.0
"""Which of two answers is better: rules that can be checked, with no stored answer behind them."""

from __future__ import annotations

import ast
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from .data import Corpus, Prompt

PYTHON_RULE = (
    "The answer is the body of the function whose def line ends the prompt; it ends where a line "
    "is indented no deeper than that def line. Only complete lines count. Of the longest run of "
    "lines from the top that compiles, each line with a statement that does work earns one point: "
    "a compound statement, call, assignment, return, raise or assert that reads at least one name. "
    "Nothing is earned by pass, constants, names alone, statements that read no name, code after "
    "a return or raise in the same block, or a line equal to an earlier one up to digits. The "
    "score is the points divided by the number of lines with statements in that run plus all "
    "lines with code behind it, or by 4 if that is more. Comments, blank lines, the docstring, "
    "imports, try, break and continue count neither way."
)
PROSE_RULE = (
    "The score is the number of different words of the answer that occur in at least two training "
    "files, or three times where there are fewer than ten files, divided by the number of words in "
    "the answer, or by 12 if that is more. A word said twice counts once above the line and twice "
    "below it."
)
LEAST_LINES = 4
LEAST_WORDS = 12

_DIGITS = re.compile(r"\d+")
_WORD = re.compile(r"[^\W\d_]+")
_NEUTRAL = (ast.Try, ast.Break, ast.Continue, ast.Import, ast.ImportFrom, ast.Global, ast.Nonlocal)
_ENDS_BLOCK = (ast.Return, ast.Raise, ast.Break, ast.Continue)


class Judge(Protocol):
    rule: str

    def kept(self, prompt: Prompt, answer: bytes) -> int:
        """Number of bytes of the answer that belong to it; the rest is not judged."""

    def score(self, prompt: Prompt, answer: bytes) -> float:
        """From 0 to 1, more is better."""


def judge_for(corpus: Corpus) -> Judge:
    return PythonJudge() if corpus.kind == "python" else ProseJudge(corpus.train)


class PythonJudge:
    """How much of a function body compiles and does something. See ``PYTHON_RULE``."""

    rule = PYTHON_RULE

    def kept(self, prompt: Prompt, answer: bytes) -> int:
        end = 0
        for line in answer.split(b"\0")[0].splitlines(keepends=True):
            if not line.endswith(b"\n") or _leaves_body(line, prompt.indent):
                break
            end += len(line)
        return end

    def score(self, prompt: Prompt, answer: bytes) -> float:
        body = answer[: self.kept(prompt, answer)].decode("utf-8", "replace")
        lines = [line[prompt.indent :] for line in body.splitlines()]
        header = prompt.text.decode("utf-8", "replace").splitlines()[-1][prompt.indent :]
        for end in range(len(lines), 0, -1):
            function = compiled(header, lines[:end])
            if function is not None:
                break
        else:
            return 0.0
        tail = sum(1 for line in lines[end:] if line.strip() and line.strip()[0] != "#")
        working: set[int] = set()
        counted: set[int] = set()
        for statement, works in _statements(function):
            counted.add(statement.lineno)
            if works:
                working.add(statement.lineno)
        # Line 1 is the def line.
        texts = {_DIGITS.sub("0", lines[number - 2].strip()) for number in working}
        return len(texts) / max(LEAST_LINES, len(counted) + tail)


def _leaves_body(line: bytes, indent: int) -> bool:
    text = line.strip()
    return bool(text) and len(line) - len(line.lstrip(b" ")) <= indent


def compiled(header: str, lines: list[str]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """The function of a def line and its body, or None if that does not compile."""
    source = "\n".join([header, *lines]) + "\n"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            compile(tree, "<answer>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    function = tree.body[0] if len(tree.body) == 1 else None
    return function if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)) else None


def _statements(function: ast.AST) -> Iterator[tuple[ast.stmt, bool]]:
    """Every statement of a body that counts, and whether it does work."""
    yield from _of_block(function.body, alive=True, docstring=True)  # type: ignore[attr-defined]


def _of_block(
    block: list[ast.stmt], *, alive: bool, docstring: bool = False
) -> Iterator[tuple[ast.stmt, bool]]:
    for place, statement in enumerate(block):
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if not (docstring and place == 0 and is_text) and not isinstance(statement, _NEUTRAL):
            yield statement, alive and _works(statement)
        own = isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        for inner in _blocks(statement):
            yield from _of_block(inner, alive=alive, docstring=own)
        alive = alive and not isinstance(statement, _ENDS_BLOCK)


def _blocks(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        yield getattr(statement, name, [])
    for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
        yield part.body


def _works(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Pass):
        return False
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return True
    own = list(_own_nodes(statement))
    if isinstance(statement, ast.Expr) and not any(
        isinstance(node, (ast.Call, ast.Await, ast.Yield, ast.YieldFrom)) for node in own
    ):
        return False
    return any(isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) for node in own)


def _own_nodes(statement: ast.stmt) -> Iterator[ast.AST]:
    """Nodes of a statement without those of the statements inside it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, (ast.stmt, ast.excepthandler, ast.match_case)):
            yield from ast.walk(child)


class ProseJudge:
    """How many known, different words. See ``PROSE_RULE``."""

    rule = PROSE_RULE

    def __init__(self, files: list[bytes]) -> None:
        seen: Counter[str] = Counter()
        many = len(files) >= 10
        for text in files:
            words = _words(text)
            seen.update(set(words) if many else words)
        self.known = {word for word, n in seen.items() if n >= (2 if many else 3)}

    def kept(self, prompt: Prompt, answer: bytes) -> int:
        """Up to the last white space: the word behind it may be cut."""
        text = answer.split(b"\0")[0]
        return max((text.rfind(mark) for mark in (b" ", b"\n", b"\t")), default=-1) + 1

    def score(self, prompt: Prompt, answer: bytes) -> float:
        words = _words(answer[: self.kept(prompt, answer)])
        return len(self.known.intersection(words)) / max(LEAST_WORDS, len(words))


def _words(text: bytes) -> list[str]:
    return _WORD.findall(text.decode("utf-8", "replace").lower())
