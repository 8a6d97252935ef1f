# SPDX-License-Identifier: Apache-2.0
"""The losses of this room as their papers write them, for tests/core/test_pointwise_oracles.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pointwise_oracles import Numbers, Oracle, mean, mp, mpf, sigmoid, softplus

PC, PR, RC, RR = (
    [-31.0, -8.5, -12.25],
    [-29.5, -11.0, -12.0],
    [-32.5, -8.0, -13.0],
    [-28.0, -10.5, -12.5],
)
PAIR = {"policy_chosen_logps": PC, "policy_rejected_logps": PR}
REF = {"ref_chosen_logps": RC, "ref_rejected_logps": RR}
ONE_TWO = {"policy_logps_1": PC, "policy_logps_2": PR}
REF_ONE_TWO = {"ref_logps_1": RC, "ref_logps_2": RR}
ONE = {"policy_logps": PC}
REF_ONE = {"ref_logps": RC}
LENGTHS = {"chosen_lengths": [20, 7, 9], "rejected_lengths": [18, 10, 11]}
MEANS = {"policy_chosen_logps": [-0.7, -1.2, -0.05], "policy_rejected_logps": [-1.1, -0.4, -0.3]}


def by_row(row: Callable[[Numbers], Any]) -> Callable[[Numbers], Any]:
    """The mean over rows of ``row``, which gets the inputs of one of them."""
    return lambda v: mean(row(dict(zip(v, x))) for x in zip(*v.values()))


def sides(v: Numbers) -> tuple[Any, Any]:
    """Log-ratios of the chosen and of the rejected answer of a pair."""
    names = (
        ("policy_chosen_logps", "ref_chosen_logps", "policy_rejected_logps", "ref_rejected_logps")
        if "policy_chosen_logps" in v
        else ("policy_logps_1", "ref_logps_1", "policy_logps_2", "ref_logps_2")
    )
    a, b, c, d = (v[name] for name in names)
    return a - b, c - d


def by_pair(row: Callable[..., Any]) -> Callable[[Numbers], Any]:
    """The mean over pairs of ``row(dw, dl, v)``."""
    return by_row(lambda v: row(*sides(v), v))


def pair(op: str, row: Callable[..., Any], id: str = "", /, **options: Any) -> Oracle:
    return Oracle(op, PAIR, REF, options, by_pair(row), id=id)


def exo(dw: Any, dl: Any, _: Any) -> Any:
    p, e = sigmoid(mpf("0.3") * (dw - dl)), mpf("0.01")
    return p * mp.log(p / (1 - e)) + (1 - p) * mp.log((1 - p) / e)


def nca(dw: Any, dl: Any, _: Any) -> Any:
    w, l = mpf("0.3") * dw, mpf("0.3") * dl
    return softplus(-w) + softplus(w) / 2 + softplus(l) / 2


def aot(v: Numbers) -> Any:
    policy = sorted(a - b for a, b in zip(v["policy_chosen_logps"], v["policy_rejected_logps"]))
    ref = sorted(a - b for a, b in zip(v["ref_chosen_logps"], v["ref_rejected_logps"]))
    return mean(softplus(-mpf("0.3") * (p - r)) for p, r in zip(policy, ref))


@by_row
def kto(v: Numbers) -> Any:
    x = mpf("0.3") * (v["policy_logps"] - v["ref_logps"] - mpf("0.5"))
    return 1 - sigmoid(x) if v["is_desirable"] else mpf("1.5") * (1 - sigmoid(-x))


@by_row
def bco(v: Numbers) -> Any:
    x = mpf("0.3") * (v["policy_logps"] - v["ref_logps"]) - mpf("0.4")
    return softplus(-x) if v["is_desirable"] else v["density_weights"] * softplus(x)


@by_row
def orpo(v: Numbers) -> Any:
    chosen, rejected = (
        mp.log(mp.exp(x) / (1 - mp.exp(x)))
        for x in (v["policy_chosen_logps"], v["policy_rejected_logps"])
    )
    return v["chosen_nll"] + mpf("0.3") * softplus(-(chosen - rejected))


@by_row
def cpo(v: Numbers) -> Any:
    e, m = mpf("0.1"), mpf("0.3") * (v["policy_chosen_logps"] - v["policy_rejected_logps"])
    return (1 - e) * softplus(-m) + e * softplus(m) + mpf("0.5") * v["chosen_nll"]


@by_row
def simpo(v: Numbers) -> Any:
    chosen = v["policy_chosen_logps"] / v["chosen_lengths"]
    rejected = v["policy_rejected_logps"] / v["rejected_lengths"]
    return softplus(-(2 * (chosen - rejected) - mpf("0.5")))


def advantage(logps: Any, gamma: Any, alpha: Any) -> Any:
    return alpha * sum(gamma**t * x for t, x in enumerate(logps))


@by_row
def cpl(v: Numbers) -> Any:
    one, two = (advantage(v[f"segment_logps_{k}"], mpf("0.9"), mpf("0.2")) for k in (1, 2))
    lam, y = mpf("0.75"), v["label"]
    # y: the probability that the second segment is the preferred one.
    return y * softplus(-(two - lam * one)) + (1 - y) * softplus(-(one - lam * two))


def cpl_dense(v: Numbers) -> Any:
    scored = sorted(zip(v["scores"], v["segment_logps"]), key=lambda x: x[0])
    a = [advantage(x, mpf("0.9"), mpf("0.2")) for _, x in scored]
    pairs = [(j, i) for i in range(len(a)) for j in range(i)]
    return mean(softplus(-(a[i] - mpf("0.75") * a[j])) for j, i in pairs)


@by_pair
def dno(d1: Any, d2: Any, v: Numbers) -> Any:
    q, h = sigmoid(2 * v["win_rate_gap"]), mpf("0.3") * (d1 - d2)
    return q * softplus(-h) + (1 - q) * softplus(h)


@by_row
def inpo(v: Numbers) -> Any:
    eta, tau = mpf("0.5"), mpf("0.2")
    policy, ref, iterate = (
        v[f"{who}_chosen_logps"] - v[f"{who}_rejected_logps"]
        for who in ("policy", "ref", "iterate")
    )
    h = policy - tau / eta * ref - (eta - tau) / eta * iterate
    return (h - 1 / (2 * eta)) ** 2


SRPO = {
    f"{name}_logratios": [k + 0.5, 1.0 - k / 2, k / 4 - 2]
    for k, name in enumerate(
        (
            "chosen_given_rejected", "rejected_given_chosen", "rejected_given_rejected", "chosen_given_chosen",
            "chosen", "rejected",
        )
    )
}  # fmt: skip


@by_row
def srpo(v: Numbers) -> Any:
    beta, alpha = mpf("0.3"), mpf("0.25")
    wl, lw, ll, ww, gw, gl = (v[name] for name in SRPO)
    q = v["label"] - mpf("0.5")
    improver = ((q - beta * (wl - ll)) ** 2 + (q + beta * (lw - ww)) ** 2) / 2
    joint = (q - beta / 2 * (wl - lw + gw - gl)) ** 2
    return (1 - alpha) * joint + alpha * improver


def hypo(v: Numbers) -> Any:
    """Two online samples per prompt: each weighs its log-ratio less the other one's, which is not differentiated."""
    w = [a - b for a, b in zip(v["fixed policy_online_logps"], v["ref_online_logps"])]
    other = [w[j ^ 1] for j in range(len(w))]
    extra = mean((a - b) * x for a, b, x in zip(w, other, v["policy_online_logps"]))
    return dpo({name: v[name] for name in (*PAIR, *REF)}) + mpf("0.05") * extra


