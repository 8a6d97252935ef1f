"""Embedding tables and memories. Error memories take NumPy or torch arrays; torch is needed for what has a gradient."""

import importlib
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

if TYPE_CHECKING:
    from .routing import expert_space_routing as expert_space_routing
    from .routing import multi_reward_embedding as multi_reward_embedding

_NEED_TORCH = ("expert_space_routing", "multi_reward_embedding")

__all__ = [
    "Compensated",
    "ErrorMemory",
    "ErrorSketch",
    "SketchCompensated",
    "error_memory_compensate",
    "expert_space_routing",
    "lsh_buckets",
    "lsh_error_sketch",
    "lsh_error_sketch_write",
    "lsh_projections",
    "multi_reward_embedding",
]


def __getattr__(name: str) -> Any:
    # torch is loaded when it is needed: the rest of the room does without.
    if name in _NEED_TORCH:
        try:
            return getattr(importlib.import_module(f"{__name__}.routing"), name)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                f"[{name}] torch: expected torch >= 2.6 to be installed, found none. Install it with "
                "`pip install torch`."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
