# SPDX-License-Identifier: Apache-2.0
"""The committed stubs are what the built modules give."""

from __future__ import annotations

import pytest
from processes import python

pytestmark = [pytest.mark.source]


def test_stubs_are_those_of_the_built_modules() -> None:
    pytest.importorskip("pybind11_stubgen")
    done = python("tools/write_stubs.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
