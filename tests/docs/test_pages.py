# SPDX-License-Identifier: Apache-2.0
"""The Python of the README and of every page of docs runs: each page from top to bottom, in one namespace.

What a page needs and its reader does not is in invisible blocks, ``<!-- invisible-code-block: python ... -->``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

pytestmark = pytest.mark.source
ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    page
    for page in (ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "```python\n" in page.read_text(encoding="utf-8")
]  # fmt: skip


def run(page: Path) -> Document:
    document = Document.parse(str(page), PythonCodeBlockParser())
    for example in document:
        example.evaluate()
    return document


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    assert len(list(run(page))) >= page.read_text(encoding="utf-8").count("```python\n")


def test_before_and_after_of_the_readme_have_the_same_gradients() -> None:
    torch.manual_seed(0)
    found = run(ROOT / "README.md").namespace
    leaves = (found["hidden"], found["lm_head"])
    for before, after in zip(*(torch.autograd.grad(found[n], leaves) for n in ("before", "after"))):
        assert float(before.abs().max()) > 0
        torch.testing.assert_close(after, before)


def test_a_block_that_fails_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("text\n\n```python\nx = 1\n```\n\nmore\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError):
        run(page)


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")], ids=lambda p: p.name
)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target
