# SPDX-License-Identifier: Apache-2.0
"""What the ops of this room return and take from each other."""

from ..reference.moe.experts import Activation as Activation
from ..reference.moe.results import AdamState as AdamState
from ..reference.moe.results import AdamStep as AdamStep
from ..reference.moe.results import Dispatch as Dispatch
from ..reference.moe.results import MomentumStep as MomentumStep
from ..reference.moe.results import Norm as Norm
from ..reference.moe.results import ResidualStep as ResidualStep
from ..reference.moe.results import RobustMomentumCoefficients as RobustMomentumCoefficients
from ..reference.moe.results import RobustMomentumStep as RobustMomentumStep
from ..reference.moe.results import Routing as Routing
