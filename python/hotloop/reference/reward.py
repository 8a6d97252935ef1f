"""The losses of ``hotloop.reward`` in plain torch: what their declarations say."""

from ..front.needs import torch_for

torch_for("reference.reward")

from .. import reward as _room
from ..front.declare import references
from ..reward import *  # noqa: F403  for type checkers

__all__ = list(found := references(_room))
globals().update(found)
