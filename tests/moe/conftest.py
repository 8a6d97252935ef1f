# SPDX-License-Identifier: Apache-2.0
"""Whatever a test forces, the next one finds as it was."""

from __future__ import annotations

import torch  # noqa: F401  torch.compile looks it up in the module that is called conftest
from fixtures import LEVELS, level, unforced  # noqa: F401
