# SPDX-License-Identifier: Apache-2.0
"""What the ops of this room return and take from each other."""

from ..reference.moe.results import Dispatch as Dispatch
from ..reference.moe.results import Routing as Routing
