# SPDX-License-Identifier: Apache-2.0
"""A rival that may not be installed."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

from .._case import Contender, Lazy, Missing
from .._check import first_line


def contender(name: str, module: str, build: Callable[[ModuleType], Contender]) -> Lazy:
    """The contender built from ``module``, or a ``Missing`` with the reason, when it is wanted."""

    def resolve() -> Contender | Missing:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return build(importlib.import_module(module))
        except Exception as error:  # rivals fail to import in many ways
            return Missing(name, first_line(error))

    return Lazy(name, resolve)
