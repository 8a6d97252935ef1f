# SPDX-License-Identifier: Apache-2.0
"""The CUDA loops of this room: where they run, and the workspace that they need there.

A launch leaves the workspace as the next one needs it, so its first bytes (epochs and letters, 68 KB of 3.3 MB on 132
multiprocessors) are zeroed once, when it is allocated, and it is kept: one for each device and stream, for launches on
one stream follow each other. Inside the capture of a CUDA graph each call gets one of its own, and its zeroing is part
of the graph: graphs may then be replayed side by side, and nothing that was recorded but has not run yet is taken for
zeroed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from ..front import native

_kept: dict[tuple[str, int, int], Any] = {}
_captured: list[Any] = []  # CuPy's pool would hand them on while the graph still uses them
_lock = threading.Lock()


def run(name: str, like: Any, *arguments: Any) -> None:
    """Run a loop of ``hotloop._cuda.decode`` on the device of ``like``, on its library's current stream."""
    getattr(native.cuda.decode, name)(*arguments, *_place(like))


def _place(like: Any) -> tuple[Callable[[int, int], Any], int, int]:
    """How to get a workspace, the device's index, the stream's handle."""
    index, stream = native.stream_of(like)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        device = like.device

        def allocate(size: int, zeroed: int) -> Any:
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
            buffer[:zeroed].zero_()
            return buffer

        def workspace(size: int, zeroed: int) -> Any:
            # What a capture allocates belongs to its graph, and is not handed on before the graph goes.
            if torch.cuda.is_current_stream_capturing():
                return allocate(size, zeroed)
            return _keep(("torch", index, stream), size, zeroed, allocate)

        return workspace, index, stream
    cupy = sys.modules["cupy"]

    def cupy_allocate(size: int, zeroed: int) -> Any:
        with cupy.cuda.Device(index):
            buffer = cupy.empty(size, dtype="uint8")
            buffer[:zeroed].fill(0)
            return buffer

    def cupy_workspace(size: int, zeroed: int) -> Any:
        if cupy.cuda.get_current_stream(index).is_capturing():
            _captured.append(cupy_allocate(size, zeroed))
            return _captured[-1]
        return _keep(("cupy", index, stream), size, zeroed, cupy_allocate)

    return cupy_workspace, index, stream


def _keep(
    key: tuple[str, int, int], size: int, zeroed: int, allocate: Callable[[int, int], Any]
) -> Any:
    with _lock:
        buffer = _kept.get(key)
        if buffer is None or buffer.shape[0] < size:
            buffer = _kept[key] = allocate(size, zeroed)
        return buffer
