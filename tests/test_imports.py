# SPDX-License-Identifier: Apache-2.0
"""No circle of imports, neither of files nor of rooms, wherever in a file the import stands."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "python"
pytestmark = pytest.mark.source

LEAST = {"_catalog", "front", "core", "vocabulary"}  # what references may stand on


def modules(root: Path) -> dict[str, Path]:
    found = {}
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.pyi")]):  # stubs: compiled modules
        parts = path.relative_to(root).with_suffix("").parts
        if "kernels" not in parts:  # a link to another wing, which imports nothing of this one
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Files of ours that a file imports: at the top, in functions, and for types only."""
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]

    def named(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in known else source

    tree = ast.parse(path.read_text())
    return {x for node in ast.walk(tree) for x in named(node) if x in known} - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of files each of which reaches every other, sorted."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, open_ = set(), [start]
        while open_:
            for target in graph[open_.pop()] - seen:
                seen.add(target)
                open_.append(target)
        reached[start] = seen
    rings = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(ring) for ring in rings)


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def pairs(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Rooms that import each other."""
    edges = {(room(a), room(b)) for a in graph for b in graph[a] if room(a) != room(b)}
    return {(a, b) for a, b in edges if a < b and (b, a) in edges}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = modules(ROOT)
    return {name: imports(name, path, known) for name, path in known.items()}


def test_no_files_import_each_other(graph):
    assert circles(graph) == []


def test_no_rooms_import_each_other(graph):
    assert pairs(graph) == set()


def test_references_stand_on_no_room(graph):
    """An op may have its reference run; what both give back, and their rules, lie below both."""
    for name in graph:
        if room(name) == "reference":
            others = {room(b) for b in graph[name]} - LEAST - {"reference"}
            if "hotloop.front.declare" in graph[name]:  # names of the bodies that a room declared
                others -= {name.rpartition(".")[2]}
            assert others == set(), name


@pytest.mark.parametrize(
    "line",
    [
        "from .b import x",
        "from . import b",
        "import hotloop.one.b",
        "from hotloop.one import b",
        "def f():\n    from .b import x",
        "if TYPE_CHECKING:\n    from .b import x",
    ],
)
def test_circles_are_found(tmp_path, line):
    (tmp_path / "hotloop" / "one").mkdir(parents=True)
    (tmp_path / "hotloop" / "two").mkdir()
    for name, text in {
        "__init__": "",
        "one/__init__": "from .a import y",
        "one/a": line,
        "one/b": "from ..two import c",
        "two/__init__": "",
        "two/c": "def g():\n    from ..one.a import y",
    }.items():
        (tmp_path / "hotloop" / f"{name}.py").write_text(text)
    known = modules(tmp_path)
    made = {name: imports(name, path, known) for name, path in known.items()}
    assert circles(made) == [["hotloop.one.a", "hotloop.one.b", "hotloop.two.c"]]
    assert pairs(made) == {("one", "two")}
