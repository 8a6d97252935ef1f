# SPDX-License-Identifier: Apache-2.0
"""The catalogue against the code, and the documents made from it."""

import doctest
import inspect
import re
import sys
from collections import Counter
from pathlib import Path

import hotloop
import pytest
from hotloop import _catalog
from hotloop._catalog import FLOATS, IMPLS, MATURITIES, Paper, Room, rooms
from hotloop.front import impl, native
from processes import ROOT, python

OPS = hotloop.catalog()
FUNCTIONS = [op for op in OPS if not op.is_class]


def by_name(op):
    return op.full_name


def public(room):
    """Public functions and classes, but named tuples (what functions take and return), errors and base classes."""
    module = getattr(hotloop, room)
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    found = {n: getattr(module, n) for n in names}
    functions = {n for n, f in found.items() if inspect.isfunction(f)}
    classes = {n: c for n, c in found.items() if inspect.isclass(c)}
    return functions | {
        n
        for n, c in classes.items()
        if not issubclass(c, (tuple, BaseException))
        and not any(o is not c and issubclass(o, c) for o in classes.values())
    }


@pytest.mark.parametrize("room", rooms())
def test_the_catalogue_lists_exactly_what_is_public(room):
    assert public(room) == {op.name for op in OPS if op.room == room}


def test_names_of_entries_are_unique():
    assert len({op.full_name for op in OPS}) == len(OPS)
    implemented = Counter(name for op in OPS for name in op.implements or (op.name,))
    assert [name for name, n in implemented.items() if n > 1] == []


@pytest.mark.parametrize("op", OPS, ids=by_name)
def test_entry_is_well_formed(op):
    assert op.papers or op.is_class
    assert op.impls
    assert set(op.impls) <= set(IMPLS)
    assert set(op.dtypes) <= {*FLOATS, "int8"}
    assert op.maturity in MATURITIES
    assert inspect.isclass(op.load()) == op.is_class
    assert impl.IMPLS[1:] == IMPLS


