"""The arguments that most losses of this room take, in the order of the heads."""

PAIR = ("policy_chosen_logps", "policy_rejected_logps")
REF = ("ref_chosen_logps", "ref_rejected_logps")
