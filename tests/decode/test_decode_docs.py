"""The table of ops in docs/decode.md names what there is."""

import re
from pathlib import Path

import hotloop.decode
import pytest

pytestmark = pytest.mark.source
TEXT = (Path(__file__).resolve().parent.parent.parent / "docs" / "decode.md").read_text()


def test_every_function_named_exists():
    for name in re.findall(r"^\| `(\w+)` \|", TEXT, re.M):
        assert callable(getattr(hotloop.decode, name)), name
