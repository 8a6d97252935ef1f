# SPDX-License-Identifier: Apache-2.0
"""Elementary functions and random numbers, for NumPy arrays; ragged groups, for torch tensors too."""

from typing import Any

from . import FLOATS, Paper, Room

op = Room(__name__, impls=("reference", "cpu"), dtypes=("float32", "float64"))

AUTONUMERICS = Paper("AutoNumerics-Zero", "2312.08472", "2^x on [0, 1], 10 operations in float64")
PHILOX = Paper("Parallel random numbers: as easy as 1, 2, 3", "SC11, 2011", "Philox 4x32-10")

op("elementary", Paper("Definition"))
op("exp2_evolved", AUTONUMERICS, implements=("exp2_evolved_f64",))
op("exp2_minimax", AUTONUMERICS, implements=("exp2_minimax_poly",))
op("exp_by_exp2", AUTONUMERICS)
op("philox", PHILOX)
op("philox_uniform", PHILOX)

RAGGED: dict[str, Any] = {"impls": ("reference", "cpu", "cuda"), "compiles": True}
ONLINE_SOFTMAX = Paper("Online normalizer calculation for softmax", "1805.02867")
for reduction in ("sum", "mean", "max", "min"):
    op(f"segment_{reduction}", Paper("Definition"), dtypes=FLOATS, gradient=True, **RAGGED)
op("segment_logsumexp", ONLINE_SOFTMAX, dtypes=FLOATS, gradient=True, **RAGGED)
op("counting_sort", Paper("The Art of Computer Programming 3", "section 5.2"), dtypes=(), **RAGGED)
