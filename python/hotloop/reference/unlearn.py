"""The losses of ``hotloop.unlearn`` in plain torch: what their declarations say."""

from ..front.needs import torch_for

torch_for("reference.unlearn")

from .. import unlearn as _room
from ..front.declare import references
from ..unlearn import *  # noqa: F403  for type checkers

__all__ = list(found := references(_room))
globals().update(found)
