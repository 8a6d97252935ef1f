"""NumPy arrays where torch is not installed."""

import subprocess
import sys

SCRIPT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *r: None if name == "torch" else find(name, *r)

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, NoTorch())
import numpy as np
from hotloop.decode import *
from hotloop.decode import Logits, Probs

z = np.random.default_rng(0).normal(size=(2, 4, 9)).astype(np.float32)
ids = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
law = Logits(z, temperature=np.array([0.5, 1.0]), top_k=5)
for impl in ("cpu", "reference"):
    done = chain_speculative_sampling(Logits(z[:, :3]), ids, law, seed=np.array([1, 2]), impl=impl)
    print(type(done.output_token_ids).__name__, done.output_token_ids.dtype, done.output_token_ids.tolist())
    print(sample(Probs(np.full((2, 4), 0.25)), seed=3, impl=impl).token_ids.tolist())
tree_speculative_verify(ids, np.array([[-1, 0, 0], [-1, -1, 1]]), law)
typical_accept(np.zeros((2, 1, 4), np.int64), Logits(z[:, None]))
lantern_relaxed_accept(None, ids, law, vq_neighbor_table(np.eye(9), k=3))
value_augmented_logits(z[:, 0], np.array([[1], [2]]), np.ones((2, 1), np.float32))
top_logprobs(law, 2), law_probs(law), greedy_speculative_accept(ids, z)
assert "torch" not in sys.modules
"""


def test_numpy_alone_is_enough():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ndarray int32")
    assert lines[:2] == lines[2:], "cpu and reference"
