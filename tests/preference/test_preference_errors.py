"""Every error text: one per kind of argument, with the value in it and the way out."""

from __future__ import annotations

from typing import Any

import hotloop.preference as p
import pytest
import torch
from hotloop.unlearn import npo_loss
from preference_cases import CASES, Case

Z = torch.zeros(4)
FOUR = (Z, Z, Z, Z)
SIX = (Z,) * 6
TOKENS = torch.zeros(4, 3)
MARKS = torch.tensor([True, False, True, False])
MARGINS = torch.zeros(4, 2)

by_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


def arguments(case: Case) -> dict[str, Any]:
    grad, const = case.inputs(4)
    return {**grad, **const, **case.kwargs}


@by_case
def test_an_integer_tensor_in_place_of_each_log_probability(case: Case) -> None:
    for name in case.grad:
        call = arguments(case)
        call[name] = call[name].long()
        with pytest.raises(TypeError, match=rf"\[{case.op}\] .*{name}: expected dtype float32"):
            case.fn(**call)


@by_case
def test_a_list_in_place_of_each_tensor(case: Case) -> None:
    for name in (*case.grad, *case.const):
        call = arguments(case)
        call[name] = call[name].tolist()
        with pytest.raises((TypeError, ValueError), match=rf"\[{case.op}\] .*{name}: expected"):
            case.fn(**call)


@by_case
def test_one_row_too_few_in_each_tensor(case: Case) -> None:
    free = {"kto-rows": ("policy_kl_logps",), "vpo-calibration": ("policy_calibration_logps",)}
    first = next(iter(case.grad))
    for name in (*case.grad, *case.const):
        if name == first or name in free.get(case.id, ()):
            continue
        call = arguments(case)
        call[name] = call[name][:-1]
        if case.id in ("npo-retain", "hypo-single") and name != "sequence_lengths":
            call["reduction"] = "none"
        with pytest.raises(ValueError, match=rf"\[{case.op}\] .*expected .*, got .*\. [A-Z]"):
            case.fn(**call)


@by_case
def test_another_device_for_each_tensor(case: Case) -> None:
    for name in (*case.grad, *case.const):
        call = arguments(case)
        call[name] = call[name].to("meta")
        with pytest.raises(ValueError, match=rf"\[{case.op}\] .*expected device (cpu|meta) like"):
            case.fn(**call)


@by_case
def test_reduction_and_impl(case: Case) -> None:
    with pytest.raises(ValueError, match="reduction: expected one of none, mean, sum, got 'max'"):
        case.fn(**arguments(case), reduction="max")
    with pytest.raises(ValueError, match=r"impl: expected one of auto, .*, got 'gpu'"):
        case.fn(**arguments(case), impl="gpu")


def test_a_forced_impl_that_cannot_run_lists_every_reason() -> None:
    with pytest.raises(NotImplementedError) as caught:
        p.dpo_loss(*FOUR, impl="cuda")
    text = str(caught.value)
    assert text.startswith(
        "[dpo_loss] no implementation fits policy_chosen_logps (4,) float32 on cpu with "
        "impl='cuda':"
    )
    assert 'reference  available; pass impl="reference" to use it' in text
    assert 'cpu        available; pass impl="cpu" to use it' in text
    assert "cuda       refused: device cpu" in text
    assert "triton     refused: this op has none" in text
    assert text.endswith("details: python -m hotloop info")
    with pytest.raises(NotImplementedError, match="triton     refused"):
        p.kto_loss(Z, Z, MARKS, kl=0.0, impl="triton")


def test_the_environment_can_force_an_impl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOTLOOP_IMPL", "triton")
    with pytest.raises(NotImplementedError, match="with impl='triton'"):
        p.dpo_loss(*FOUR)
    monkeypatch.setenv("HOTLOOP_IMPL", "fast")
    with pytest.raises(ValueError, match=r"HOTLOOP_IMPL: expected one of reference, .*'fast'"):
        p.dpo_loss(*FOUR)


