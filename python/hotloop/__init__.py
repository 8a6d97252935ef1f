# SPDX-License-Identifier: Apache-2.0
"""The hot loops of learning from feedback, fused.

Rooms are imported when first used, so ``import hotloop`` needs neither torch nor a compiler and takes
milliseconds: ``hotloop.logprob``, ``hotloop.preference``, ``hotloop.table``, ... and ``hotloop.reference``, which
holds their formulas in plain torch. ``hotloop.catalog()`` lists every op of every room.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # the rooms of _catalog, said once more for type checkers
    from . import core as core
    from . import decode as decode
    from . import logprob as logprob
    from . import moe as moe
    from . import preference as preference
    from . import reference as reference
    from . import reward as reward
    from . import table as table
    from . import unlearn as unlearn
    from ._catalog import catalog as catalog


def _names() -> tuple[str, ...]:
    from ._catalog import rooms

    return ("__version__", "catalog", *rooms(), "kernels", "reference")


def __getattr__(name: str) -> Any:
    if name == "catalog":
        from ._catalog import catalog

        return catalog
    if name == "__all__":  # asked for by `from hotloop import *`, which would import every room
        from ._catalog import rooms_with_torch
        from .front.needs import star

        return star(__name__, _names(), rooms_with_torch())
    if name in _names():
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_names())
