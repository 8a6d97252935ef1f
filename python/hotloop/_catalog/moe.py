# SPDX-License-Identifier: Apache-2.0
"""Sparse mixtures of experts: router, order of expert rows, expert products, combine, momentum across depth."""

from . import Paper, Room

op = Room(__name__, impls=("reference", "cpu"), gradient=True, compiles=True, needs_torch=True)

op(
    "pmoe_routing_loss",
    Paper(
        "Probabilistic Mixture-of-Experts for Efficient Deep Reinforcement Learning",
        "2104.09122",
        "K = 2 in the authors' SAC script, weight 1",
    ),
    impls=("reference",),
)
