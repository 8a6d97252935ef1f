"""The code in docs/decode.md runs, and its table of ops names what there is."""

import re
from pathlib import Path

import hotloop.decode
import pytest

pytestmark = pytest.mark.source
TEXT = (Path(__file__).resolve().parent.parent.parent / "docs" / "decode.md").read_text()


def test_every_block_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/decode.md", "exec"), {})


def test_every_function_named_exists():
    for name in re.findall(r"^\| `(\w+)` \|", TEXT, re.M):
        assert callable(getattr(hotloop.decode, name)), name