@by_case
def test_checks_find_nan_when_they_are_on(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call = arguments(case)
    name = next(iter(case.grad))
    call[name].view(-1)[1] = float("nan")
    assert bool(case.fn(**call).isnan().any())
    monkeypatch.setenv("HOTLOOP_CHECK", "1")
    with pytest.raises(ValueError, match=r"expected finite values, got nan at .* Unset HOTLOOP_C"):
        case.fn(**call)


NUMBERS: list[tuple[Any, tuple[Any, ...], dict[str, Any], str, Any, str]] = [
    (p.dpo_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.dpo_loss, FOUR, {}, "beta", float("nan"), "a number > 0"),
    (p.dpo_loss, FOUR, {"f_divergence": "alpha"}, "alpha", 1, "a number other than 1"),
    (p.conservative_dpo_loss, FOUR, {}, "beta", -1, "a number > 0"),
    (p.conservative_dpo_loss, FOUR, {}, "label_smoothing", 1.5, "a number >= 0 and <= 1"),
    (p.robust_dpo_loss, FOUR, {}, "beta", 0.0, "a number > 0"),
    (p.robust_dpo_loss, FOUR, {}, "label_smoothing", 0.5, "a number >= 0 and < 0.5"),
    (p.dpo_norm_loss, (*FOUR, 1, 1), {}, "beta", 0, "a number > 0"),
    (p.dpo_norm_loss, FOUR, {"rejected_lengths": 1}, "chosen_lengths", -2, "a number >= 0"),
    (p.dpo_norm_loss, FOUR, {"chosen_lengths": 1}, "rejected_lengths", -2, "a number >= 0"),
    (p.flex_dpo_loss, FOUR, {}, "beta_chosen", 0, "a number > 0"),
    (p.flex_dpo_loss, FOUR, {}, "beta_rejected", -0.1, "a number >= 0"),
    (p.flex_dpo_loss, FOUR, {}, "sft_weight", -0.1, "a number >= 0"),
    (p.dno_loss, (*FOUR, Z), {}, "eta", 0, "a number > 0"),
    (p.dno_loss, (*FOUR, Z), {}, "gap_scale", 0, "a number > 0"),
    (p.dno_loss, FOUR, {}, "win_rate_gap", 1.1, "a number >= -1 and <= 1"),
    (p.dno_loss, FOUR, {}, "label", 1.1, "a number >= 0 and <= 1"),
    (p.drift_iterative_dpo_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.slic_hinge_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.slic_hinge_loss, FOUR, {}, "delta", 0, "a number > 0"),
    (p.slic_hinge_loss, (*FOUR, Z), {}, "sft_weight", -1, "a number >= 0"),
    (p.exo_pair_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.exo_pair_loss, FOUR, {}, "label_smoothing", 0.0, "a number > 0 and < 0.5"),
    (p.apo_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.aot_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.aot_loss, FOUR, {}, "label_smoothing", -0.1, "a number >= 0 and <= 1"),
    (p.nca_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.bco_pair_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.bco_loss, (Z, Z, MARKS), {}, "beta", 0, "a number > 0"),
    (p.ipo_loss, FOUR, {}, "tau", 0, "a number > 0"),
    (p.online_ipo_loss, FOUR, {}, "tau", 0, "a number > 0"),
    (p.online_ipo_loss, FOUR, {}, "preference", 2.0, "a number >= 0 and <= 1"),
    (p.inpo_loss, SIX, {}, "eta", 0, "a number > 0"),
    (p.inpo_loss, SIX, {"eta": 0.5}, "tau", 0.6, "a number >= 0 and <= 0.5"),
    (p.inpo_loss, SIX, {}, "label", 2, "a number >= 0 and <= 1"),
    (p.sppo_loss, (Z, Z, 0.5), {}, "eta", 0, "a number > 0"),
    (p.sppo_loss, (Z, Z), {}, "win_rate", 2, "a number >= 0 and <= 1"),
    (p.sppo_hard_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.srpo_loss, SIX, {}, "beta", 0, "a number > 0"),
    (p.srpo_loss, SIX, {"beta": 1}, "alpha", 1, "a number > 0 and < 1"),
    (p.srpo_loss, SIX, {"beta": 1}, "joint_weight", -1, "a number >= 0"),
    (p.srpo_loss, SIX, {"beta": 1}, "improvement_weight", -1, "a number >= 0"),
    (p.srpo_loss, SIX, {"beta": 1}, "label", -1, "a number >= 0 and <= 1"),
    (p.kto_loss, (Z, Z, MARKS), {"kl": 0.0}, "beta", 0, "a number > 0"),
    (p.kto_loss, (Z, Z, MARKS), {"kl": 0.0}, "desirable_weight", -1, "a number >= 0"),
    (p.kto_loss, (Z, Z, MARKS), {"kl": 0.0}, "undesirable_weight", -1, "a number >= 0"),
    (p.orpo_loss, (Z - 1, Z - 1, Z), {}, "beta", -1, "a number >= 0"),
    (p.cpo_loss, (Z, Z), {}, "beta", 0, "a number > 0"),
    (p.cpo_loss, (Z, Z), {}, "label_smoothing", 2, "a number >= 0 and <= 1"),
    (p.cpo_loss, (Z, Z), {}, "cpo_alpha", -1, "a number >= 0"),
    (p.cpo_loss, (Z, Z), {}, "gamma", -1, "a number >= 0"),
    (p.cpo_loss, (Z, Z), {}, "alpha", float("nan"), "a number"),
    (p.simpo_loss, (Z, Z), {}, "beta", 0, "a number > 0"),
    (p.simpo_loss, (Z, Z), {}, "gamma", -1, "a number >= 0"),
    (p.simpo_loss, (Z, Z), {}, "cpo_alpha", -1, "a number >= 0"),
    (p.simpo_loss, (Z, Z), {}, "label_smoothing", -1, "a number >= 0 and <= 1"),
    (p.cpl_loss, (Z, Z), {}, "alpha", 0, "a number > 0"),
    (p.cpl_loss, (Z, Z), {}, "gamma", 1.5, "a number > 0 and <= 1"),
    (p.cpl_loss, (Z, Z), {}, "lam", 0, "a number > 0 and <= 1"),
    (p.cpl_loss, (Z, Z), {}, "bc_coeff", -1, "a number >= 0"),
    (p.cpl_loss, (Z, Z), {}, "label", 2, "a number >= 0 and <= 1"),
    (p.cpl_dense_loss, (Z, Z), {}, "alpha", 0, "a number > 0"),
    (p.cpl_dense_loss, (Z, Z), {}, "gamma", 0, "a number > 0 and <= 1"),
    (p.cpl_dense_loss, (Z, Z), {}, "lam", 2, "a number > 0 and <= 1"),
    (p.cpl_dense_loss, (Z, Z), {}, "bc_coeff", -1, "a number >= 0"),
    (p.vpo_loss, (*FOUR, Z), {"alpha": 0.1}, "beta", 0, "a number > 0"),
    (p.vpo_loss, (*FOUR, Z), {}, "alpha", -1, "a number >= 0"),
    (p.selm_loss, (*FOUR, Z), {}, "beta", 0, "a number > 0"),
    (p.selm_loss, (*FOUR, Z), {}, "alpha", -1, "a number >= 0"),
    (p.xpo_loss, (*FOUR, Z), {}, "beta", 0, "a number > 0"),
    (p.xpo_loss, (*FOUR, Z), {}, "alpha", -1, "a number >= 0"),
    (p.rpo_sft_loss, FOUR, {}, "beta", 0, "a number > 0"),
    (p.rpo_sft_loss, FOUR, {}, "eta", -1, "a number >= 0"),
    (p.rpo_sft_loss, (*FOUR, 5), {}, "alpha", -1, "a number >= 0"),
    (p.hypo_loss, SIX, {"kl_weight": 0.1}, "beta", 0, "a number > 0"),
    (p.hypo_loss, SIX, {}, "kl_weight", -1, "a number >= 0"),
    (p.hypo_loss, SIX, {"kl_weight": 0.1}, "num_samples", 0, "a number >= 1"),
    (p.hypo_loss, SIX, {"kl_weight": 0.1}, "weight_clip", 0, "a number > 0"),
    (p.modpo_loss, (*FOUR, MARGINS, MARGINS), {"weights": (1, 0, 0)}, "beta", 0, "a number > 0"),
    (p.opa_dpo_loss, (TOKENS,) * 5, {}, "beta", 0, "a number > 0"),
    (p.opa_dpo_loss, (TOKENS,) * 5, {}, "image_coeff", -1, "a number >= 0"),
    (p.opa_dpo_loss, (TOKENS,) * 5, {}, "anchor_coeff", -1, "a number >= 0"),
    (p.opa_dpo_loss, (TOKENS,) * 5, {}, "anchor_target", float("nan"), "a number"),
    (p.preference_metrics, FOUR, {}, "beta", 0, "a number > 0"),
    (npo_loss, (Z,), {}, "beta", 0, "a number > 0"),
    (npo_loss, (Z,), {}, "gamma", float("nan"), "a number"),
    (npo_loss, (Z,), {}, "retain_nll_weight", -1, "a number >= 0"),
    (npo_loss, (Z,), {}, "retain_kl_weight", -1, "a number >= 0"),
]


@pytest.mark.parametrize("row", NUMBERS, ids=lambda r: f"{r[0].__name__}-{r[3]}-{r[4]}")
def test_a_number_out_of_range_or_of_another_type(row: Any) -> None:
    fn, args, kwargs, name, value, wanted = row
    text = rf"\[{fn.__name__}\] {name}: expected {wanted}, got {value!r}\."
    with pytest.raises(ValueError, match=text):
        fn(*args, **kwargs, **{name: value})
    with pytest.raises(TypeError, match=rf"\[{fn.__name__}\] {name}: expected .*, got str"):
        fn(*args, **kwargs, **{name: "0.1"})


CHOICES: list[tuple[Any, tuple[Any, ...], dict[str, Any], str, str]] = [
    (p.dpo_loss, FOUR, {}, "f_divergence", "reverse_kl, forward_kl, js, alpha"),
    (p.apo_loss, FOUR, {}, "variant", "zero, down"),
    (p.vpo_loss, (*FOUR, Z), {"alpha": 0.1}, "mode", "offline, online"),
    (p.xpo_loss, (*FOUR, Z), {}, "link", "logistic, ipo"),
    (p.modpo_loss, (*FOUR, MARGINS, MARGINS), {"weights": (1, 0, 0)}, "link", "logistic, hinge"),
    (p.opa_dpo_loss, (TOKENS,) * 5, {}, "mode", "sequence, released"),
]


@pytest.mark.parametrize("row", CHOICES, ids=lambda r: f"{r[0].__name__}-{r[3]}")
def test_a_choice_lists_what_is_accepted(row: Any) -> None:
    fn, args, kwargs, name, wanted = row
    text = rf"\[{fn.__name__}\] {name}: expected one of {wanted}, got 'other'\."
    with pytest.raises(ValueError, match=text):
        fn(*args, **kwargs, **{name: "other"})


TOGETHER: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (p.slic_hinge_loss, (Z, Z, Z), {}, "ref_rejected_logps: .* beside ref_chosen_logps"),
    (p.slic_hinge_loss, (Z, Z), {"target_logps": Z}, "sft_weight: .* beside target_logps"),
    (p.ipo_loss, (*FOUR, Z), {}, "rejected_lengths: .* beside chosen_lengths"),
    (p.online_ipo_loss, FOUR, {"lengths_2": Z}, "lengths_1: .* beside lengths_2"),
    (p.cpo_loss, (Z, Z), {"chosen_lengths": 3}, "rejected_lengths: .* beside chosen_lengths"),
    (p.simpo_loss, (Z, Z, 3), {}, "rejected_lengths: .* beside chosen_lengths"),
    (p.cpl_loss, (TOKENS, TOKENS, TOKENS), {}, "ref_logps_2: .* beside ref_logps_1"),
    (p.kto_loss, (Z, Z, MARKS, Z), {}, "ref_kl_logps: .* beside policy_kl_logps"),
]


