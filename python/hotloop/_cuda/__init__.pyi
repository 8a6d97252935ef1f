# SPDX-License-Identifier: Apache-2.0
"""
hotloop's CUDA loops. Use the functions of the hotloop package, which check their arguments.
"""

from __future__ import annotations

from . import decode as decode
from . import moe as moe
from . import pointwise as pointwise
from . import segments as segments
from . import table as table

def architectures() -> list[str]: ...
def device_count() -> int: ...
