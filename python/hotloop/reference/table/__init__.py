"""The ops of ``hotloop.table`` without tricks: NumPy, and torch where there is a gradient."""

from typing import Any

from .eviction import mch_evict_batch
from .filters import frequency_admission_filter, probabilistic_admission_filter
from .hashing import hash_strings, salted_hash_bucket

__all__ = [
    "frequency_admission_filter",
    "hash_strings",
    "mch_evict_batch",
    "multiplexed_embedding_lookup",
    "probabilistic_admission_filter",
    "salted_hash_bucket",
]


def __getattr__(name: str) -> Any:
    if name == "multiplexed_embedding_lookup":  # needs torch
        from .multiplex import multiplexed_embedding_lookup

        return multiplexed_embedding_lookup
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
