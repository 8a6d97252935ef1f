"""Embedding tables and memories. Error memories take NumPy or torch arrays; torch is needed for what has a gradient."""

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

__all__ = [
    "Compensated",
    "ErrorMemory",
    "ErrorSketch",
    "SketchCompensated",
    "error_memory_compensate",
    "lsh_buckets",
    "lsh_error_sketch",
    "lsh_error_sketch_write",
    "lsh_projections",
]
