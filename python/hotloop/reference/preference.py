# SPDX-License-Identifier: Apache-2.0
"""The losses of ``hotloop.preference`` in plain torch: what their declarations say."""

from ..front.declare import references
from ..preference import *  # noqa: F403  for type checkers

__all__ = references("preference", globals())
