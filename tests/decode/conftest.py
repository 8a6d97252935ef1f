# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch  # noqa: F401  torch.compile looks it up in the module that is called conftest
from array_fixtures import LEVELS, level, poisoned_arrays, unforced  # noqa: F401