def test_a_room_is_found_by_its_file(tmp_path, monkeypatch):
    """Nothing else is edited for a new room: not the list of rooms, not the catalogue."""
    (tmp_path / "toy.py").write_text(
        "from . import Room\nop = Room(__name__, impls=('reference',))\nop('one')\nop('Two', dtypes=())\n"
    )
    monkeypatch.setattr(_catalog, "__path__", [*_catalog.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "hotloop._catalog.toy", raising=False)
    assert rooms() == (*(r for r in rooms() if r != "toy"), "toy")
    assert [op.full_name for op in hotloop.catalog()[len(OPS) :]] == ["toy.one", "toy.Two"]
    assert "toy" in dir(hotloop)
    with pytest.raises(ModuleNotFoundError, match=r"hotloop\.toy"):
        hotloop.toy  # noqa: B018
    sys.modules.pop("hotloop._catalog.toy")
    del _catalog.toy


@pytest.mark.source
def test_type_checkers_see_every_room():
    """``hotloop.preference.dpo_loss`` has its types only if hotloop/__init__.py names the room for type checkers."""
    text = Path(hotloop.__file__).read_text()
    named = re.findall(r"^    from \. import (\w+) as \1$", text, re.M)
    lacking = [f"from . import {room} as {room}" for room in {*rooms(), "reference"} - {*named}]
    assert not lacking, f"hotloop/__init__.py lacks, under TYPE_CHECKING: {', '.join(lacking)}"
    assert len(named) == len(rooms()) + 1


def test_status_is_that_of_the_entry_then_of_its_room_then_of_all(monkeypatch):
    one, two = (
        next(op for op in OPS if op.full_name == f"preference.{n}_loss") for n in ("dpo", "ipo")
    )
    assert (one.status("cpu"), one.status("cuda"), one.status("triton")) == (
        "tested",
        "compiled",
        None,
    )
    monkeypatch.setitem(_catalog.STATUS, "preference", {"cuda": "run on A"})
    assert (one.status("cuda"), one.status("cpu")) == ("run on A", "tested")
    monkeypatch.setitem(_catalog.STATUS, "preference.dpo_loss", {"cuda": "run on B"})
    assert (one.status("cuda"), two.status("cuda")) == ("run on B", "run on A")
    assert one.facts()["impls"]["cuda"] == "run on B"


def test_keywords_of_a_room_hold_for_its_entries_until_one_says_otherwise():
    op = Room("hotloop._catalog.toy", impls=("cpu",), gradient=True)
    op("one", Paper("P", "2401.00001"))
    op("two", gradient=False, implements=("zwei",))
    one, two = op.entries
    assert (one.full_name, one.gradient, one.implements) == ("toy.one", True, ())
    assert (two.impls, two.gradient, two.implements) == (("cpu",), False, ("zwei",))
    assert one.papers[0].link == "https://arxiv.org/abs/2401.00001"
    assert Paper("Q", "KDD 2013").link == ""


@pytest.mark.parametrize("op", FUNCTIONS, ids=by_name)
def test_docstring_has_the_house_form_and_names_the_paper(op):
    text = inspect.getdoc(op.load())
    assert text, op.full_name
    for section in ("Args:", "Returns:", "Examples:", "Reference:"):
        assert section in text, f"{op.full_name} lacks {section}"
    if op.name in ("linear_preference_loss", "linear_distill", "preference_metrics"):
        return
    body = text.split("Reference:")[1]
    assert any(p.source[:10] in body for p in op.papers) or not any(
        p.source[:4].isdigit() for p in op.papers
    ), f"{op.full_name}: none of {[p.source for p in op.papers]} in {body!r}"


@pytest.mark.parametrize("op", FUNCTIONS, ids=by_name)
def test_docstring_names_the_implementations_of_the_entry(op):
    """Where it has the line: an op that says "as" another one has not."""
    line = re.search(r"^ +impl: ([^;\n]*)", inspect.getdoc(op.load()) or "", re.MULTILINE)
    if line:
        assert set(re.findall(r'"(\w+)"', line[1])) == {"auto", *op.impls}


@pytest.mark.parametrize("op", OPS, ids=by_name)
def test_examples_import_what_they_use(op):
    """As they stand, beside the names of the room alone: who reads help() pastes them into a shell."""
    module, text = getattr(hotloop, op.room), inspect.getdoc(op.load()) or ""
    space = {name: getattr(module, name) for name in module.__all__}
    said = []
    test = doctest.DocTestParser().get_doctest(text, space, op.name, None, 0)
    doctest.DocTestRunner().run(test, out=said.append)
    assert not said, "".join(said)


def test_every_reference_has_the_signature_of_its_op():
    from hotloop import reference

    for op in FUNCTIONS:
        if op.room == "logprob" or op.name == "linear_preference_loss":
            continue
        theirs = getattr(getattr(reference, op.room), op.name, None)
        if theirs is None:
            # A dictionary of means, and a law put together: nothing a reference could say otherwise.
            assert op.name in ("preference_metrics", "value_augmented_law"), op.full_name
            continue
        wanted = [n for n in inspect.signature(op.load()).parameters if n != "impl"]
        assert list(inspect.signature(theirs).parameters) == wanted, op.full_name


def test_heads_compiled_in_are_used_and_the_other_way_round():
    for room, heads in native.core.pointwise.heads().items():
        # The heads of core are those of the loop's own tests.
        folder = ROOT / "tests" / "core" if room == "core" else Path(hotloop.__file__).parent / room
        text = "".join(path.read_text() for path in folder.glob("*.py"))
        for head in heads:
            # Named, after the op, or made of a variant (apo_loss).
            named = (
                f'"{head}"',
                f'"{room}.{head}"',
                f"def {head}_loss(",
                f'f"{head.rsplit("_", 1)[0]}_{{',
            )
            assert any(form in text for form in named), (room, head)


@pytest.mark.source
def test_readme_table_and_paper_index_are_current():
    done = python("tools/write_docs.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
