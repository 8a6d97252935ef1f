"""The losses of this room and their variants, for the tests of the pointwise loop."""

from pointwise_cases import Case, counts, logps, nll

POINTWISE = [
    Case("npo", "npo_loss", {"policy_logps": logps}, {"ref_logps": logps}),
    Case(
        "npo-retain",
        "npo_loss",
        {"policy_logps": logps, "retain_nll": nll, "retain_kl": nll},
        {"sequence_lengths": counts},
        {"gamma": 0.5, "beta": 2.5, "retain_kl_weight": 0.5},
    ),
]
