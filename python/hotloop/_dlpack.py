"""Tensors as DLPack capsules, the form the compiled loops read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.utils.dlpack

# The function, not Tensor.__dlpack__(): 0.2 against 2 us a call, and it takes tensors that require a gradient.
export: Callable[[Any], Any] = torch.utils.dlpack.to_dlpack  # type: ignore[attr-defined]
