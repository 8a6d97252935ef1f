"""The ops of ``hotloop.table``: in NumPy one query at a time, in plain torch where there is a gradient."""

import importlib
from typing import TYPE_CHECKING, Any

from .error_memory import error_memory_compensate
from .error_sketch import (
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
        return getattr(importlib.import_module(f"{__name__}.routing"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
