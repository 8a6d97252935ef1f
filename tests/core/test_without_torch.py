"""Every room and every way of importing it where torch is not installed: it works, or the error names the cure."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hotloop._catalog import rooms_with_torch

HIDDEN = """
import importlib.util, sys, warnings
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *r: None if name == "torch" else find(name, *r)

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
"""

CURE = "expected torch >= 2.6 to be installed, found none. Install it with `pip install torch`."


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDDEN + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


NEED_TORCH = {
    "from hotloop.preference import dpo_loss": "[hotloop] preference: ",
    "from hotloop.logprob import linear_logprob": "[hotloop] logprob: ",
    "from hotloop.logprob import *": "[hotloop] logprob: ",
    "from hotloop.unlearn import npo_loss": "[hotloop] unlearn: ",
    "import hotloop; hotloop.preference": "[hotloop] preference: ",
    "import hotloop.unlearn": "[hotloop] unlearn: ",
    "from hotloop.reference.preference import dpo_loss": "[hotloop] preference: ",
    "import hotloop.reference.logprob": "[hotloop] reference.logprob: ",
    "import hotloop.reference.unlearn": "[hotloop] unlearn: ",
    "from hotloop.table import HashEmbedding": "[HashEmbedding] torch: ",
    "import hotloop.table.modules": "[hotloop] table.modules: ",
    "from hotloop.reference.table import multi_reward_embedding": "[multi_reward_embedding] torch: ",
}


@pytest.mark.parametrize("code", NEED_TORCH)
def test_what_needs_torch_says_so(code: str) -> None:
    done = run(code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {NEED_TORCH[code]}{CURE}"


STARS = {
    "hotloop": ", ".join(rooms_with_torch()),
    "hotloop.table": "HashEmbedding, ",
    "hotloop.reference": ", ".join(rooms_with_torch()),
    "hotloop.reference.table": "expert_space_routing, ",
}


@pytest.mark.parametrize("module", STARS)
def test_a_star_brings_what_there_is_and_names_the_rest(module: str) -> None:
    use = {"hotloop.table": "print(Table(4).find(__import__('numpy').arange(3)).found)"}
    done = run(f"from {module} import *\n{use.get(module, '')}\nassert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr
    assert f"[{module}] import *: without {STARS[module]}" in done.stderr
    assert CURE in done.stderr


def test_with_torch_a_star_brings_everything() -> None:
    stars = "from hotloop import *\nfrom hotloop.table import *\nHashEmbedding"
    code = f"import warnings; warnings.simplefilter('error')\n{stars}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
