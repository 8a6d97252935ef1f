# SPDX-License-Identifier: Apache-2.0
"""Errors of single losses, each with the value and the way out. Those of all: tests/core/test_pointwise_errors.py."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import hotloop.preference as p
import pytest
import torch
from hotloop.unlearn import npo_loss

Z = torch.zeros(4)
FOUR = (Z, Z, Z, Z)
TOKENS = torch.zeros(4, 3)
MARKS = torch.tensor([True, False, True, False])
MARGINS = torch.zeros(4, 2)


OTHERS: dict[str, partial[Any]] = {
    "conditional_reference: expected f_divergence='reverse_kl', got 'js'": partial(
        p.dpo_loss, *FOUR, f_divergence="js", conditional_reference=True
    ),
    "alpha: expected a number other than 1": partial(
        p.dpo_loss, *FOUR, f_divergence="alpha", alpha=1
    ),
    "win_rate_gap: expected a number >= -1 and <= 1, got 1.1": partial(
        p.dno_loss, *FOUR, win_rate_gap=1.1
    ),
    "tau: expected a number >= 0 and <= 0.5, got 0.6": partial(
        p.inpo_loss, *(Z,) * 6, eta=0.5, tau=0.6
    ),
    "expected either label or win_rate_gap, got neither": partial(p.dno_loss, *FOUR),
    "either label or win_rate_gap, got both": partial(p.dno_loss, *FOUR, Z, label=1.0),
    "either kl or policy_kl_logps with ref_kl_logps, got neither": partial(p.kto_loss, Z, Z, MARKS),
    "with ref_kl_logps, got both": partial(p.kto_loss, Z, Z, MARKS, Z, Z, kl=1.0),
    "num_samples: expected an integer >= 1, got 0": partial(
        p.hypo_loss, *(Z,) * 6, kl_weight=0.1, num_samples=0
    ),
    "beta: expected a number > 0, got 0": partial(p.preference_metrics, *FOUR, beta=0),
    "chosen_lengths: expected a value with alpha": partial(p.rpo_sft_loss, *FOUR, alpha=0.1),
    "alpha: expected None beside eta, got 0.1": partial(p.rpo_sft_loss, *FOUR, alpha=0.1, eta=0.1),
    "a multiple of num_samples=2 rows": partial(p.hypo_loss, *FOUR, Z[:3], Z[:3], kl_weight=1),
    r"policy_online_logps: expected shape \(4,\) like policy_chosen_logps for reduction='sum'": partial(
        p.hypo_loss, *FOUR, Z, Z, kl_weight=1, reduction="sum"
    ),
    r"policy_calibration_logps: expected shape \(4,\) .* got \(3,\). Use reduction='mean'": partial(
        p.vpo_loss, *FOUR, Z[:3], alpha=1.0, reduction="none"
    ),
    r"retain_nll: expected shape \(4,\) like policy_logps for reduction='none', got \(3,\)": partial(
        npo_loss, Z, retain_nll=Z[:3], reduction="none"
    ),
    r"weights: expected 3 numbers for 2 margin reward\(s\), got 2": partial(
        p.modpo_loss, *FOUR, MARGINS, MARGINS, weights=(1.0, 0.0)
    ),
    r"weights: expected 3 numbers .*, got Tensor": partial(
        p.modpo_loss, *FOUR, MARGINS, MARGINS, weights=torch.ones(3)
    ),
    r"weights\[0\]: expected a number > 0, got 0": partial(
        p.modpo_loss, *FOUR, MARGINS, MARGINS, weights=(0.0, 0.5, 0.5)
    ),
    "bc_coeff: expected 0 for advantages": partial(p.cpl_loss, Z, Z, bc_coeff=0.1),
    r"segment_logps_1: .*\(n, steps\), or adv": partial(p.cpl_loss, TOKENS[None], TOKENS[None]),
    r"segment_logps_1: expected shape \(n, steps\), got \(4,\)": partial(p.cpl_loss, Z, Z, Z, Z),
    r"scores: expected shape \(4,\), one per segment, got \(3,": partial(
        p.cpl_dense_loss, Z, Z[:3]
    ),
    "bc_coeff: expected 0 for advantages.* got 0.1": partial(p.cpl_dense_loss, Z, Z, bc_coeff=0.1),
    r"original_logratios: expected shape \(4, 3\) like truth_logratios, got \(4, 2\)": partial(
        p.opa_dpo_loss, TOKENS, TOKENS, TOKENS[:, :2], TOKENS, TOKENS, mode="released"
    ),
    r"revised_logratios: expected shape \(4, tokens\) like truth_logratios, got \(3, 3\)": partial(
        p.opa_dpo_loss, TOKENS, TOKENS[:3], TOKENS, TOKENS, TOKENS[:3]
    ),
}


@pytest.mark.parametrize("text", OTHERS)
def test_arguments_that_do_not_go_together(text: str) -> None:
    call = OTHERS[text]
    with pytest.raises(ValueError, match=rf"\[{call.func.__name__}\] .*{text}"):
        call()


def test_a_required_tensor_left_out() -> None:
    for i, name in enumerate(list(inspect.signature(p.dpo_loss).parameters)[:4]):
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
