# SPDX-License-Identifier: Apache-2.0
"""The losses of ``hotloop.unlearn`` in plain torch: what their declarations say."""

from ..front.declare import references
from ..unlearn import *  # noqa: F403  for type checkers

__all__ = references("unlearn", globals())
