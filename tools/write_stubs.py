# SPDX-License-Identifier: Apache-2.0
"""Write the type stubs of the compiled modules, hotloop/_core/*.pyi and hotloop/_cuda/*.pyi, from the modules as built.

``python tools/write_stubs.py`` writes, ``--check`` only compares and exits 1 on a difference. A module that was not
built is left alone. pybind11-stubgen reads the signatures; ruff formats them.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "hotloop"
SETTINGS = ROOT / "pyproject.toml"
MODULES = ("_core", "_cuda")
# pybind11 refuses a float where an int is due, whatever SupportsInt says; mypy wants to know what a tuple holds. Names
# without their module leave room for a signature in one line.
EXACT = {
    r"typing\.SupportsInt \| typing\.SupportsIndex": "int",
    r"typing\.SupportsFloat \| typing\.SupportsIndex": "float",
    r"typing\.Annotated\[(.*?), \"FixedSize\(\d+\)\"\]": r"\1",
    r"(?:typing|collections\.abc)\.(?=[A-Z])": "",
    r"^import collections\.abc$": "from collections.abc import Callable, Sequence",
    r"^import typing$": "from typing import Any",
    r"(?<=: |> )tuple\b(?!\[)": "tuple[Any, ...]",
    r"(?<=: )Callable(?!\[)": "Callable[..., Any]",
    r"(?<=: |> )list\b(?!\[)": "list[Any]",
    r"(?<=: |> )dict\b(?!\[)": "dict[str, Any]",
    r"^__all__: list\[str\] = .*\n": "",
    r"^from \. import (\w+)$": r"from . import \1 as \1",
}
LICENCE = "# SPDX-License-Identifier: Apache-2.0"


def generated(module: str) -> dict[str, str]:
    """File name -> text of the stubs of ``hotloop.<module>``."""
    with tempfile.TemporaryDirectory() as folder:
        run = [sys.executable, "-m", "pybind11_stubgen", "--exit-code", "-o", folder]
        subprocess.run([*run, f"hotloop.{module}"], check=True, capture_output=True)
        files = sorted((Path(folder) / "hotloop" / module).glob("*.pyi"))
        for file in files:
            text = file.read_text(encoding="utf-8")
            for written, exact in EXACT.items():
                text = re.sub(written, exact, text, flags=re.M)
            file.write_text(f"{LICENCE}\n{text}", encoding="utf-8")
        for words in (["check", "--fix-only"], ["format"]):
            ruff = [sys.executable, "-m", "ruff", *words, "-q", "--config", str(SETTINGS), folder]
            subprocess.run(ruff, check=True)
        return {file.name: file.read_text(encoding="utf-8") for file in files}


def differing(check: bool) -> list[Path]:
    """The committed files that are not what the built modules give, rewritten unless ``check``."""
    found = []
    for module in MODULES:
        spec = importlib.util.find_spec(f"hotloop.{module}")
        if spec is None or spec.origin is None:  # not built; None: the folder of its stubs alone
            continue
        folder = PACKAGE / module
        texts = generated(module)
        for old in folder.glob("*.pyi"):
            if old.name not in texts:
                found.append(old)
                if not check:
                    old.unlink()
        for name, text in texts.items():
            file = folder / name
            if file.exists() and file.read_text(encoding="utf-8") == text:
                continue
            found.append(file)
            if not check:
                folder.mkdir(exist_ok=True)
                file.write_text(text, encoding="utf-8")
    return found


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    found = differing(check)
    for file in found:
        print(
            f"{file}: {'not what the built module gives; run `make stubs`' if check else 'written'}"
        )
    return 1 if check and found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
