# SPDX-License-Identifier: Apache-2.0
"""Exact speculative acceptance and sampling, straight from logits. NumPy, torch or CuPy arrays; torch not needed."""

from ..reference.decode.law import Logits, Probs
from ..reference.decode.results import (
    ACTIONS,
    Backtrack,
    BacktrackState,
    Beams,
    BeamState,
    BranchReuse,
    PuctStep,
    PuctTree,
    Sampled,
    StarStep,
    StarTree,
    TopLogprobs,
    Verified,
    VerifiedPaths,
    VerifiedRelaxed,
    VerifiedTree,
)
from .greedy import greedy_speculative_accept
from .lantern import lantern_relaxed_accept
from .mirror import mirror_sd_branch_reuse
from .sampling import (
    entropy_adaptive_temperature,
    geometric_mixture_logits,
    law_probs,
    sample,
    top_logprobs,
    value_augmented_law,
    value_augmented_logits,
)
from .search import (
    likelihood_beam_search,
    mcts_star_step,
    puct_select_backup,
    retrospective_backtrack,
    vq_neighbor_table,
)
from .speculative import (
    block_speculative_sampling,
    chain_speculative_sampling,
    speculative_streaming_verify,
)
from .tree import tree_speculative_verify
from .typical import typical_accept

__all__ = [
    "ACTIONS",
    "Backtrack",
    "BacktrackState",
    "BeamState",
    "Beams",
    "BranchReuse",
    "Logits",
    "Probs",
    "PuctStep",
    "PuctTree",
    "Sampled",
    "StarStep",
    "StarTree",
    "TopLogprobs",
    "Verified",
    "VerifiedPaths",
    "VerifiedRelaxed",
    "VerifiedTree",
    "block_speculative_sampling",
    "chain_speculative_sampling",
    "entropy_adaptive_temperature",
    "geometric_mixture_logits",
    "greedy_speculative_accept",
    "lantern_relaxed_accept",
    "law_probs",
    "likelihood_beam_search",
    "mcts_star_step",
    "mirror_sd_branch_reuse",
    "puct_select_backup",
    "retrospective_backtrack",
    "sample",
    "speculative_streaming_verify",
    "top_logprobs",
    "tree_speculative_verify",
    "typical_accept",
    "value_augmented_law",
    "value_augmented_logits",
    "vq_neighbor_table",
]
