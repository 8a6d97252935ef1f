# SPDX-License-Identifier: Apache-2.0
"""Sparse mixtures of experts: router, order of expert rows, expert products, combine, momentum across depth."""

from ..front.needs import torch_for

torch_for("moe")

from .recipes import PMoELoss, pmoe_routing_loss
from .results import Dispatch, Routing

__all__ = ["Dispatch", "PMoELoss", "Routing", "pmoe_routing_loss"]
