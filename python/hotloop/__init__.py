"""The hot loops of learning from feedback, fused.

Rooms are imported when first used, so ``import hotloop`` needs neither torch nor a compiler and takes
milliseconds: ``hotloop.logprob``, ``hotloop.preference``, ``hotloop.table``, ``hotloop.unlearn``, ``hotloop.core``,
``hotloop.reference``. ``hotloop.catalog()`` lists every op.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_ROOMS = ("core", "decode", "logprob", "preference", "table", "unlearn", "reference", "kernels")

__all__ = ["__version__", "catalog", *_ROOMS]

if TYPE_CHECKING:
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
        try:
            return importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ImportError(
                f"[hotloop] {name}: expected torch >= 2.6 to be installed, found none. "
                "Install it with `pip install torch`."
            ) from error
    if name == "catalog":
        from ._registry import catalog

        return catalog
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
