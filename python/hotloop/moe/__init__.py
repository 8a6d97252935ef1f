# SPDX-License-Identifier: Apache-2.0
"""Sparse mixtures of experts: router, order of expert rows, expert products, combine, momentum across depth."""

from ..front.needs import torch_for

torch_for("moe")

from .balance import (
    load_balance_loss,
    router_z_loss,
    sequence_balance_loss,
    update_routing_bias,
)
from .recipes import PMoELoss, pmoe_routing_loss
from .results import Dispatch, Routing
from .router import dispatch, route

__all__ = [
    "Dispatch",
    "PMoELoss",
    "Routing",
    "dispatch",
    "load_balance_loss",
    "pmoe_routing_loss",
    "route",
    "router_z_loss",
    "sequence_balance_loss",
    "update_routing_bias",
]
