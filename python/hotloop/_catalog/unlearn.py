# SPDX-License-Identifier: Apache-2.0
"""Losses that make a model forget."""

from . import Paper, pointwise_room

op = pointwise_room(__name__)

NPO = Paper("Negative Preference Optimization", "2404.05868", "beta = 0.1")

op("npo_loss", NPO, Paper("SimNPO", "2410.07163"))
