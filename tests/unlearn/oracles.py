"""The losses of this room as their papers write them, for tests/core/test_pointwise_oracles.py."""

from __future__ import annotations

from typing import Any

from pointwise_oracles import Numbers, Oracle, mean, mpf, softplus


def npo(v: Numbers) -> Any:
    beta = mpf("0.3")
    return (
        2 / beta * mean(softplus(beta * (a - b)) for a, b in zip(v["policy_logps"], v["ref_logps"]))
    )


ORACLES = [
    Oracle(
        "npo_loss",
        {"policy_logps": [-31.0, -8.5, -12.25]},
        {"ref_logps": [-30.5, -9.25, -11.0]},
        {"beta": 0.3},
        npo,
    ),
]
