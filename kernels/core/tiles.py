# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels of every room share: which program owns which tile, what the interpreter
needs, and operands that 128 bit copies can read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

# What Triton knows of a size or a stride: that 16 divides it, or nothing.
ALIGNED = 16


@triton.jit
def locate(row_blocks, splits, group):
    # Neighbouring programs share `group` row blocks and go through the splits (or column tiles)
    # together.
    program = tl.program_id(0).to(tl.int64)
    first = program // (group * splits) * group
    size = tl.minimum(row_blocks - first, group)
    inside = program % (group * splits)
    return first + inside % size, inside // size


# Decided when the kernels are decorated, so asked of one of them.
INTERPRETED = not isinstance(locate, triton.runtime.jit.JITFunction)


def upcast(dtype: torch.dtype) -> bool:
    """Whether a tile's operands go to float32 first: the interpreter multiplies bfloat16's bits."""
    return INTERPRETED and dtype == torch.bfloat16


def stored(dtype: torch.dtype) -> torch.dtype:
    """What kernels store where the result is `dtype`: the interpreter cuts bfloat16 off instead of
    rounding, so there they store float32 and torch rounds."""
    return torch.float32 if upcast(dtype) else dtype


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def grid(programs: int, room: str) -> tuple[int]:
    if programs >= 2**31:
        raise ValueError(
            f"[{room}] grid: expected fewer than 2**31 programs, got {programs}. Split the rows."
        )
    return (programs,)


def aligned(x: Tensor) -> Tensor:
    """`x` [..., D] as operand of a tile product: the asynchronous 128 bit copies need rows of whole
    16 elements at aligned addresses. Anything else is copied once, with zeros behind D, which add
    nothing to a product; element by element the product would take tens of times longer.
    """
    inner = x.shape[-1]
    steps = all(x.stride(i) % ALIGNED == 0 for i in range(x.ndim - 1))
    if inner % ALIGNED == 0 and steps and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(*x.shape[:-1], triton.cdiv(inner, ALIGNED) * ALIGNED)
    padded[..., :inner] = x
    return padded


@lru_cache(maxsize=16)
def _chip(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def chip(device: torch.device) -> tuple[int, int]:
    """(SMs, bytes of shared memory for a program); 4 and an H100's stand in when interpreted."""
    if device.type != "cuda":
        return 4, 227 * 1024
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


def multiprocessors(device: torch.device) -> int:
    return chip(device)[0]


def shared_memory(device: torch.device) -> int:
    return chip(device)[1]
