# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from array_fixtures import LEVELS, level, poisoned_arrays, unforced  # noqa: F401

WAYS = {"eager": lambda module, **_: module, "compiled": torch.compile}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def compiled(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Takes a module and gives it back as it is, and compiled whole."""
    torch._dynamo.reset()  # it counts how often the code of a module is compiled anew
    return functools.partial(request.param, fullgraph=True, backend="aot_eager")
