# SPDX-License-Identifier: Apache-2.0
"""The ops in plain torch: no tricks, right in float64, what every implementation is measured against."""

import importlib
from typing import Any

from .._catalog import rooms, rooms_with_torch
from ..front.needs import star


def __getattr__(name: str) -> Any:
    if name in rooms():
        return importlib.import_module(f"{__name__}.{name}")
    if name == "__all__":
        return star(__name__, rooms(), rooms_with_torch())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
