# SPDX-License-Identifier: Apache-2.0
"""Where the compiled loops of this room run: on the CPU, or on the current stream of a CUDA device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..front import native


def loops(like: Tensor, memory: bool = True) -> tuple[Any, tuple[Any, ...]]:
    """The loops for the device of ``like``, and what those of a GPU take behind the arguments.

    Args:
        memory: whether the loop takes memory from torch's allocator.
    """
    if like.is_cpu:
        return native.core.moe, ()

    def workspace(count: int) -> Tensor:
        return torch.empty((count,), dtype=torch.uint8, device=like.device)

    place = native.stream_of(like)
    return native.cuda.moe, (workspace, *place) if memory else place
