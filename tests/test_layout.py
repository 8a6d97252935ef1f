# SPDX-License-Identifier: Apache-2.0
"""The rules of the layout that a machine can check: rooms in every wing, dependencies one way, 64-bit indices."""

import ast
import re
from pathlib import Path
from typing import Any

import hotloop
import pytest
from hotloop._catalog import IMPLS
from pointwise_cases import CASES

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.source


def sources(*patterns: str) -> list[Path]:
    found = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert found, patterns
    return found


POINTWISE = {(case.room, case.op) for case in CASES}
# Ops that run through the compiled loop of another room.
BORROWED = {"preference.linear_preference_loss": "logprob"}


def wings(op: Any) -> dict[str, tuple[str, ...]]:
    """By wing, the places of which one has to hold a file for what the entry of the catalogue promises."""
    room, loop = op.room, BORROWED.get(op.full_name, op.room)
    found: dict[str, tuple[str, ...]] = {
        "front": (f"python/hotloop/{room}/__init__.py",),
        "tests": (f"tests/{room}/test_*.py",),
        "reference": tuple(f"python/hotloop/reference/{room}{end}" for end in (".py", "/*.py")),
        "cpu": (f"csrc/{loop}/**/*.cpp",),
        "cuda": (f"kernels/{loop}/*.cu",),
        "triton": (f"kernels/{loop}/[!_]*.py",),
    }
    if (room, op.name) in POINTWISE:
        found |= {
            "tests": (f"tests/{room}/*.py",),
            "head": (f"csrc/{room}/heads.hpp",),
            "cpu": ("csrc/core/room_heads.hpp",),
            "cuda": ("kernels/core/pointwise.cuh",),
            "cases": (f"tests/{room}/cases.py",),
        }
    if room == "core" and op.name.startswith("segment_"):
        found |= {"cpu": ("csrc/core/segments*.cpp",), "cuda": ("kernels/core/segments*.cu",)}
    return {wing: files for wing, files in found.items() if wing in op.impls or wing not in IMPLS}


def missing(op: Any, root: Path) -> list[str]:
    """The wings of an op that lack a file."""
    return [
        wing
        for wing, places in wings(op).items()
        if not any(path.is_file() for place in places for path in root.glob(place))
    ]


@pytest.mark.parametrize("op", hotloop.catalog(), ids=lambda op: op.full_name)
def test_every_op_has_its_place_in_every_wing(op):
    lacking = {wing: wings(op)[wing] for wing in missing(op, ROOT)}
    assert not lacking, f"{op.full_name} lacks a file, or its case in cases.py: {lacking}"


@pytest.mark.parametrize(
    ("room", "wing"), sorted({(op.room, wing) for op in hotloop.catalog() for wing in wings(op)})
)
def test_a_room_without_a_wing_is_found(room, wing, tmp_path):
    """A tree with the names of all files that ops need, less those of one wing of one room."""
    ops = [op for op in hotloop.catalog() if op.room == room and wing in wings(op)]
    taken = {place for op in ops for place in wings(op)[wing]}
    places = {place for op in hotloop.catalog() for each in wings(op).values() for place in each}
    for path in {path for place in places for path in ROOT.glob(place)}:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    assert [missing(op, tmp_path) for op in ops] == [[]] * len(ops)
    for path in {path for place in taken for path in tmp_path.glob(place)}:
        path.unlink()
    assert all(wing in missing(op, tmp_path) for op in ops)


def test_loops_and_heads_know_neither_python_nor_torch():
    for path in sources(
        "csrc/**/*.hpp", "csrc/**/*.cpp", "kernels/**/*.cu", "kernels/**/*.cuh", "kernels/**/*.hpp"
    ):
        if "bind" in path.relative_to(ROOT).parts:
            continue
        text = path.read_text()
        assert not re.search(r'#include\s*[<"](torch|ATen|c10|pybind11|Python\.h)', text), path


def test_kernels_take_indices_from_one_helper():
    for path in sources("kernels/**/*.cu", "kernels/**/*.cuh"):
        if path.name != "launch.cuh":
            assert "blockIdx" not in path.read_text(), path
    for path in sources("kernels/**/*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if "tl.program_id(" in line and "program_id(0) == 0" not in line:
                assert ".to(tl.int64)" in line, f"{path}:{number}"


def test_no_retired_or_unmasked_triton_calls():
    for path in sources("kernels/**/*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                names = {k.arg for k in node.keywords}
                assert "mask" not in names or "other" in names, (
                    f"{path}:{node.lineno} masks without other="
                )


def test_no_native_march():
    for path in sources("CMakeLists.txt", "cmake/*.cmake", "pyproject.toml"):
        assert "march=native" not in path.read_text(), path


def test_no_file_is_too_long():
    for path in sources(
        "csrc/**/*",
        "kernels/**/*",
        "python/**/*.py",
        "tests/**/*.py",
        "bench/**/*.py",
        "examples/**/*.py",
    ):
        if path.suffix in {".py", ".cpp", ".hpp", ".cu", ".cuh"}:
            lines = len(path.read_text().splitlines())
            assert lines <= 600, f"{path.relative_to(ROOT)} has {lines} lines"


def test_at_most_five_environment_variables():
    from hotloop.front.environment import VARIABLES

    assert len(VARIABLES) <= 5
    for path in sources("python/**/*.py", "csrc/**/*.cpp", "kernels/**/*.py"):
        for name in re.findall(r"\"(HOTLOOP_[A-Z_]+)\"", path.read_text()):
            assert name in VARIABLES, f"{path} reads {name}"


# Factories that ``torch.set_default_device`` and ``with torch.device(...)`` redirect, and those of them whose
# dtype is the default one unless it is named. Everything ``*_like`` and ``new_*`` follows a tensor instead.
TYPED = {
    "empty",
    "empty_strided",
    "eye",
    "linspace",
    "ones",
    "rand",
    "randn",
    "scalar_tensor",
    "zeros",
}
PLACED = TYPED | {
    "arange", "as_tensor", "asarray", "full", "nested_tensor", "randint", "randperm", "sparse_coo_tensor",
    "sparse_csr_tensor", "tensor", "tril_indices", "triu_indices",
}  # fmt: skip


def test_no_tensor_is_made_on_the_default_device_or_in_the_default_dtype():
    for path in sources("python/**/*.py", "kernels/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner, name = ast.unparse(node.func.value), node.func.attr
            if owner != "torch" or name not in PLACED:
                continue
            named = {k.arg for k in node.keywords}
            where = f"{path.relative_to(ROOT)}:{node.lineno}: torch.{name}"
            assert "device" in named, f"{where} without device="
            assert name not in TYPED or "dtype" in named, f"{where} without dtype="
