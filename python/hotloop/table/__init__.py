"""Embedding tables keyed by any 64 bits: hashing, admission, eviction, multiplexed lookup.

NumPy, torch or CuPy arrays; torch is needed for what has a gradient only.
"""

from typing import TYPE_CHECKING, Any

from ._memory import Compensated
from .error_memory import ErrorMemory, error_memory_compensate
from .error_sketch import (
    ErrorSketch,
    SketchCompensated,
    lsh_buckets,
    lsh_error_sketch,
    lsh_error_sketch_write,
    lsh_projections,
)
from .eviction import Eviction, ManagedSlots, mch_evict_batch
from .filters import (
    CountFilter,
    ProbabilisticFilter,
    frequency_admission_filter,
    probabilistic_admission_filter,
)
from .hashing import hash_strings, salted_hash_bucket

if TYPE_CHECKING:
    from .multiplex import UnifiedEmbedding as UnifiedEmbedding
    from .multiplex import multiplexed_embedding_lookup as multiplexed_embedding_lookup

__all__ = [
    "Compensated",
    "CountFilter",
    "ErrorMemory",
    "ErrorSketch",
    "Eviction",
    "ManagedSlots",
    "ProbabilisticFilter",
    "SketchCompensated",
    "UnifiedEmbedding",
    "error_memory_compensate",
    "frequency_admission_filter",
    "hash_strings",
    "lsh_buckets",
    "lsh_error_sketch",
    "lsh_error_sketch_write",
    "lsh_projections",
    "mch_evict_batch",
    "multiplexed_embedding_lookup",
    "probabilistic_admission_filter",
    "salted_hash_bucket",
]

_WITH_TORCH = {"UnifiedEmbedding": "multiplex", "multiplexed_embedding_lookup": "multiplex"}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        import importlib

        try:
            return getattr(importlib.import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                f"[{name}] torch: expected torch >= 2.6 to be installed, found none. "
                "Install it with `pip install torch`."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
