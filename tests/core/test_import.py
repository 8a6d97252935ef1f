# SPDX-License-Identifier: Apache-2.0
"""What `import hotloop` costs and what it drags in, and what it says where the build is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hotloop import catalog
from hotloop.front import native
from processes import printed, python

IMPORT = """
import sys, time, json
start = time.perf_counter()
import hotloop
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in sys.modules} & {"torch", "numpy", "triton"})]))
"""


@pytest.mark.alone
def test_import_is_quick_and_pulls_in_neither_torch_nor_numpy() -> None:
    found = [json.loads(printed(IMPORT)) for _ in range(5)]
    assert min(seconds for seconds, _ in found) <= 0.150
    assert all(names == [] for _, names in found)


@pytest.mark.parametrize("room", sorted({op.room for op in catalog()}))
def test_every_room_can_be_the_first_one(room: str) -> None:
    """The rooms of losses know each other: none may depend on who came first, nor on docstrings (-OO has none)."""
    for name in (room, f"reference.{room}"):
        assert python("-OO", "-c", f"import hotloop.{name}").returncode == 0


def test_import_changes_no_logging_and_no_warning_filters() -> None:
    printed(
        "import logging, warnings\nbefore = (list(logging.root.handlers), list(warnings.filters))\n"
        "import hotloop\nassert before == (list(logging.root.handlers), list(warnings.filters))\n"
        "assert not logging.getLogger('hotloop').handlers"
    )


def test_unknown_attribute() -> None:
    import hotloop

    with pytest.raises(AttributeError, match="module 'hotloop' has no attribute 'nothing'"):
        hotloop.nothing  # noqa: B018
    assert set(hotloop.__all__) <= set(dir(hotloop))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither module was used yet."""
    for name in ("core", "cuda"):
        monkeypatch.delitem(vars(native), name, raising=False)


CAUSES = {
    "No module named 'hotloop._core'": r"source tree without a build: run `pip install \.`",
    "libgomp.so.1: cannot open shared object file": r"Install the OpenMP runtime \(Debian: apt-get install libgomp1\)",
    "undefined symbol: PyWhatever": r"Reinstall hotloop for this Python; `python -m hotloop info`",
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_missing_core_names_cause_and_cure(
    cause: str, monkeypatch: pytest.MonkeyPatch, fresh: None
) -> None:
    real = native.importlib.import_module

    def fails(name: str, *rest: object) -> object:
        if name == "hotloop._core":
            raise ImportError(cause)
        return real(name, *rest)

    monkeypatch.setattr(native.importlib, "import_module", fails)
    with pytest.raises(
        ImportError, match=r"\[hotloop\] _core: cannot load the compiled CPU loops \("
    ) as caught:
        native.core  # noqa: B018
    assert cause in str(caught.value)
    caught.match(CAUSES[cause])


def test_a_folder_of_stubs_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = tmp_path / "stubs_without_a_build" / "_core"
    stubs.mkdir(parents=True)
    (stubs.parent / "__init__.py").touch()
    (stubs / "__init__.pyi").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"No module named 'stubs_without_a_build\._core'"):
        native._load("stubs_without_a_build._core")


def test_a_missing_cuda_module_is_none(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setitem(sys.modules, "hotloop._cuda", None)
    assert native.cuda is None
    assert "cuda" in vars(native)  # asked once


def test_no_other_attribute_is_made_up() -> None:
    with pytest.raises(AttributeError, match=r"module 'hotloop.front.native' has no attribute 'x'"):
        native.x  # noqa: B018
