# SPDX-License-Identifier: Apache-2.0
"""What rooms say about themselves to the tests that run over all of them, in files of equal names.

``tests/<room>/cases.py`` names lists: ``POINTWISE``, the losses of the pointwise loop (``pointwise_cases.Case``), and
``CALLS``, valid calls of every other op (``catalog_cases.Call``). A case brings its paper's formula along, or
``tests/<room>/oracles.py`` names ``ORACLES``.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any


@functools.cache
def _module(path: Path) -> ModuleType:
    """The file as a module of its own name, ``<room>_<file>``: two files ``cases.py`` do not collide."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_rooms(file: str, name: str) -> list[Any]:
    """The entries of the list ``name`` in ``tests/<room>/<file>.py`` of all rooms, each with its room."""
    found: list[Any] = []
    for path in sorted(Path(__file__).parent.glob(f"*/{file}.py")):
        entries = getattr(_module(path), name, ())
        found += [replace(entry, room=path.parent.name) for entry in entries]
    return found
