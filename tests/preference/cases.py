# SPDX-License-Identifier: Apache-2.0
"""The losses of this room and their variants, for the tests of the pointwise loop; valid calls of its other ops."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from catalog_cases import Arguments, Call, D, V, normal, tokens
from hotloop.preference import LOSSES
from hotloop.preference.linear import FORMS
from pointwise_cases import (
    Case,
    Maker,
    counts,
    fixed,
    gap,
    logps,
    mark,
    mean_logps,
    near,
    nll,
    per,
    probability,
    ratios,
    smoothing,
    times,
)  # fmt: skip

PAIR: dict[str, Maker] = {"policy_chosen_logps": logps, "policy_rejected_logps": logps}
REF: dict[str, Maker] = {"ref_chosen_logps": logps, "ref_rejected_logps": logps}
NEAR: dict[str, Maker] = dict.fromkeys(PAIR, near)
NEAR_REF: dict[str, Maker] = dict.fromkeys(REF, near)
LENGTHS: dict[str, Maker] = {"chosen_lengths": counts, "rejected_lengths": counts}
ONE_TWO: dict[str, Maker] = {"policy_logps_1": logps, "policy_logps_2": logps}
REF_ONE_TWO: dict[str, Maker] = {"ref_logps_1": logps, "ref_logps_2": logps}


def _pair(id: str, /, **kwargs: Any) -> Case:
    return Case(id, PAIR, REF, kwargs)


_OPA_GRAD: dict[str, Maker] = {
    "truth_logratios": per(5, ratios),
    "revised_logratios": per(5, ratios),
    "original_logratios": per(5, ratios),
    "truth_masked_logratios": per(5, ratios),
    "revised_masked_logratios": per(5, ratios),
}
_OPA_WEIGHTS: dict[str, Maker] = {
    "revised_weights": per(5, probability),
    "original_weights": per(5, probability),
    "image_weights": per(5, probability),
}
_SRPO: dict[str, Maker] = dict.fromkeys(
    (
        "chosen_given_rejected_logratios",
        "rejected_given_chosen_logratios",
        "rejected_given_rejected_logratios",
        "chosen_given_chosen_logratios",
        "chosen_logratios",
        "rejected_logratios",
    ),
    ratios,
)
_SEGMENTS: dict[str, Maker] = {
    "segment_logps_1": per(6, ratios),
    "segment_logps_2": per(6, ratios),
}

POINTWISE = [
    _pair("dpo"),
    Case("dpo-forward_kl", NEAR, NEAR_REF, {"f_divergence": "forward_kl"}),
    _pair("dpo-js", f_divergence="js"),
    Case("dpo-alpha", NEAR, NEAR_REF, {"f_divergence": "alpha", "alpha": 0.3}),
    _pair("dpo-conditional", conditional_reference=True),
    _pair("conservative_dpo", label_smoothing=0.1),
    Case("conservative_dpo-rows", PAIR, {**REF, "label_smoothing": smoothing}),
    _pair("robust_dpo"),
    Case("robust_dpo-rows", PAIR, {**REF, "label_smoothing": smoothing}),
    Case("dpo_norm", PAIR, {**REF, **LENGTHS}),
    _pair("flex_dpo", sft_weight=0.01),
    Case("dno-gap", ONE_TWO, {**REF_ONE_TWO, "win_rate_gap": gap}, {"gap_scale": 2.0}),
    Case("dno-label", ONE_TWO, {**REF_ONE_TWO, "label": probability}),
    Case(
        "drift_iterative_dpo",
        {"policy_fresh_logps": logps, "policy_dissatisfied_logps": logps},
        {"ref_fresh_logps": logps, "ref_dissatisfied_logps": logps},
    ),
    _pair("slic_hinge"),
    Case(
        "slic_hinge-free",
        {**PAIR, "target_logps": logps},
        kwargs={"sft_weight": 0.05, "delta": 2.0},
    ),
    _pair("exo_pair"),
    _pair("apo-zero"),
    _pair("apo-down", variant="down"),
    Case("aot-paired", PAIR, REF, {"label_smoothing": 0.1}, rowwise=False),
    Case("aot-unpaired", PAIR, REF, {"paired": False}, rowwise=False),
    _pair("nca"),
    _pair("bco_pair", delta=0.3),
    _pair("ipo"),
    Case("ipo-lengths", PAIR, {**REF, **LENGTHS}),
    Case(
        "online_ipo",
        ONE_TWO,
        {**REF_ONE_TWO, "preference": probability, "lengths_1": counts, "lengths_2": counts},
    ),
    Case("inpo", PAIR, {**REF, "iterate_chosen_logps": logps, "iterate_rejected_logps": logps}),
    Case("sppo", {"policy_logps": logps}, {"ref_logps": logps, "win_rate": probability}),
    _pair("sppo_hard"),
    Case("srpo", _SRPO, {"label": probability}, {"beta": 0.1, "alpha": 0.3}),
    Case(
        "kto",
        {"policy_logps": logps},
        {"ref_logps": logps, "is_desirable": mark},
        {"kl": 1.5, "undesirable_weight": 1.3},
    ),
    Case(
        "kto-rows",
        {"policy_logps": logps},
        {
            "ref_logps": logps,
            "is_desirable": mark,
            "policy_kl_logps": fixed(9, logps),
            "ref_kl_logps": fixed(9, logps),
        },
    ),
    Case(
        "bco",
        {"policy_logps": logps},
        {"ref_logps": logps, "is_desirable": mark, "density_weights": nll},
        {"delta": 0.4},
    ),
    Case(
        "orpo",
        {"policy_chosen_logps": mean_logps, "policy_rejected_logps": mean_logps, "chosen_nll": nll},
    ),
    Case("cpo", {**PAIR, "chosen_nll": nll}, {"label_smoothing": smoothing}),
    Case("cpo-no_nll", PAIR),
    Case("cpo-alpha", {**PAIR, "chosen_nll": nll}, LENGTHS, {"alpha": 0.3, "gamma": 0.2}),
    Case("cpo-lengths", PAIR, LENGTHS),
    Case("simpo", PAIR, LENGTHS),
    Case(
        "simpo-means",
        {
            "policy_chosen_logps": mean_logps,
            "policy_rejected_logps": mean_logps,
            "chosen_nll": nll,
        },
        kwargs={"cpo_alpha": 0.5, "label_smoothing": 0.1},
    ),
    Case("cpl", _SEGMENTS, {"label": probability}, {"gamma": 0.9, "bc_coeff": 0.1}),
    Case(
        "cpl-ref",
        _SEGMENTS,
        {"ref_logps_1": per(6, ratios), "ref_logps_2": per(6, ratios)},
        {"alpha": 0.2, "lam": 0.75},
    ),
    Case("cpl-advantage", {"segment_logps_1": ratios, "segment_logps_2": ratios}),
    Case(
        "cpl_dense",
        {"segment_logps": fixed(7, ratios)},
        {"scores": fixed(7, ratios)},
        rowwise=False,
    ),
    Case(
        "vpo-rows",
        {**PAIR, "policy_calibration_logps": logps},
        {**REF, "ref_calibration_logps": logps},
        {"alpha": 0.05, "mode": "online"},
    ),
    Case(
        "vpo-calibration",
        {**PAIR, "policy_calibration_logps": fixed(11, logps)},
        {**REF, "ref_calibration_logps": fixed(11, logps)},
        {"alpha": 0.05},
        only_mean=True,
        rowwise=False,
    ),
    Case("selm", {**PAIR, "policy_generated_logps": logps}, {**REF, "ref_generated_logps": logps}),
    Case("xpo", {**PAIR, "policy_ref_sample_logps": logps}, REF, {"alpha": 0.01}),
    Case("xpo-ipo", {**PAIR, "policy_ref_sample_logps": logps}, REF, {"link": "ipo"}),
    _pair("rpo_sft"),
    Case("rpo_sft-average", PAIR, {**REF, "chosen_lengths": counts}, {"alpha": 0.2}),
    Case(
        "hypo",
        {**PAIR, "policy_online_logps": times(2, logps)},
        {**REF, "ref_online_logps": times(2, logps)},
        {"kl_weight": 0.02},
        derivative=False,
    ),
    Case(
        "hypo-single",
        {**PAIR, "policy_online_logps": fixed(9, logps)},
        {**REF, "ref_online_logps": fixed(9, logps)},
        {"kl_weight": 0.02, "num_samples": 1, "weight_clip": 10.0},
        only_mean=True,
        rowwise=False,
        derivative=False,
    ),
    Case(
        "modpo",
        PAIR,
        {
            **REF,
            "chosen_margin_rewards": per(2, ratios, 0.2),
            "rejected_margin_rewards": per(2, ratios, 0.2),
        },
        {"weights": (0.5, 0.3, 0.2)},
    ),
    Case(
        "modpo-hinge",
        PAIR,
        {
            **REF,
            "chosen_margin_rewards": per(1, ratios, 0.2),
            "rejected_margin_rewards": per(1, ratios, 0.2),
        },
        # A beta off the grid of bfloat16, so that no row sits exactly on the kink.
        {"weights": (0.6, 0.4), "link": "hinge", "beta": 0.1037},
    ),
    Case("opa_dpo", _OPA_GRAD, _OPA_WEIGHTS, {"anchor_target": 0.1}),
    Case("opa_dpo-released", _OPA_GRAD, _OPA_WEIGHTS, {"mode": "released"}),
]


def answers(loss: str, n: int) -> Arguments:
    """n answers of each role, three tokens each."""
    roles = len(FORMS[loss].roles) + (loss == "hypo")
    reference = (roles * n, 3) if FORMS[loss].tokens else (roles * n,)
    labels = tokens(roles * n, 3)
    labels[:, 0] = -100
    marks = torch.arange(n, device="cpu") % 2
    half = torch.full((n,), 0.5, dtype=torch.float32, device="cpu")
    options = {
        "sppo": {"win_rate": half},
        "kto": {"is_desirable": marks, "kl": 0.1},
        "bco": {"is_desirable": marks, "delta": 0.2},
        "hypo": {"kl_weight": 0.1},
        "vpo": {"alpha": 0.1},
        "inpo": {"iterate_chosen_logps": -half, "iterate_rejected_logps": half},
        "srpo": {"beta": 0.1},
        "modpo": {
            "chosen_margin_rewards": normal(n, 1), "rejected_margin_rewards": normal(n, 1), "weights": (0.5, 0.5),
        },
        "dno": {"win_rate_gap": 0.7},
        "rpo_sft": {"alpha": 0.1},
        "ipo": {"length_normalized": True},
    }  # fmt: skip
    return {
        "hidden": normal(roles * n, 3, D, leaf=True), "weight": normal(V, D, leaf=True), "labels": labels,
        "loss": loss, "ref_logps": -4.0 + normal(*reference), "options": options.get(loss),
    }  # fmt: skip


def four_logps(n: int) -> Arguments:
    names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
    return {f"{name}_logps": normal(n) for name in names}


CALLS = [
    *(Call("linear_preference_loss", partial(answers, name), f"linear-{name}") for name in LOSSES),
    Call("preference_metrics", four_logps),
]
