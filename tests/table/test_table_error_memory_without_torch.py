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

rng = np.random.default_rng(0)
h, y, yb = rng.normal(size=(50, 9)), rng.integers(0, 2, 50), rng.random(50)
memory = table.ErrorMemory(20, 9, k=3, sample_rate=0.9)
memory.write(h, y, yb)
sketch = table.ErrorSketch(9, repeats=4, bits=3)
sketch.write(h, y, yb)
for impl in ("cpu", "reference"):
    print(table.error_memory_compensate(h[:3], yb[:3], h, y, yb, impl=impl).round(12).tolist())
    print(memory.compensate(h[:3], yb[:3], impl=impl).round(5).tolist())
    print(sketch.compensate(h[:3], yb[:3], impl=impl).round(12).tolist())
assert "torch" not in sys.modules
for name in ("expert_space_routing", "multi_reward_embedding"):
    try:
        getattr(table, name)
    except ImportError as error:
        assert str(error) == (
            f"[{name}] torch: expected torch >= 2.6 to be installed, found none. Install it with `pip install torch`."
        )
    else:
        raise AssertionError(name)
"""


def test_numpy_alone_is_enough():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert lines[:3] == lines[3:], "cpu and reference"
