# SPDX-License-Identifier: Apache-2.0
"""The compiled modules, loaded when first needed, with a cause and a cure when they cannot be.

``native.core`` is ``hotloop._core`` and ``native.cuda`` is ``hotloop._cuda``, or None where that was not compiled or
cannot be loaded. The first use of either loads it and makes it a plain attribute of this module, so that what a call
pays from then on is a look-up.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["core", "cuda", "stream_of"]

# torch's wheel carries the OpenMP runtime that the CPU loops must share: two runtimes in one process
# would each start their own threads. Loading torch first makes both modules resolve to the same one.
_TORCH_FIRST = "torch"

if TYPE_CHECKING:  # the exact signatures, for the type checker
    from hotloop import _core as core
    from hotloop import _cuda as cuda
else:

    def __getattr__(name: str) -> ModuleType | None:
        loads = {"core": _core, "cuda": _cuda}.get(name)
        if loads is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = globals()[name] = loads()
        return module


def _core() -> ModuleType:
    """Load ``hotloop._core``, after torch where torch is installed."""
    if _TORCH_FIRST not in sys.modules and importlib.util.find_spec(_TORCH_FIRST) is not None:
        importlib.import_module(_TORCH_FIRST)
    try:
        loaded = _load("hotloop._core")
    except ImportError as error:
        raise ImportError(_explain(error)) from error
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread_in_a_child)
    return loaded


def _cuda() -> ModuleType | None:
    try:
        return _load("hotloop._cuda")
    except ImportError:
        return None


def _load(name: str) -> ModuleType:
    loaded = importlib.import_module(name)
    # Without a build Python takes the folder of the stubs for a package, which has no file.
    if getattr(loaded, "__file__", None) is None:
        raise ModuleNotFoundError(f"No module named {name!r}")
    return loaded


def _one_thread_in_a_child() -> None:
    """Keep the matrix products of lm_head ops from waiting for threads that the fork left behind.

    The compiled loops look after themselves (csrc/core/fork.cpp). torch's products take their number of threads from
    the last ``torch.set_num_threads``, and hang after a fork unless that is 1.
    """
    torch = sys.modules.get(_TORCH_FIRST)
    if torch is not None and core.lost_threads():
        torch.set_num_threads(1)


def stream_of(like: Any) -> tuple[int, int]:
    """The index of the device of a torch or CuPy array, and the handle of its library's current stream there."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(like, torch.Tensor):
        index = like.device.index
        index = torch.cuda.current_device() if index is None else index
        return index, torch.cuda.current_stream(index).cuda_stream
    index = int(like.device.id)
    return index, int(sys.modules["cupy"].cuda.get_current_stream(index).ptr)


def _explain(error: ImportError) -> str:
    text = str(error)
    if "libgomp" in text:
        cure = "Install the OpenMP runtime (Debian: apt-get install libgomp1) or torch, which carries it."
    elif "No module named" in text:
        cure = "This is a source tree without a build: run `pip install .` (needs a C++ compiler)."
    else:
        cure = "Reinstall hotloop for this Python; `python -m hotloop info` shows what was loaded."
    return f"[hotloop] _core: cannot load the compiled CPU loops ({text}). {cure}"
