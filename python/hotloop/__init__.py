"""The hot loops of learning from feedback, fused.

Rooms are imported when first used, so ``import hotloop`` needs neither torch nor a compiler and takes
milliseconds: ``hotloop.logprob``, ``hotloop.preference``, ``hotloop.table``, ``hotloop.unlearn``,
``hotloop.core``, ``hotloop.reference``. ``hotloop.catalog()`` lists every op.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = ("core", "decode", "logprob", "preference", "table", "unlearn", "reference", "kernels")

_WITH_TORCH = ("logprob", "preference", "unlearn")

if TYPE_CHECKING:
    __all__ = ["__version__", "catalog", *_ROOMS]

    from . import core as core
    from . import decode as decode
    from . import logprob as logprob
    from . import preference as preference
    from . import reference as reference
    from . import table as table
    from . import unlearn as unlearn
    from ._registry import catalog


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "catalog":
        from ._registry import catalog

        return catalog
    if name == "__all__":  # asked for by `from hotloop import *`, which would import every room
        from .front.needs import star

        return star(__name__, ("__version__", "catalog", *_ROOMS), _WITH_TORCH)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(("__version__", "catalog", *_ROOMS))
