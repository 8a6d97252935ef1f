"""Errors of single losses, each with the value and the way out. Those of all: tests/core/test_pointwise_errors.py."""

from __future__ import annotations

import inspect
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


OTHERS: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    (
        p.dpo_loss,
        FOUR,
        {"f_divergence": "js", "conditional_reference": True},
        "conditional_reference: expected f_divergence='reverse_kl', got 'js'",
    ),
    (
        p.dpo_loss,
        FOUR,
        {"f_divergence": "alpha", "alpha": 1},
        "alpha: expected a number other than 1",
    ),
    (
        p.dno_loss,
        FOUR,
        {"win_rate_gap": 1.1},
        "win_rate_gap: expected a number >= -1 and <= 1, got 1.1",
    ),
    (
        p.inpo_loss,
        (Z,) * 6,
        {"eta": 0.5, "tau": 0.6},
        "tau: expected a number >= 0 and <= 0.5, got 0.6",
    ),
    (p.dno_loss, FOUR, {}, "expected either label or win_rate_gap, got neither"),
    (p.dno_loss, (*FOUR, Z), {"label": 1.0}, "either label or win_rate_gap, got both"),
    (p.kto_loss, (Z, Z, MARKS), {}, "either kl or policy_kl_logps with ref_kl_logps, got neither"),
    (p.kto_loss, (Z, Z, MARKS, Z, Z), {"kl": 1.0}, "with ref_kl_logps, got both"),
    (
        p.hypo_loss,
        (Z,) * 6,
        {"kl_weight": 0.1, "num_samples": 0},
        "num_samples: expected an integer >= 1, got 0",
    ),
    (p.preference_metrics, FOUR, {"beta": 0}, "beta: expected a number > 0, got 0"),
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