@pytest.mark.parametrize("row", TOGETHER, ids=lambda r: r[3][:24])
def test_one_of_two_that_belong_together(row: Any) -> None:
    fn, args, kwargs, text = row
    with pytest.raises(ValueError, match=text + ", got None. Pass both or neither."):
        fn(*args, **kwargs)


OTHERS: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (
        p.dpo_loss,
        FOUR,
        {"f_divergence": "js", "conditional_reference": True},
        "conditional_reference: expected f_divergence='reverse_kl', got 'js'",
    ),
    (p.dno_loss, FOUR, {}, "expected either label or win_rate_gap, got neither"),
    (p.dno_loss, (*FOUR, Z), {"label": 1.0}, "either label or win_rate_gap, got both"),
    (p.kto_loss, (Z, Z, MARKS), {}, "either kl or policy_kl_logps with ref_kl_logps, got neither"),
    (p.kto_loss, (Z, Z, MARKS, Z, Z), {"kl": 1.0}, "with ref_kl_logps, got both"),
    (p.rpo_sft_loss, FOUR, {"alpha": 0.1}, "chosen_lengths: expected a value with alpha"),
    (p.rpo_sft_loss, FOUR, {"alpha": 0.1, "eta": 0.1}, "alpha: expected None beside eta, got 0.1"),
    (p.hypo_loss, (*FOUR, Z[:3], Z[:3]), {"kl_weight": 1}, "a multiple of num_samples=2 rows"),
    (
        p.hypo_loss,
        (*FOUR, Z, Z),
        {"kl_weight": 1, "reduction": "sum"},
        r"policy_online_logps: expected shape \(4,\) like policy_chosen_logps for reduction='sum'",
    ),
    (
        p.vpo_loss,
        (*FOUR, Z[:3]),
        {"alpha": 1.0, "reduction": "none"},
        r"policy_calibration_logps: expected shape \(4,\) .* got \(3,\). Use reduction='mean'",
    ),
    (
        npo_loss,
        (Z,),
        {"retain_nll": Z[:3], "reduction": "none"},
        r"retain_nll: expected shape \(4,\) like policy_logps for reduction='none', got \(3,\)",
    ),
    (
        p.modpo_loss,
        (*FOUR, MARGINS, MARGINS),
        {"weights": (1.0, 0.0)},
        r"weights: expected 3 numbers for 2 margin reward\(s\), got 2",
    ),
    (
        p.modpo_loss,
        (*FOUR, MARGINS, MARGINS),
        {"weights": torch.ones(3)},
        r"weights: expected 3 numbers .*, got Tensor",
    ),
    (
        p.modpo_loss,
        (*FOUR, MARGINS, MARGINS),
        {"weights": (0.0, 0.5, 0.5)},
        r"weights\[0\]: expected a number > 0, got 0",
    ),
    (p.cpl_loss, (Z, Z), {"bc_coeff": 0.1}, "bc_coeff: expected 0 for advantages"),
    (p.cpl_loss, (TOKENS[None], TOKENS[None]), {}, r"segment_logps_1: .*\(n, steps\), or adv"),
    (p.cpl_loss, (Z, Z, Z, Z), {}, r"segment_logps_1: expected shape \(n, steps\), got \(4,\)"),
    (p.cpl_dense_loss, (Z, Z[:3]), {}, r"scores: expected shape \(4,\), one per segment, got \(3,"),
    (p.cpl_dense_loss, (Z, Z), {"bc_coeff": 0.1}, "bc_coeff: expected 0 for advantages"),
    (
        p.opa_dpo_loss,
        (TOKENS, TOKENS, TOKENS[:, :2], TOKENS, TOKENS),
        {"mode": "released"},
        r"original_logratios: expected shape \(4, 3\) like truth_logratios, got \(4, 2\)",
    ),
    (
        p.opa_dpo_loss,
        (TOKENS, TOKENS[:3], TOKENS, TOKENS, TOKENS[:3]),
        {},
        r"revised_logratios: expected shape \(4, tokens\) like truth_logratios, got \(3, 3\)",
    ),
]


