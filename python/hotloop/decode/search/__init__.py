# SPDX-License-Identifier: Apache-2.0
"""Searching with a model: beams by likelihood, two tree searches, backtracking, neighbours of a codebook.

Each op is one step of a loop whose other half, the model, runs in the caller's engine. Trees are updated in place;
everything else comes back as a new state. Arguments are checked before anything is written.
"""

from .backtracking import retrospective_backtrack
from .beam import likelihood_beam_search
from .nearest_codes import vq_neighbor_table
from .trees import mcts_star_step, puct_select_backup

__all__ = [
    "likelihood_beam_search",
    "mcts_star_step",
    "puct_select_backup",
    "retrospective_backtrack",
    "vq_neighbor_table",
]
