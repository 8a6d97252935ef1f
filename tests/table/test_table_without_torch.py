# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays where torch is not installed."""

import pytest
from processes import WITHOUT_TORCH, printed

TABLE = """
import numpy as np
from hotloop import table
"""
AFTER = """
assert "torch" not in sys.modules
for name in table._WITH_TORCH:
    try:
        getattr(table, name)
    except ImportError as error:
        assert str(error) == (
            f"[{name}] torch: expected torch >= 2.6 to be installed, found none. Install it with `pip install torch`."
        )
    else:
        raise AssertionError(name)
"""
KEYS = """
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
"""
MEMORY = """
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
"""
ROWS = """
ids, g = np.array([3, 1, 3]), np.ones((3, 4), np.float32)
for impl in ("cpu", "reference"):
    for kind in ("SGD", "RowwiseAdagrad", "Adagrad", "Adam", "FTRL", "GroupAdagrad"):
        rule = getattr(table, kind)()
        w = np.ones((5, 4), np.float16)
        done = table.sparse_dedup_optimize(w, ids, g, rule.init_state(5, 4), rule, rounding_seed=1, impl=impl)
        print(kind, w[:, 0].tolist(), done.counts.tolist())
    q = table.serving_row_quantize(g, impl=impl)
    print(table.serving_row_dequantize(q, impl=impl).tolist())
"""


@pytest.mark.parametrize(
    ("script", "lines"), [(KEYS, 1), (MEMORY, 3), (ROWS, 7)], ids=["keys", "memory", "rows"]
)
def test_numpy_alone_is_enough(script, lines):
    """``script`` prints ``lines`` lines per implementation."""
    found = printed(WITHOUT_TORCH + TABLE + script + AFTER).splitlines()
    assert len(found) == 2 * lines and found[:lines] == found[lines:], "cpu and reference"
