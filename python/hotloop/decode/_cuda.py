"""The CUDA loops of this room: where they run, and the workspace that they need there.

A launch leaves the workspace as the next one needs it, so it is zeroed once, when it is allocated, and kept: one for
each device and stream, for launches on one stream follow each other. Inside the capture of a CUDA graph each call gets
one of its own, and its zeroing is part of the graph: graphs may then be replayed side by side, and nothing that was
recorded but has not run yet is taken for zeroed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from .. import _arrays, _native

_kept: dict[tuple[str, int, int], Any] = {}
_captured: list[Any] = []  # CuPy's pool would hand them on while the graph still uses them
_lock = threading.Lock()


def chain(outputs: Any, like: Any, *arguments: Any) -> None:
    """Run ``decode_chain`` on the device of ``like``, on its library's current stream."""
    _module().decode_chain(*arguments, *_place(like))


def tree(outputs: Any, like: Any, *arguments: Any) -> None:
    _module().decode_tree(*arguments, *_place(like))


def sample(like: Any, *arguments: Any) -> None:
    _module().decode_sample(*arguments, *_place(like))


def _module() -> ModuleType:
    module = _native.cuda()
    assert module is not None
    return module


def _place(like: Any) -> tuple[Callable[[int], Any], int, int]:
    """How to get a workspace, the device's index, the stream's handle."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        device = like.device
        index = device.index if device.index is not None else torch.cuda.current_device()
        stream = torch.cuda.current_stream(device).cuda_stream

        def zeros(size: int) -> Any:
            return torch.zeros(size, dtype=torch.uint8, device=device)

        def workspace(size: int) -> Any:
            # What a capture allocates belongs to its graph, and is not handed on before the graph goes.
            fresh = torch.cuda.is_current_stream_capturing()
            return _arrays.exported(
                zeros(size) if fresh else _keep(("torch", index, stream), size, zeros)
            )

        return workspace, index, stream
    cupy = sys.modules["cupy"]
    index, current = int(like.device.id), cupy.cuda.get_current_stream(int(like.device.id))

    def cupy_zeros(size: int) -> Any:
        with cupy.cuda.Device(index):
            return cupy.zeros(size, dtype="uint8")

    def cupy_workspace(size: int) -> Any:
        if current.is_capturing():
            _captured.append(cupy_zeros(size))
            return _captured[-1]
        return _keep(("cupy", index, int(current.ptr)), size, cupy_zeros)

    return cupy_workspace, index, int(current.ptr)


def _keep(key: tuple[str, int, int], size: int, zeros: Callable[[int], Any]) -> Any:
    with _lock:
        buffer = _kept.get(key)
        if buffer is None or buffer.shape[0] < size:
            buffer = _kept[key] = zeros(size)
        return buffer
