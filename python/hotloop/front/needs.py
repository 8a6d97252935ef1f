# SPDX-License-Identifier: Apache-2.0
"""Errors of rooms that need torch, where torch is not installed. Only the standard library is imported here."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_CURE = "expected torch >= 2.6 to be installed, found none. Install it with `pip install torch`."


def torch_for(room: str) -> None:
    """Raise ImportError with the cure unless torch can be imported. The first line of rooms that need it."""
    if not has_torch():
        raise ImportError(f"[hotloop] {room}: {_CURE}")


def missing_torch(name: str) -> ImportError:
    """The error for one name of a room that does without torch otherwise."""
    return ImportError(f"[{name}] torch: {_CURE}")


def has_torch() -> bool:
    if sys.modules.get("torch") is not None:
        return True
    try:
        return importlib.util.find_spec("torch") is not None
    except (ImportError, ValueError):  # hidden by an import hook, or half removed
        return False


def room(module: str, names: dict[str, Any], with_torch: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a module that does without torch but for some names.

    Args:
        names: of the module, its ``globals()``.
        with_torch: submodules by the name that each of them defines.
    """
    everything = names["__all__"]
    if not has_torch():
        del names["__all__"]  # then __getattr__ answers, and names what it leaves out

    def __getattr__(name: str) -> Any:
        if name in with_torch:
            if not has_torch():
                raise missing_torch(name)
            return getattr(importlib.import_module(f"{module}.{with_torch[name]}"), name)
        if name == "__all__":
            return star(module, everything, with_torch)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


def star(module: str, names: Iterable[str], with_torch: Iterable[str]) -> list[str]:
    """What ``from module import *`` brings: without torch, all but ``with_torch``, and a warning that says so."""
    if has_torch():
        return list(names)
    left_out = sorted(with_torch)
    warnings.warn(f"[{module}] import *: without {', '.join(left_out)}: {_CURE}", stacklevel=3)
    return [name for name in names if name not in left_out]