@pytest.mark.parametrize("row", OTHERS, ids=lambda r: f"{r[0].__name__}-{r[3][:20]}")
def test_arguments_that_do_not_go_together(row: Any) -> None:
    fn, args, kwargs, text = row
    with pytest.raises(ValueError, match=rf"\[{fn.__name__}\] .*{text}"):
        fn(*args, **kwargs)


def test_a_required_tensor_left_out() -> None:
    for i, name in enumerate(p.dpo_loss.__code__.co_varnames[:4]):
        args: list[Any] = list(FOUR)
        args[i] = None
        with pytest.raises(TypeError, match=rf"{name}: expected a torch.Tensor, got NoneType"):
            p.dpo_loss(*args)


def test_running_reward_mean() -> None:
    running = p.RunningRewardMean(balanced=True)
    with pytest.raises(ValueError, match="is_desirable: expected a tensor for balanced=True, got"):
        running.update(Z)
    with pytest.raises(ValueError, match=r"is_desirable: expected shape \(4,\) like rewards"):
        running.update(Z, Z[:2])
    with pytest.raises(TypeError, match=r"rewards: expected a torch\.Tensor, got list"):
        running.update([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="balanced: expected False, got True in the state"):
        p.RunningRewardMean().load_state_dict(running.state_dict())
