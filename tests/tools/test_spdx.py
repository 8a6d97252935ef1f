# SPDX-License-Identifier: Apache-2.0
"""The licence line is found where it is, and added once where it is not."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from test_run_tests import load

pytestmark = pytest.mark.source
spdx = load("spdx")
LINE = "SPDX-License-Identifier: Apache-2.0"
FILES = {
    "a.py": ('"""Doc."""\n', f'# {LINE}\n"""Doc."""\n'),
    "b/c.cu": ("int x;\n", f"// {LINE}\nint x;\n"),
    "d.sh": ("#!/bin/sh\nls\n", f"#!/bin/sh\n# {LINE}\nls\n"),
    "Makefile": ("all:\n", f"# {LINE}\nall:\n"),
    "e.py": ("", f"# {LINE}\n"),
    "f.md": ("# text\n", "# text\n"),
    "g.hpp": (f"// {LINE}\n#pragma once\n", f"// {LINE}\n#pragma once\n"),
}


@pytest.mark.parametrize("git", [False, True])
def test_check_and_fix(git: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (text, _) in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if git and shutil.which("git") is None:
        pytest.skip("git is not installed")
    if git:
        subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
        subprocess.run(["git", "add", "a.py"], cwd=tmp_path, check=True)
        (tmp_path / ".gitignore").write_text("ignored.py\n")
        (tmp_path / "ignored.py").write_text("x = 1\n")
    assert spdx.main([], tmp_path) == 1
    told = capsys.readouterr().out.splitlines()
    assert {line.split(":")[0] for line in told} == {"a.py", "b/c.cu", "d.sh", "Makefile", "e.py"}
    assert all(f"expected {LINE} in the first two lines" in line for line in told)
    for _ in range(2):  # fixing twice adds one line
        assert spdx.main(["--fix"], tmp_path) == 0
        assert {n: (tmp_path / n).read_text() for n in FILES} == {
            n: t for n, (_, t) in FILES.items()
        }
    assert spdx.main([], tmp_path) == 0
    assert spdx.main(["nonsense"], tmp_path) == 2
