# SPDX-License-Identifier: Apache-2.0
"""Long files say what they hold, and every page can be found."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.source
ROOT = Path(__file__).resolve().parents[2]
CODE = {".cpp", ".hpp", ".cu", ".cuh"}
LONG = 150
"""Lines of a file from which on it has to open with a comment."""
LEAST = 3
"""Lines of that comment."""


def opening(text: str) -> int:
    """Lines of the comment that a file begins with."""
    lines = text.splitlines()
    return next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))


def test_long_files_open_with_a_comment() -> None:
    files = [
        p for wing in ("csrc", "kernels") for p in (ROOT / wing).rglob("*") if p.suffix in CODE
    ]
    texts = {p.relative_to(ROOT): p.read_text(encoding="utf-8") for p in files}
    long = {p: opening(text) for p, text in texts.items() if len(text.splitlines()) > LONG}
    assert len(long) > 40
    assert not {str(p): lines for p, lines in long.items() if lines < LEAST}


def test_the_opening_of_a_file_is_counted() -> None:
    assert opening("// one\n//\n// three\n#include <a>\n// later\n") == 3
    assert opening("#pragma once\n// late\n") == 0


def links(page: Path) -> set[Path]:
    """Pages that a page leads to."""
    found = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return {(page.parent / target).resolve() for target in found}


def test_every_page_is_reached_from_the_readme() -> None:
    reached, ahead = set(), {ROOT / "README.md"}
    while ahead:
        reached |= ahead
        ahead = set().union(*map(links, ahead)) - reached
    pages = set((ROOT / "docs").rglob("*.md"))
    assert len(pages) > 15
    assert not {str(p.relative_to(ROOT)) for p in pages - reached}
