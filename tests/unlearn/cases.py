# SPDX-License-Identifier: Apache-2.0
"""The losses of this room and their variants, for the tests of the pointwise loop."""

from typing import Any

from pointwise_cases import Case, counts, logps, nll
from pointwise_oracles import mpf, softplus


def npo(policy_logps: Any, ref_logps: Any) -> Any:
    beta = mpf("0.1")
    return 2 / beta * softplus(beta * (policy_logps - ref_logps))


POINTWISE = [
    Case("npo", {"policy_logps": logps}, {"ref_logps": logps}, formula=npo),
    Case(
        "npo-retain",
        {"policy_logps": logps, "retain_nll": nll, "retain_kl": nll},
        {"sequence_lengths": counts},
        {"gamma": 0.5, "beta": 2.5, "retain_kl_weight": 0.5},
    ),
]
