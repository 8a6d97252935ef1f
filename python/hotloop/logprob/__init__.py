# SPDX-License-Identifier: Apache-2.0
"""Log-probabilities, entropies and divergences of lm_heads, with a bounded part of the logits in memory."""

from ..front.needs import torch_for

torch_for("logprob")

from ._call import LogitMap
from ._statistics import LogprobStatistics
from .distill import (
    balanced_divergence_kd,
    bonsai_synthesis_loss,
    forward_kl_distill,
    generalized_jsd_distill,
    linear_distill,
    linear_jsd,
    linear_kl,
    log_cosh_logit_distill,
    reverse_kl_distill,
)
from .lm_head import linear_cross_entropy, linear_logprob, token_logprob
from .mutual_information import mi_alpha_bound
from .partial import LogprobPartial, linear_logprob_partial, merge_logprob_partials

__all__ = [
    "LogitMap",
    "LogprobPartial",
    "LogprobStatistics",
    "balanced_divergence_kd",
    "bonsai_synthesis_loss",
    "forward_kl_distill",
    "generalized_jsd_distill",
    "linear_cross_entropy",
    "linear_distill",
    "linear_jsd",
    "linear_kl",
    "linear_logprob",
    "linear_logprob_partial",
    "log_cosh_logit_distill",
    "merge_logprob_partials",
    "mi_alpha_bound",
    "reverse_kl_distill",
    "token_logprob",
]
