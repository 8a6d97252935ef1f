# SPDX-License-Identifier: Apache-2.0
"""Losses that learn from preferences between answers."""

from ..front.needs import torch_for

torch_for("preference")

from .linear import LOSSES, linear_preference_loss
from .links import aot_loss, apo_loss, exo_pair_loss, nca_loss, slic_hinge_loss
from .metrics import preference_metrics
from .multi_term import modpo_loss, opa_dpo_loss
from .optimistic import hypo_loss, rpo_sft_loss, selm_loss, vpo_loss, xpo_loss
from .pairs import (
    conservative_dpo_loss,
    dno_loss,
    dpo_loss,
    dpo_norm_loss,
    drift_iterative_dpo_loss,
    flex_dpo_loss,
    robust_dpo_loss,
)
from .reference_free import cpl_dense_loss, cpl_loss, cpo_loss, orpo_loss, simpo_loss
from .squared import inpo_loss, ipo_loss, online_ipo_loss, sppo_hard_loss, sppo_loss, srpo_loss
from .unpaired import RunningRewardMean, bco_loss, bco_pair_loss, kto_loss

__all__ = [
    "LOSSES",
    "RunningRewardMean",
    "aot_loss",
    "apo_loss",
    "bco_loss",
    "bco_pair_loss",
    "conservative_dpo_loss",
    "cpl_dense_loss",
    "cpl_loss",
    "cpo_loss",
    "dno_loss",
    "dpo_loss",
    "dpo_norm_loss",
    "drift_iterative_dpo_loss",
    "exo_pair_loss",
    "flex_dpo_loss",
    "hypo_loss",
    "inpo_loss",
    "ipo_loss",
    "kto_loss",
    "linear_preference_loss",
    "modpo_loss",
    "nca_loss",
    "online_ipo_loss",
    "opa_dpo_loss",
    "orpo_loss",
    "preference_metrics",
    "robust_dpo_loss",
    "rpo_sft_loss",
    "selm_loss",
    "simpo_loss",
    "slic_hinge_loss",
    "sppo_hard_loss",
    "sppo_loss",
    "srpo_loss",
    "vpo_loss",
    "xpo_loss",
]
