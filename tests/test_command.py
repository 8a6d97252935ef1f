# SPDX-License-Identifier: Apache-2.0
"""The command ``hotloop``, its report where the installation is broken, and the log of calls."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import hotloop
import pytest
from hotloop.__main__ import main
from hotloop._catalog import rooms
from processes import python

OPS = hotloop.catalog()


def test_info_prints_and_its_json_agrees_with_the_catalogue() -> None:
    text = python("-m", "hotloop", "info").stdout
    report = json.loads(python("-m", "hotloop", "info", "--json").stdout)
    assert [o["name"] for o in report["ops"]] == [o.full_name for o in OPS]
    for op in OPS:
        assert re.search(rf"^{re.escape(op.full_name)}\s", text, re.M)
    assert report["core_module"]["in_force"] in report["core_module"]["runnable"]
    assert text.startswith(f"hotloop {hotloop.__version__} (commit {report['commit']}) ")
    assert re.fullmatch(r"unknown|[0-9a-f]{12}(-dirty)?", report["commit"])


def test_info_survives_a_broken_installation() -> None:
    # A _core that cannot be imported, no _commit, and no torch.
    script = (
        "import sys\n"
        "class Broken:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('hotloop._core', 'hotloop._cuda', 'hotloop._commit', 'torch', 'numpy'):\n"
        "            raise ImportError(f'{name}: libgomp.so.1: cannot open shared object file')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "from hotloop.__main__ import main\n"
        "sys.exit(main(['info']))\n"
    )
    done = python("-c", script)
    assert done.returncode == 0, done.stderr
    assert "libgomp" in done.stdout
    assert "(commit unknown)" in done.stdout
    assert "preference.dpo_loss" in done.stdout


@pytest.mark.parametrize("arguments", [["nonsense"], [], ["catalog", "--room", "nowhere"]], ids=str)
def test_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: hotloop" in capsys.readouterr().err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert python("-m", "hotloop", "--version").stdout == f"hotloop {hotloop.__version__}\n"
    for arguments in (["--help"], ["info", "--help"], ["catalog", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
    assert set(re.findall(r"info|catalog|--version|--json|--room", capsys.readouterr().out)) == {
        "info", "catalog", "--version", "--json", "--room",
    }  # fmt: skip


def test_catalog_lists_a_room_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    main(["catalog"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == [
        op.full_name for op in OPS
    ]
    for room in rooms():
        main(["catalog", "--room", room, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found == [json.loads(json.dumps(op.facts())) for op in OPS if op.room == room]
    main(["catalog", "--room", "preference"])
    row = next(
        x for x in capsys.readouterr().out.splitlines() if x.startswith("preference.dpo_loss ")
    )
    assert row.split() == ["preference.dpo_loss", "tested", "tested", "compiled", "-", "tested"]


def test_a_reader_that_has_read_enough_sees_no_error() -> None:
    words = [sys.executable, "-m", "hotloop", "catalog"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 0)


CALL = "import hotloop.core, numpy as np\nfrom hotloop.decode import sample, Logits\n"
CALL += "for _ in range(2): sample(Logits(np.zeros((2, 4), np.float32)), seed=1)\n"
LINE = "sample impl=cpu law=(2, 4)\n"
CONFIGURED = {
    "": f"hotloop: {LINE}" * 2,
    "import logging; logging.basicConfig(format='%(name)s|%(message)s')": f"hotloop|{LINE}" * 2,
    "import logging; logging.getLogger('hotloop').addHandler(logging.StreamHandler())": LINE * 2,
    "import logging; logging.getLogger('hotloop').setLevel('WARNING')": "",
}


@pytest.mark.parametrize("setup", CONFIGURED, ids=["not", "root", "own handler", "own level"])
def test_each_call_is_logged_once_however_logging_is_configured(setup: str) -> None:
    done = python("-c", f"{setup}\n{CALL}", HOTLOOP_LOG="1")
    assert (done.returncode, done.stderr) == (0, CONFIGURED[setup])


def test_logging_configured_after_the_first_call_prints_no_line_twice() -> None:
    late = "import logging; logging.basicConfig(format='%(name)s|%(message)s')\n"
    done = python("-c", CALL + late + CALL, HOTLOOP_LOG="1")
    assert done.stderr == f"hotloop: {LINE}" * 2 + f"hotloop|{LINE}" * 2


@pytest.mark.parametrize("value", ["", "0"])
def test_no_call_is_logged_where_the_variable_is_off(value: str) -> None:
    assert python("-c", CALL, HOTLOOP_LOG=value).stderr == ""
