"""The ops of ``hotloop.table``: in NumPy one query at a time, in plain torch where there is a gradient."""

from .error_memory import error_memory_compensate
from .error_sketch import (
    lsh_buckets,
    lsh_error_sketch,
    lsh_error_sketch_write,
    lsh_projections,
)

__all__ = [
    "error_memory_compensate",
    "lsh_buckets",
    "lsh_error_sketch",
    "lsh_error_sketch_write",
    "lsh_projections",
]
