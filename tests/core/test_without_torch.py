# SPDX-License-Identifier: Apache-2.0
"""Every room and every way of importing it where torch is not installed: it works, or the error names the cure."""

from __future__ import annotations

import pytest
from hotloop._catalog import rooms_with_torch
from processes import WITHOUT_TORCH, printed, python

CURE = "expected torch >= 2.6 to be installed, found none. Install it with `pip install torch`."


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
    done = python("-c", WITHOUT_TORCH + code)
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
    star = f"from {module} import *\n{use.get(module, '')}\nassert 'torch' not in sys.modules"
    done = python("-c", WITHOUT_TORCH + star)
    assert done.returncode == 0, done.stderr
    assert f"[{module}] import *: without {STARS[module]}" in done.stderr
    assert CURE in done.stderr


def test_with_torch_a_star_brings_everything() -> None:
    stars = "from hotloop import *\nfrom hotloop.table import *\nHashEmbedding"
    code = f"import warnings; warnings.simplefilter('error')\n{stars}"
    printed(code)


WORK = {
    "core": """
from hotloop.core import counting_sort, philox, segment_sum
assert philox(0, 1).shape == (1, 4)
for impl in ("auto", "reference"):
    assert counting_sort(np.array([1, 0, 1]), 2, impl=impl).order.tolist() == [1, 0, 2]
assert segment_sum(np.ones(3), np.array([0, 1, 3])).tolist() == [1, 2]
""",
    "decode": """
from hotloop.decode import *
from hotloop.decode import Logits, Probs
z = np.random.default_rng(0).normal(size=(2, 4, 9)).astype(np.float32)
ids = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
law = Logits(z, temperature=np.array([0.5, 1.0]), top_k=5)
found = []
for impl in ("cpu", "reference"):
    done = chain_speculative_sampling(Logits(z[:, :3]), ids, law, seed=np.array([1, 2]), impl=impl)
    assert type(done.output_token_ids) is np.ndarray and done.output_token_ids.dtype == np.int32
    drawn = sample(Probs(np.full((2, 4), 0.25)), seed=3, impl=impl)
    found.append((done.output_token_ids.tolist(), drawn.token_ids.tolist()))
assert found[0] == found[1]
tree_speculative_verify(ids, np.array([[-1, 0, 0], [-1, -1, 1]]), law)
typical_accept(np.zeros((2, 1, 4), np.int64), Logits(z[:, None]))
lantern_relaxed_accept(None, ids, law, vq_neighbor_table(np.eye(9), k=3))
value_augmented_logits(z[:, 0], np.array([[1], [2]]), np.ones((2, 1), np.float32))
top_logprobs(law, 2), law_probs(law), greedy_speculative_accept(ids, z)
""",
}


@pytest.mark.parametrize("room", WORK)
def test_numpy_alone_is_enough(room: str) -> None:
    used = f"import numpy as np\n{WORK[room]}\nassert 'torch' not in sys.modules"
    printed(WITHOUT_TORCH + used)
