"""Embedding tables and memories. Error memories take NumPy or torch arrays; torch is needed for what has a gradient."""

from ._memory import Compensated
from .error_memory import ErrorMemory, error_memory_compensate

__all__ = [
    "Compensated",
    "ErrorMemory",
    "error_memory_compensate",
]
