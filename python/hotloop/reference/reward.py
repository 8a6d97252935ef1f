# SPDX-License-Identifier: Apache-2.0
"""The losses of ``hotloop.reward`` in plain torch: what their declarations say."""

from ..front.declare import references
from ..reward import *  # noqa: F403  for type checkers

__all__ = references("reward", globals())
