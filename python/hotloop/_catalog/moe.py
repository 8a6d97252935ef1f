# SPDX-License-Identifier: Apache-2.0
"""Sparse mixtures of experts: router, order of expert rows, expert products, combine, momentum across depth."""

from . import Room

op = Room(__name__, impls=("reference", "cpu"), gradient=True, compiles=True, needs_torch=True)
