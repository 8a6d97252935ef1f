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
from .depth import (
    adam_smoe_layer,
    lookahead,
    momentum_smoe_layer,
    residual_smoe_layer,
    robust_momentum_coefficients,
    robust_momentum_smoe_layer,
)
from .depth_modules import AdamMoE, MomentumMoE, ResidualStream, RobustMomentumMoE
from .experts import expert_mlp, expert_rows, grouped_linear
from .modules import MoE, MoEOutput
from .recipes import AnchorMoE, PMoELoss, anchor_reconcile_moe, pmoe_routing_loss
from .results import (
    Activation,
    AdamState,
    AdamStep,
    Dispatch,
    MomentumStep,
    Norm,
    ResidualStep,
    RobustMomentumCoefficients,
    RobustMomentumStep,
    Routing,
)
from .router import dispatch, route
from .rows import combine, permute

__all__ = [
    "Activation",
    "AdamMoE",
    "AdamState",
    "AdamStep",
    "AnchorMoE",
    "Dispatch",
    "MoE",
    "MoEOutput",
    "MomentumMoE",
    "MomentumStep",
    "Norm",
    "PMoELoss",
    "ResidualStep",
    "ResidualStream",
    "RobustMomentumCoefficients",
    "RobustMomentumMoE",
    "RobustMomentumStep",
    "Routing",
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
