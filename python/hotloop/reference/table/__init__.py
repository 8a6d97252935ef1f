"""The ops of ``hotloop.table`` in NumPy, one query at a time, and in plain torch where there is a gradient."""

from .error_memory import (
    error_memory_compensate,
)

__all__ = [
    "error_memory_compensate",
]
