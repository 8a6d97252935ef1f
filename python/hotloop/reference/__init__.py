"""The ops in plain torch: no tricks, right in float64, what every implementation is measured against."""

import importlib
from typing import Any

from ..front.needs import star

_ROOMS = ("core", "decode", "logprob", "preference", "table", "unlearn")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__all__":
        return star(__name__, _ROOMS, ("logprob", "preference", "unlearn"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