@by_pair
def modpo(dw: Any, dl: Any, v: Numbers) -> Any:
    w = [mpf("0.5"), mpf("0.3"), mpf("0.2")]
    chosen, rejected = (
        (mpf("0.3") * d - sum(a * b for a, b in zip(w[1:], v[f"{side}_margin_rewards"]))) / w[0]
        for d, side in ((dw, "chosen"), (dl, "rejected"))
    )
    return softplus(-(chosen - rejected))


OPA = {
    f"{name}_logratios": [[0.5, -0.25 * k, 0.1], [-1.0, 0.2, 0.3 * k]]
    for k, name in enumerate(("truth", "revised", "original", "truth_masked", "revised_masked"))
}


@by_row
def opa(v: Numbers) -> Any:
    beta, d = mpf("0.3"), mpf("0.1")
    ones = [mpf(1)] * 3
    g, a, o, gm, am = (v[name] for name in OPA)
    s_a, s_o, v_a = (v[f"{name}_weights"] for name in ("revised", "original", "image"))

    def dot(x: Any, w: Any) -> Any:
        return sum(p * q for p, q in zip(x, w))

    def better(c: Any, wc: Any, r: Any, wr: Any) -> Any:
        return softplus(-beta * (dot(c, wc) - dot(r, wr)))

    text = better(g, ones, o, ones) + better(a, s_a, o, s_o)
    image = better(g, ones, gm, ones) + better(a, v_a, am, v_a)
    chosen = ((g, ones), (a, s_a), (g, ones), (a, v_a))
    anchor = sum(softplus(-(beta * dot(x, w) - d)) for x, w in chosen)
    return text + mpf("0.2") * image + anchor


