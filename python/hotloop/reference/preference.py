"""The losses of ``hotloop.preference`` in plain torch: what their declarations say."""

from ..front.needs import torch_for

torch_for("reference.preference")

from .. import preference as _room
from ..front.declare import references
from ..preference import *  # noqa: F403  for type checkers

__all__ = list(found := references(_room))
globals().update(found)
