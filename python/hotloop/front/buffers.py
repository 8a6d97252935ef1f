# SPDX-License-Identifier: Apache-2.0
"""Large buffers on the CPU without a page fault per 4 KiB."""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

from . import environment, native

# Below this the faults saved do not pay for the call, and a huge page would be mostly unused.
_LEAST_BYTES = 4 * 2**20


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """``torch.empty`` on the CPU, in huge pages where it is large. For buffers that will be written whole.

    A fresh 49 MB buffer (d weight of a 32000 x 768 lm_head in bfloat16) takes 1.7 instead of 9 ms to write
    (docs/perf-notes.md).
    """
    return advised(torch.empty(*shape, dtype=dtype, device="cpu"))


def advised(tensor: Tensor) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    if size >= _LEAST_BYTES:
        native.core.advise_huge_pages(tensor.data_ptr(), size)
    return tensor


class _Workspace:
    """One buffer that steps hand on to each other, so that logits fall into memory that is already mapped.

    Between steps at most HOTLOOP_WORKSPACE_MB stay allocated. A buffer is handed out to one user at a time; a
    second one at the same time gets memory of its own.
    """

    def __init__(self) -> None:
        self._settle()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._settle)

    def _settle(self) -> None:
        """Start without a buffer. After a fork another thread may have held the lock, or be writing to the buffer."""
        self._lock = threading.Lock()
        self._free: Tensor | None = None

    def take(self, size: int) -> Tensor:
        """Bytes, at least ``size`` of them, with arbitrary content."""
        with self._lock:
            buffer, self._free = self._free, None
        if buffer is None or buffer.numel() < size:
            buffer = empty(size, dtype=torch.uint8)
        return buffer

    def give(self, buffer: Tensor) -> None:
        with self._lock:
            largest = 0 if self._free is None else self._free.numel()
            if largest < buffer.numel() <= environment.workspace_bytes():
                self._free = buffer


workspace = _Workspace()