def vpo(v: Numbers) -> Any:
    gaps = zip(v["policy_calibration_logps"], v["ref_calibration_logps"])
    h = dpo({name: v[name] for name in (*PAIR, *REF)})
    return h - mpf("0.05") * mpf("0.3") * mean(a - b for a, b in gaps)


B = mpf("0.3")
dpo = by_pair(lambda dw, dl, _: softplus(-B * (dw - dl)))
ORACLES = [
    Oracle("dpo_loss", PAIR, REF, {"beta": 0.3}, dpo),
    pair(
        "conservative_dpo_loss",
        lambda dw, dl, _: mpf("0.8") * softplus(-B * (dw - dl)) + mpf("0.2") * softplus(B * (dw - dl)),
        beta=0.3, label_smoothing=0.2,
    ),
    pair(
        "robust_dpo_loss",
        lambda dw, dl, _: (mpf("0.8") * softplus(-B * (dw - dl)) - mpf("0.2") * softplus(B * (dw - dl)))
        / mpf("0.6"),
        beta=0.3, label_smoothing=0.2,
    ),
    Oracle(
        "dpo_norm_loss", PAIR, {**REF, **LENGTHS}, {"beta": 3.0},
        by_pair(lambda dw, dl, v: softplus(-3 * (dw / v["chosen_lengths"] - dl / v["rejected_lengths"]))),
    ),
    pair(
        "flex_dpo_loss",
        lambda dw, dl, v: softplus(-(B * dw - mpf("0.2") * dl)) - mpf("0.01") * v["policy_chosen_logps"],
        beta_chosen=0.3, beta_rejected=0.2, sft_weight=0.01,
    ),
    Oracle(
        "dno_loss", ONE_TWO, {**REF_ONE_TWO, "win_rate_gap": [0.4, -0.2, 0.0]}, {"eta": 0.3, "gap_scale": 2.0}, dno,
    ),
    Oracle(
        "drift_iterative_dpo_loss",
        {"policy_fresh_logps": PC, "policy_dissatisfied_logps": PR},
        {"ref_fresh_logps": RC, "ref_dissatisfied_logps": RR}, {"beta": 0.3},
        by_row(
            lambda v: softplus(
                -B * (v["policy_fresh_logps"] - v["ref_fresh_logps"])
                + B * (v["policy_dissatisfied_logps"] - v["ref_dissatisfied_logps"])
            )
        ),
    ),
    pair("ipo_loss", lambda dw, dl, _: (dw - dl - 1 / (2 * B)) ** 2, tau=0.3),
    Oracle(
        "online_ipo_loss", ONE_TWO, {**REF_ONE_TWO, "preference": [1.0, 0.3, 0.5]}, {"tau": 0.3},
        by_pair(lambda d1, d2, v: (d1 - d2 - (v["preference"] - mpf("0.5")) / B) ** 2),
    ),
    Oracle(
        "inpo_loss", PAIR,
        {**REF, "iterate_chosen_logps": [-30.0, -9.0, -12.0], "iterate_rejected_logps": [-29.0, -10.0, -12.5]},
        {"eta": 0.5, "tau": 0.2}, inpo,
    ),
    Oracle(
        "sppo_loss", ONE, {**REF_ONE, "win_rate": [0.9, 0.2, 0.5]}, {"eta": 4.0},
        by_row(lambda v: (v["policy_logps"] - v["ref_logps"] - 4 * (v["win_rate"] - mpf("0.5"))) ** 2),
    ),
    pair("sppo_hard_loss", lambda dw, dl, _: (dw - 1 / (2 * B)) ** 2 + (dl + 1 / (2 * B)) ** 2, beta=0.3),
    Oracle("srpo_loss", SRPO, {"label": [1.0, 0.3, 0.5]}, {"beta": 0.3, "alpha": 0.25}, srpo),
    pair("slic_hinge_loss", lambda dw, dl, _: max(mpf(0), 1 - B * (dw - dl)), beta=0.3),
    pair("exo_pair_loss", exo, beta=0.3, label_smoothing=0.01),
    pair("apo_loss", lambda dw, dl, _: 1 - sigmoid(B * dw) + sigmoid(B * dl), beta=0.3),
    pair(
        "apo_loss", lambda dw, dl, _: sigmoid(B * dw) + 1 - sigmoid(B * (dw - dl)), "down",
        beta=0.3, variant="down",
    ),
    Oracle("aot_loss", PAIR, REF, {"beta": 0.3}, aot),
    pair("nca_loss", nca, beta=0.3),
    Oracle(
        "kto_loss", ONE, {**REF_ONE, "is_desirable": [True, False, True]},
        {"beta": 0.3, "kl": 0.5, "undesirable_weight": 1.5}, kto,
    ),
    Oracle(
        "bco_loss", ONE, {**REF_ONE, "is_desirable": [True, False, True], "density_weights": [1.0, 1.75, 1.0]},
        {"beta": 0.3, "delta": 0.4}, bco,
    ),
    pair(
        "bco_pair_loss",
        lambda dw, dl, _: softplus(-(B * dw - mpf("0.4"))) + softplus(B * dl - mpf("0.4")),
        beta=0.3, delta=0.4,
    ),
    Oracle("orpo_loss", {**MEANS, "chosen_nll": [0.7, 1.2, 0.05]}, {}, {"beta": 0.3}, orpo),
    Oracle(
        "cpo_loss", {**PAIR, "chosen_nll": [0.7, 1.2, 0.05]}, {},
        {"beta": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.5}, cpo,
    ),
    Oracle("simpo_loss", PAIR, LENGTHS, {"beta": 2.0, "gamma": 0.5}, simpo),
    Oracle(
        "cpl_loss",
        {"segment_logps_1": [[-1.0, -0.5], [-2.0, -3.0]], "segment_logps_2": [[-0.25, -1.5], [-1.0, -0.5]]},
        {"label": [1.0, 0.3]}, {"alpha": 0.2, "gamma": 0.9, "lam": 0.75}, cpl,
    ),
    Oracle(
        "cpl_dense_loss", {"segment_logps": [[-3.0, -0.5], [-1.5, -2.0], [-9.0, 0.0], [-4.0, -1.0]]},
        {"scores": [0.2, 0.9, 0.1, 0.5]},
        {"alpha": 0.2, "gamma": 0.9, "lam": 0.75}, cpl_dense,
    ),
    Oracle(
        "xpo_loss", {**PAIR, "policy_ref_sample_logps": [-7.0, -30.0, -2.0]}, REF, {"beta": 0.3, "alpha": 0.05},
        by_pair(
            lambda dw, dl, v: softplus(-B * (dw - dl)) + mpf("0.05") * v["policy_ref_sample_logps"]
        ),
    ),
    Oracle(
        "vpo_loss", {**PAIR, "policy_calibration_logps": [-7.0, -30.0, -2.0]},
        {**REF, "ref_calibration_logps": [-6.5, -31.0, -2.5]}, {"beta": 0.3, "alpha": 0.05}, vpo,
    ),
    Oracle(
        "selm_loss", {**PAIR, "policy_generated_logps": [-7.0, -30.0, -2.0]},
        {**REF, "ref_generated_logps": [-6.5, -31.0, -2.5]}, {"beta": 0.3, "alpha": 0.05},
        by_pair(
            lambda dw, dl, v: softplus(-B * (dw - dl))
            + mpf("0.05") * B * (v["policy_generated_logps"] - v["ref_generated_logps"])
        ),
    ),
    Oracle(
        "hypo_loss", {**PAIR, "policy_online_logps": [-7.0, -30.0, -2.0, -3.0, -8.0, -8.5]},
        {**REF, "ref_online_logps": [-6.5, -31.0, -2.5, -3.5, -9.0, -6.0]},
        {"beta": 0.3, "kl_weight": 0.05, "num_samples": 2}, hypo, ("policy_online_logps",),
    ),
    pair(
        "rpo_sft_loss",
        lambda dw, dl, v: softplus(-B * (dw - dl)) - mpf("0.05") * B * v["policy_chosen_logps"],
        beta=0.3, eta=0.05,
    ),
    Oracle(
        "modpo_loss", PAIR,
        {
            **REF,
            "chosen_margin_rewards": [[0.5, -1.0], [0.25, 0.0], [2.0, 1.0]],
            "rejected_margin_rewards": [[-0.5, 1.0], [0.75, 0.5], [0.0, 1.5]],
        },
        {"beta": 0.3, "weights": (0.5, 0.3, 0.2)}, modpo,
    ),
    Oracle(
        "opa_dpo_loss", OPA,
        {
            "revised_weights": [[1.0, 0.5, 2.0], [0.25, 1.0, 1.0]],
            "original_weights": [[0.5, 1.0, 1.5], [1.0, 2.0, 0.5]],
            "image_weights": [[2.0, 1.0, 0.5], [0.5, 0.5, 1.0]],
        },
        {"beta": 0.3, "image_coeff": 0.2, "anchor_coeff": 1.0, "anchor_target": 0.1}, opa,
    ),
]  # fmt: skip
