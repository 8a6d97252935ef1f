# SPDX-License-Identifier: Apache-2.0
"""The ops of ``hotloop.moe`` in plain torch."""

from .recipes import pmoe_routing_loss
from .router import (
    dispatch,
    load_balance_loss,
    route,
    router_z_loss,
    sequence_balance_loss,
    update_routing_bias,
)

__all__ = [
    "dispatch",
    "load_balance_loss",
    "pmoe_routing_loss",
    "route",
    "router_z_loss",
    "sequence_balance_loss",
    "update_routing_bias",
]
