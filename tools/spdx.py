# SPDX-License-Identifier: Apache-2.0
"""Every source file names its licence in its first lines: this script checks it, and ``--fix`` adds what is missing.

The line stands first, or second below ``#!``. Files are those that git does not ignore, or all of a tree without git.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINE = "SPDX-License-Identifier: Apache-2.0"
COMMENTS = {
    **dict.fromkeys((".py", ".pyi", ".sh", ".cmake", ".toml", ".cff"), "# "),
    **dict.fromkeys((".cpp", ".hpp", ".cu", ".cuh"), "// "),
}
NAMES = {"CMakeLists.txt": "# ", "Makefile": "# ", "run": "# "}  # run: .ci/run


def sources(root: Path) -> list[Path]:
    if (root / ".git").exists():
        words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout
        paths = [root / name for name in listed.split("\0") if name]
    else:
        paths = [Path(folder) / name for folder, _, names in os.walk(root) for name in names]
    return [path for path in paths if comment(path) is not None and path.is_file()]


def comment(path: Path) -> str | None:
    return NAMES.get(path.name, COMMENTS.get(path.suffix))


def licensed(path: Path) -> bool:
    with path.open(encoding="utf-8") as file:
        return any(LINE in line for _, line in zip(range(2), file))


def add(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    first, rest = "", text
    if text.startswith("#!"):
        first, _, rest = text.partition("\n")
        first += "\n"
    path.write_text(f"{first}{comment(path)}{LINE}\n{rest}", encoding="utf-8")


def main(arguments: list[str], root: Path = ROOT) -> int:
    if arguments not in ([], ["--fix"]):
        print("usage: spdx.py [--fix]", file=sys.stderr)
        return 2
    missing = [path for path in sources(root) if not licensed(path)]
    for path in missing:
        if arguments:
            add(path)
        else:
            print(
                f"{path.relative_to(root)}: expected {LINE} in the first two lines, got none. Run with --fix."
            )
    return 1 if missing and not arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
