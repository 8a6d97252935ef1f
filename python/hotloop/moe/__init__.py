# SPDX-License-Identifier: Apache-2.0
"""Sparse mixtures of experts: router, order of expert rows, expert products, combine, momentum across depth."""

from ..front.needs import torch_for

torch_for("moe")

from .results import Dispatch, Routing

__all__ = ["Dispatch", "Routing"]
