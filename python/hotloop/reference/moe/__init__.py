# SPDX-License-Identifier: Apache-2.0
"""The ops of ``hotloop.moe`` in plain torch."""

from .depth import (
    adam_smoe_layer,
    lookahead,
    momentum_smoe_layer,
    residual_smoe_layer,
    robust_momentum_coefficients,
    robust_momentum_smoe_layer,
)
from .experts import expert_mlp, expert_rows, grouped_linear
from .recipes import anchor_reconcile_moe, pmoe_routing_loss
from .router import (
    dispatch,
    load_balance_loss,
    route,
    router_z_loss,
    sequence_balance_loss,
    update_routing_bias,
)
from .rows import combine, permute

__all__ = [
    "adam_smoe_layer",
    "anchor_reconcile_moe",
    "combine",
    "dispatch",
    "expert_mlp",
    "expert_rows",
    "grouped_linear",
    "load_balance_loss",
    "lookahead",
    "momentum_smoe_layer",
    "permute",
    "pmoe_routing_loss",
    "residual_smoe_layer",
    "robust_momentum_coefficients",
    "robust_momentum_smoe_layer",
    "route",
    "router_z_loss",
    "sequence_balance_loss",
    "update_routing_bias",
]
