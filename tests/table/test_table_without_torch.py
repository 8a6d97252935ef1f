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
from hotloop import table

keys = np.array([3, -1, 3])
for impl in ("cpu", "reference"):
    counter = table.CountFilter(100, 1)
    print(
        table.salted_hash_bucket(keys, 10, feature=1, impl=impl).tolist(),
        table.hash_strings(["a", b"b"], impl=impl).tolist(),
        table.frequency_admission_filter(counter, keys, impl=impl).tolist(),
        table.probabilistic_admission_filter(keys, threshold=2.0, step=1, impl=impl).tolist(),
        table.mch_evict_batch(table.ManagedSlots.start(3), keys[:2], now=0, impl=impl).slot_of.tolist(),
    )
assert "torch" not in sys.modules
for name in ("multiplexed_embedding_lookup", "UnifiedEmbedding"):
    try:
        getattr(table, name)
    except ImportError as error:
        print(error)
"""


def test_numpy_alone_is_enough():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == lines[1], "cpu and reference"
    assert lines[2:] == [
        f"[{name}] torch: expected torch >= 2.6 to be installed, found none. Install it with `pip install torch`."
        for name in ("multiplexed_embedding_lookup", "UnifiedEmbedding")
    ]
