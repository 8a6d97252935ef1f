"""The ops in plain torch: no tricks, right in float64, what every implementation is measured against."""

import importlib
from typing import Any

_ROOMS = ("core", "decode", "logprob", "preference", "table", "unlearn")

__all__ = list(_ROOMS)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
