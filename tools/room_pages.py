# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: the README and a page for every room, and the check that every op of the catalogue is on one."""

from __future__ import annotations

import importlib
import re
import zlib
from pathlib import Path
from typing import Any

from hotloop import _catalog
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FROM_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "SECURITY.md": "SECURITY.md",
}


def on_files(files: Files, config: Any) -> Files:
    texts = {page: (ROOT / name).read_text() for name, page in FROM_ROOT.items()}
    for room in _catalog.rooms():
        module = importlib.import_module(f"hotloop.{room}")
        names = dict.fromkeys(op.name.partition(".")[0] for op in _catalog.of_room(room))
        for (
            name
        ) in names:  # mkdocstrings sees what a module holds, not what it loads when first asked for
            setattr(module, name, getattr(module, name))
        sections = [f"# {module.__name__}", *(f"::: {module.__name__}.{name}" for name in names)]
        texts[f"api/{room}.md"] = "\n\n".join(sections)
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository as links of the pages: docs is their root; of a source file the name stays."""

    def moved(link: re.Match[str]) -> str:
        path = link[2].removeprefix("../").removeprefix("docs/")
        path = FROM_ROOT.get(path, path)
        return f"[{link[1]}]({path}{link[3] or ''})" if path.endswith(".md") else link[1]

    nested = "/" in page.file.src_uri
    return markdown if nested else re.sub(r"\[([^\]]+)\]\(([\w./-]+)(#[^)]*)?\)", moved, markdown)


def on_post_build(config: Any) -> None:
    """Fail where an op has no entry in the inventory of what the pages document."""
    inventory = Path(config["site_dir"], "objects.inv").read_bytes()
    entries = zlib.decompress(inventory.split(b"\n", 4)[4]).decode().splitlines()
    found = {entry.partition(" ")[0] for entry in entries}
    wanted = {f"hotloop.{op.full_name}" for op in _catalog.catalog()}
    if missing := sorted(wanted - found):
        raise SystemExit(f"no page documents {', '.join(missing)}")
