"""The op registry against the code, and the documents made from it."""

import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import hotloop
import pytest
import torch
from hotloop._registry import FLOATS, MATURITIES, rooms
from hotloop.front import impl, native

ROOT = Path(__file__).resolve().parent.parent
OPS = hotloop.catalog()


def by_name(op):
    return op.full_name


def public_functions(room):
    module = getattr(hotloop, room)
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    found = {n: getattr(module, n) for n in names}
    return {
        n for n, f in found.items() if inspect.isfunction(f) and f.__module__.startswith("hotloop")
    }


@pytest.mark.parametrize("room", rooms())
def test_registry_lists_exactly_the_public_functions(room):
    assert public_functions(room) == {op.name for op in OPS if op.room == room}


@pytest.mark.parametrize("op", OPS, ids=by_name)
def test_entry_is_well_formed(op):
    assert op.papers
    assert op.impls
    assert set(op.impls) <= set(impl.IMPLS[1:])
    assert set(op.dtypes) <= set(FLOATS)
    assert op.maturity in MATURITIES


@pytest.mark.parametrize("op", OPS, ids=by_name)
def test_docstring_has_the_house_form_and_names_the_paper(op):
    text = inspect.getdoc(op.function())
    assert text, op.full_name
    for section in ("Args:", "Returns:", "Example:", "Reference:"):
        assert section in text, f"{op.full_name} lacks {section}"
    if op.name in ("linear_preference_loss", "linear_distill", "preference_metrics"):
        return
    body = text.split("Reference:")[1]
    assert any(p.source[:10] in body for p in op.papers) or not any(
        p.source[:4].isdigit() for p in op.papers
    ), f"{op.full_name}: none of {[p.source for p in op.papers]} in {body!r}"


@pytest.mark.parametrize("op", [o for o in OPS if o.room in ("preference", "unlearn")], ids=by_name)
def test_pair_losses_take_the_impls_they_list(op):
    function = op.function()
    if "impl" not in inspect.signature(function).parameters:
        assert op.impls == ("reference",)
        return
    default = inspect.signature(function).parameters["impl"].default
    assert default == "auto"


def test_every_reference_has_the_signature_of_its_op():
    from hotloop import reference

    for op in OPS:
        if op.room not in ("preference", "unlearn", "core", "decode", "table") or op.name in (
            "linear_preference_loss",
        ):
            continue
        theirs = getattr(getattr(reference, op.room), op.name, None)
        if theirs is None:
            # A dictionary of means, and a law put together: nothing a reference could say otherwise.
            assert op.name in ("preference_metrics", "value_augmented_law"), op.full_name
            continue
        wanted = [n for n in inspect.signature(op.function()).parameters if n != "impl"]
        assert list(inspect.signature(theirs).parameters) == wanted, op.full_name


def test_heads_compiled_in_are_used_and_the_other_way_round():
    compiled = set(native.core().pair_heads())
    text = "".join(
        p.read_text()
        for p in [
            *Path(hotloop.__file__).parent.glob("preference/*.py"),
            *Path(hotloop.__file__).parent.glob("unlearn/*.py"),
        ]
    )
    # apo_loss builds the name of its head from its variant.
    used = {h for h in compiled if f'"{h}"' in text or f'"{h.rsplit("_", 1)[0]}_{{' in text}
    assert used == compiled


def test_compiled_ops_are_registered():
    for name in (
        "checked",
        "pair_loss",
        "linear_logprob",
        "token_logprob",
        "linear_divergence",
        "logit_divergence",
        "decode_chain",
        "decode_tree",
        "decode_sample",
        "multiplexed_lookup",
        "salted_hash_bucket",
    ):
        _ = (
            hotloop.logprob,
            hotloop.preference,
            importlib.import_module("hotloop.decode._operators"),
            importlib.import_module("hotloop.table._operators"),
            importlib.import_module("hotloop.table.multiplex"),
        )
        assert hasattr(torch.ops.hotloop, name)


@pytest.mark.source
def test_readme_table_and_paper_index_are_current():
    done = subprocess.run(
        [sys.executable, "tools/write_docs.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_info_prints_and_its_json_agrees_with_the_registry():
    text = subprocess.run(
        [sys.executable, "-m", "hotloop", "info"], capture_output=True, text=True, check=True
    ).stdout
    report = json.loads(
        subprocess.run(
            [sys.executable, "-m", "hotloop", "info", "--json"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    assert [o["name"] for o in report["ops"]] == [o.full_name for o in OPS]
    for op in OPS:
        assert re.search(rf"^{re.escape(op.full_name)}\s", text, re.M)
    assert report["core_module"]["in_force"] in report["core_module"]["runnable"]


def test_info_survives_a_broken_installation(tmp_path):
    # A _core that cannot be imported, and no torch.
    script = (
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('hotloop._core', 'hotloop._cuda', 'torch', 'numpy'):\n"
        "            raise ImportError(f'{name}: libgomp.so.1: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from hotloop.info import main\n"
        "sys.exit(main([]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "libgomp" in done.stdout
    assert "preference.dpo_loss" in done.stdout


def test_usage_error():
    done = subprocess.run(
        [sys.executable, "-m", "hotloop", "nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_stubs_list_what_the_modules_export():
    import ast

    stub = Path(hotloop.__file__).parent / "_core.pyi"
    tree = ast.parse(stub.read_text())
    named = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    named |= {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}
    assert named == {n for n in vars(native.core()) if not n.startswith("_")}
