# SPDX-License-Identifier: Apache-2.0
"""Laws that need no reference: known values, symmetries, one loss as a special case of another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import hotloop.preference as p
import pytest
import torch
from hotloop.unlearn import npo_loss
from pointwise_cases import BY_ID, Case
from torch import Tensor

LN2 = math.log(2)
IMPLS = pytest.mark.parametrize("impl", ["cpu", "reference"])


def pair(n: int = 33, seed: int = 0) -> list[Tensor]:
    """policy chosen, policy rejected, reference chosen, reference rejected."""
    g = torch.Generator().manual_seed(seed)
    return [-40 + 6 * torch.randn(n, generator=g, dtype=torch.float64) for _ in range(4)]


def close(a: Tensor, b: Tensor | float, rtol: float = 1e-11, atol: float = 1e-12) -> None:
    torch.testing.assert_close(
        a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=rtol, atol=atol
    )


Q = 0.5 * (math.log(0.5) - math.log1p(-1e-3)) + 0.5 * (math.log(0.5) - math.log(1e-3))
AT_REFERENCE: list[tuple[str, Callable[..., Tensor], dict[str, Any], float]] = [
    ("dpo", p.dpo_loss, {}, LN2),
    ("dpo-forward_kl", p.dpo_loss, {"f_divergence": "forward_kl"}, LN2),
    ("dpo-js", p.dpo_loss, {"f_divergence": "js"}, LN2),
    ("dpo-alpha", p.dpo_loss, {"f_divergence": "alpha"}, LN2),
    ("conservative", p.conservative_dpo_loss, {"label_smoothing": 0.3}, LN2),
    ("robust", p.robust_dpo_loss, {"label_smoothing": 0.3}, LN2),
    ("dpo_norm", p.dpo_norm_loss, {"chosen_lengths": 7, "rejected_lengths": 9}, LN2),
    ("flex", p.flex_dpo_loss, {}, LN2),
    ("drift", p.drift_iterative_dpo_loss, {}, LN2),
    ("dno", p.dno_loss, {"label": 0.2}, LN2),
    ("hinge", p.slic_hinge_loss, {"delta": 1.5}, 1.5),
    ("exo", p.exo_pair_loss, {}, Q),
    ("apo zero", p.apo_loss, {}, 1.0),
    ("apo down", p.apo_loss, {"variant": "down"}, 1.0),
    ("aot", p.aot_loss, {}, LN2),
    ("aot unpaired", p.aot_loss, {"paired": False}, LN2),
    ("nca", p.nca_loss, {}, 2 * LN2),
    ("bco pair", p.bco_pair_loss, {}, 2 * LN2),
    ("ipo", p.ipo_loss, {"tau": 0.2}, 1 / (4 * 0.2**2)),
    ("online ipo", p.online_ipo_loss, {"tau": 0.2}, 1 / (4 * 0.2**2)),
    ("sppo hard", p.sppo_hard_loss, {"beta": 0.25}, 0.5 / 0.25**2),
    ("xpo", p.xpo_loss, {"policy_ref_sample_logps": torch.zeros(33), "link": "ipo"}, 25.0),
]


@IMPLS
@pytest.mark.parametrize("row", AT_REFERENCE, ids=lambda r: r[0])
def test_value_at_the_reference(row: tuple[str, Any, dict[str, Any], float], impl: str) -> None:
    _, fn, kwargs, value = row
    chosen, rejected, *_ = pair()
    close(fn(chosen, rejected, chosen, rejected, **kwargs, reduction="none", impl=impl), value)


def test_value_at_the_reference_of_the_other_forms() -> None:
    logps = pair()[0]
    z = torch.zeros(4, dtype=torch.float64)
    marks = torch.tensor([True, False, True, False])
    close(p.kto_loss(logps[:4], logps[:4], marks, kl=0.0, reduction="none"), 0.5)
    close(p.bco_loss(logps[:4], logps[:4], marks, reduction="none"), LN2)
    close(p.sppo_loss(logps, logps, 0.5), 0.0)
    close(p.srpo_loss(z, z, z, z, z, z, beta=0.3), 0.25)
    close(p.orpo_loss(-z - 1, -z - 1, z), 0.1 * LN2)
    close(npo_loss(logps, logps, beta=0.5), 4 * LN2)
    tokens = torch.zeros(4, 3, dtype=torch.float64)
    close(p.opa_dpo_loss(*[tokens] * 5), (2 + 2 * 0.2 + 4) * LN2)


@pytest.mark.parametrize("eps", [0.0, 0.2, 0.5])
def test_swapping_the_pair_flips_the_sign_of_the_margin(eps: float) -> None:
    pc, pr, rc, rr = pair()
    kwargs: dict[str, Any] = {"label_smoothing": eps, "reduction": "none"}
    there = p.conservative_dpo_loss(pc, pr, rc, rr, **kwargs)
    back = p.conservative_dpo_loss(pr, pc, rr, rc, **kwargs)
    close(there - back, -(1 - 2 * eps) * 0.1 * ((pc - rc) - (pr - rr)))


def test_robust_dpo_is_unbiased_over_flips() -> None:
    pc, pr, rc, rr = pair()
    kwargs: dict[str, Any] = {"label_smoothing": 0.3, "reduction": "none"}
    clean = p.dpo_loss(pc, pr, rc, rr, reduction="none")
    there = p.robust_dpo_loss(pc, pr, rc, rr, **kwargs)
    back = p.robust_dpo_loss(pr, pc, rr, rc, **kwargs)
    close(0.7 * there + 0.3 * back, clean)


SHIFT_INVARIANT = (
    "dpo",
    "dpo-conditional",
    "conservative_dpo-rows",
    "robust_dpo",
    "slic_hinge",
    "exo_pair",
    "aot-paired",
    "ipo",
    "inpo",
    "cpo-no_nll",
    "modpo",
)


@pytest.mark.parametrize("id", SHIFT_INVARIANT)
def test_a_shift_of_both_answers_changes_nothing(id: str) -> None:
    case = BY_ID[id]
    grad, const = case.inputs(40, torch.float64)
    shift = torch.linspace(-30, 30, 40, dtype=torch.float64)
    moved = {name: x + shift for name, x in grad.items()}
    base = case.fn(**grad, **const, **case.kwargs, reduction="none")
    close(case.fn(**moved, **const, **case.kwargs, reduction="none"), base, rtol=1e-10)
    leaves = {name: x.requires_grad_() for name, x in grad.items()}
    found = torch.autograd.grad(
        case.fn(**leaves, **const, **case.kwargs, reduction="sum"), list(leaves.values())
    )
    close(found[0] + found[1], 0.0)


WITH_REFERENCE = [
    c for c in BY_ID.values() if "ref_chosen_logps" in c.const and c.op != "flex_dpo_loss"
]


@pytest.mark.parametrize("case", WITH_REFERENCE, ids=lambda c: c.id)
def test_a_shift_of_policy_and_reference_changes_nothing(case: Case) -> None:
    if case.op in ("inpo_loss", "rpo_sft_loss") or case.id in ("dpo-conditional", "aot-paired"):
        pytest.skip("this loss sees policy and reference apart")
    grad, const = case.inputs(20, torch.float64)
    shift = torch.linspace(-3, 3, 20, dtype=torch.float64)
    base = case.fn(**grad, **const, **case.kwargs)
    for name in ("chosen", "rejected"):
        a, b = dict(grad), dict(const)
        a[f"policy_{name}_logps"] = grad[f"policy_{name}_logps"] + shift
        b[f"ref_{name}_logps"] = const[f"ref_{name}_logps"] + shift
        close(case.fn(**a, **b, **case.kwargs), base, rtol=1e-10)


def test_srpo_does_not_change_when_the_pair_is_swapped() -> None:
    g = torch.Generator().manual_seed(2)
    t_wl, t_lw, t_ll, t_ww, g_w, g_l = torch.randn(6, 20, generator=g, dtype=torch.float64)
    label = torch.rand(20, generator=g, dtype=torch.float64)
    there = p.srpo_loss(t_wl, t_lw, t_ll, t_ww, g_w, g_l, label, beta=0.7, reduction="none")
    back = p.srpo_loss(t_lw, t_wl, t_ww, t_ll, g_l, g_w, 1 - label, beta=0.7, reduction="none")
    close(back, there)


def test_modpo_sees_only_the_difference_of_margin_rewards() -> None:
    case = BY_ID["modpo"]
    grad, const = case.inputs(20, torch.float64)
    base = case.fn(**grad, **const, **case.kwargs)
    moved = {k: v + 3.0 if "margin" in k else v for k, v in const.items()}
    close(case.fn(**grad, **moved, **case.kwargs), base)


def test_cpl_with_a_bias_is_not_shift_invariant() -> None:
    a1, a2 = pair()[:2]
    base = p.cpl_loss(a1, a2, lam=0.5)
    assert abs(p.cpl_loss(a1 + 5, a2 + 5, lam=0.5) - base) > 1e-2
    close(p.cpl_loss(a1 + 5, a2 + 5, lam=1.0), p.cpl_loss(a1, a2, lam=1.0), rtol=1e-10)


def test_special_cases_of_dpo() -> None:
    pc, pr, rc, rr = pair()
    extra = pair(seed=1)[0]
    same = {"beta": 0.3, "reduction": "none"}
    dpo = p.dpo_loss(pc, pr, rc, rr, **same)
    ones = torch.ones(33, dtype=torch.int64)
    none = torch.empty(33, 0, dtype=torch.float64)
    for other in (
        p.conservative_dpo_loss(pc, pr, rc, rr, label_smoothing=0.0, **same),
        p.conservative_dpo_loss(pc, pr, rc, rr, label_smoothing=torch.zeros(33), **same),
        p.robust_dpo_loss(pc, pr, rc, rr, label_smoothing=0.0, **same),
        p.flex_dpo_loss(pc, pr, rc, rr, beta_chosen=0.3, beta_rejected=0.3, reduction="none"),
        p.drift_iterative_dpo_loss(pc, pr, rc, rr, **same),
        p.dno_loss(pc, pr, rc, rr, label=1.0, eta=0.3, reduction="none"),
        p.dpo_norm_loss(pc, pr, rc, rr, ones, ones, **same),
        p.dpo_norm_loss(pc, pr, rc, rr, 5, 5, beta=1.5, reduction="none"),
        p.vpo_loss(pc, pr, rc, rr, extra, alpha=0.0, **same),
        p.selm_loss(pc, pr, rc, rr, extra, alpha=0.0, **same),
        p.xpo_loss(pc, pr, rc, rr, extra, alpha=0.0, **same),
        p.rpo_sft_loss(pc, pr, rc, rr, eta=0.0, **same),
        p.rpo_sft_loss(pc, pr, rc, rr, ones, alpha=0.0, **same),
        p.hypo_loss(pc, pr, rc, rr, extra, extra, kl_weight=0.0, num_samples=1, **same),
        p.modpo_loss(pc, pr, rc, rr, none, none, weights=(1.0,), **same),
        p.cpo_loss(pc - rc, pr - rr, **same),
        p.cpl_loss(
            (pr - rr).unsqueeze(1), (pc - rc).unsqueeze(1), alpha=0.3, lam=1.0, reduction="none"
        ),
        0.15 * npo_loss(pr - rr - (pc - rc), **same),
    ):
        close(other, dpo)
    forward_kl = p.dpo_loss(pc, pr, pc + 1, pr + 2, f_divergence="forward_kl", reduction="none")
    alpha_0 = p.dpo_loss(pc, pr, pc + 1, pr + 2, f_divergence="alpha", alpha=0.0, reduction="none")
    close(alpha_0, forward_kl)
    alpha_1 = p.dpo_loss(pc, pr, rc, rr, f_divergence="alpha", alpha=1 - 1e-9, **same)
    close(alpha_1, dpo, rtol=1e-6)
    agrees = torch.maximum(rc, rr), torch.minimum(rc, rr)
    close(
        p.dpo_loss(pc, pr, *agrees, conditional_reference=True, **same),
        p.dpo_loss(pc, pr, *agrees, **same),
    )
    for i in range(3):
        one = [x[i : i + 1] for x in (pc, pr, rc, rr)]
        close(p.aot_loss(*one, **same), dpo[i : i + 1])
        close(p.aot_loss(*one, paired=False, **same), dpo[i : i + 1])


def test_special_cases_of_ipo() -> None:
    pc, pr, rc, rr = pair()
    tc, tr = pair(seed=3)[:2]
    ipo = p.ipo_loss(pc, pr, rc, rr, tau=0.2, reduction="none")
    close(p.online_ipo_loss(pc, pr, rc, rr, 1.0, tau=0.2, reduction="none"), ipo)
    close(p.online_ipo_loss(pr, pc, rr, rc, 0.0, tau=0.2, reduction="none"), ipo)
    close(p.inpo_loss(pc, pr, rc, rr, tc, tr, eta=0.2, tau=0.2, reduction="none"), ipo)
    close(p.inpo_loss(pc, pr, tc, tr, rc, rr, eta=0.2, tau=0.0, reduction="none"), ipo)
    close(p.xpo_loss(pc, pr, rc, rr, tc, beta=0.2, alpha=0.0, link="ipo", reduction="none"), ipo)
    lengths = torch.full((33,), 4)
    scaled = p.ipo_loss(pc / 4, pr / 4, rc / 4, rr / 4, tau=0.2, reduction="none")
    close(p.ipo_loss(pc, pr, rc, rr, lengths, lengths, tau=0.2, reduction="none"), scaled)


def test_losses_of_a_pair_as_two_losses_of_an_answer() -> None:
    pc, pr, rc, rr = pair()
    up, down = torch.ones(33, dtype=torch.bool), torch.zeros(33)
    kwargs: dict[str, Any] = {"beta": 0.3, "reduction": "none"}
    close(
        p.kto_loss(pc, rc, up, kl=0.0, **kwargs) + p.kto_loss(pr, rr, down, kl=0.0, **kwargs),
        p.apo_loss(pc, pr, rc, rr, **kwargs),
    )
    close(
        p.bco_loss(pc, rc, up, delta=0.7, **kwargs) + p.bco_loss(pr, rr, down, delta=0.7, **kwargs),
        p.bco_pair_loss(pc, pr, rc, rr, delta=0.7, **kwargs),
    )
    close(
        p.sppo_loss(pc, rc, 1.0, eta=1 / 0.3, reduction="none")
        + p.sppo_loss(pr, rr, 0.0, eta=1 / 0.3, reduction="none"),
        p.sppo_hard_loss(pc, pr, rc, rr, **kwargs),
    )


def test_optimistic_losses_are_one_loss_with_other_roles() -> None:
    pc, pr, rc, rr = pair()
    sample = pair(seed=4)[0]
    vpo = p.vpo_loss(pc, pr, rc, rr, sample, alpha=0.05, beta=0.2, mode="online")
    close(p.selm_loss(pc, pr, rc, rr, sample, alpha=0.05, beta=0.2), vpo)
    close(p.xpo_loss(pc, pr, rc, rr, sample, alpha=0.05 * 0.2, beta=0.2), vpo)
    offline = p.vpo_loss(pc, pr, rc, rr, pc, alpha=0.05, beta=0.2, mode="offline")
    close(p.rpo_sft_loss(pc, pr, rc, rr, eta=0.05, beta=0.2), offline)
    # Calibration samples of another number: the same mean term.
    twice = torch.cat((sample, sample))
    close(p.vpo_loss(pc, pr, rc, rr, twice, alpha=0.05, beta=0.2, mode="online"), vpo)


def test_vpo_gradient_of_calibration_samples_is_a_constant() -> None:
    pc, pr, rc, rr = pair()
    for m in (33, 8):
        calibration = torch.randn(m, dtype=torch.float64, requires_grad=True)
        loss = p.vpo_loss(pc, pr, rc, rr, calibration, alpha=0.05, beta=0.2)
        close(torch.autograd.grad(loss, calibration)[0], -0.05 * 0.2 / m)


def test_without_a_reference() -> None:
    pc, pr, *_ = pair()
    nc, nr = torch.full((33,), 20), torch.full((33,), 30)
    nll = torch.rand(33, dtype=torch.float64)
    kwargs: dict[str, Any] = {"beta": 2.0, "reduction": "none"}
    means = p.cpo_loss(pc / 20, pr / 30, nll, **kwargs)
    close(p.simpo_loss(pc, pr, nc, nr, nll, gamma=0.0, **kwargs), means)
    close(p.cpo_loss(pc, pr, nll, nc, nr, **kwargs), means)
    close(p.cpo_loss(pc, pr, nll, nc, nr, alpha=1e-9, **kwargs), means, rtol=1e-6)
    close(
        p.simpo_loss(pc, pr, nc, nr, gamma=0.5, **kwargs),
        p.cpo_loss(pc, pr, chosen_lengths=nc, rejected_lengths=nr, gamma=0.5, **kwargs),
    )
    close(p.slic_hinge_loss(pc, pr), p.slic_hinge_loss(pc, pr, 0 * pc, 0 * pr, beta=1.0))
    # One NLL for the batch counts once in the mean.
    whole = p.cpo_loss(pc, pr, nll.mean()), p.cpo_loss(pc, pr, nll)
    close(whole[0], whole[1])
    assert p.orpo_loss(-pc.abs(), -pr.abs(), torch.tensor(0.3)).shape == ()


def test_opa_dpo_is_two_dpo_losses_that_share_the_rejected_answer() -> None:
    g = torch.Generator().manual_seed(0)
    truth, revised, original = torch.randn(3, 12, 7, generator=g, dtype=torch.float64)
    off: dict[str, Any] = {"image_coeff": 0.0, "anchor_coeff": 0.0, "reduction": "none"}
    z = torch.zeros(12, dtype=torch.float64)
    two = sum(
        p.dpo_loss(x.sum(1), original.sum(1), z, z, reduction="none") for x in (truth, revised)
    )
    close(p.opa_dpo_loss(truth, revised, original, truth, revised, **off), two)
    weight = torch.full((12, 7), 0.5, dtype=torch.float64)
    weighted = p.opa_dpo_loss(truth, revised, original, truth, revised, weight, weight, **off)
    half = p.dpo_loss(revised.sum(1), original.sum(1), z, z, beta=0.05, reduction="none")
    close(weighted, p.dpo_loss(truth.sum(1), original.sum(1), z, z, reduction="none") + half)


def test_opa_dpo_anchor_pushes_chosen_answers_up_except_as_released() -> None:
    tokens = [torch.zeros(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    only_anchor: dict[str, Any] = {"image_coeff": 0.0, "reduction": "sum"}
    for mode, sign in (("sequence", -1), ("released", 1)):
        with_anchor = p.opa_dpo_loss(*tokens, **only_anchor, mode=mode)
        without = p.opa_dpo_loss(*tokens, **only_anchor, mode=mode, anchor_coeff=0.0)
        truth, revised, *_ = torch.autograd.grad(with_anchor - without, tokens)
        assert bool((truth < 0).all())
        assert bool((revised.sign() == sign).all())


def test_dense_cpl_is_the_mean_over_ordered_pairs() -> None:
    g = torch.Generator().manual_seed(5)
    logps = torch.randn(6, 4, generator=g, dtype=torch.float64)
    scores = torch.tensor([3.0, 1.0, 2.0, 6.0, 5.0, 4.0])
    rows = [
        p.cpl_loss(logps[j : j + 1], logps[i : i + 1], lam=0.7)
        for i, j in itertools.permutations(range(6), 2)
        if scores[i] > scores[j]
    ]
    close(p.cpl_dense_loss(logps, scores, lam=0.7), torch.stack(rows).mean())
    cloned = p.cpl_dense_loss(logps, scores, lam=0.7, bc_coeff=0.1)
    close(cloned, torch.stack(rows).mean() - 0.1 * logps.mean())


def test_minima_of_soft_labels() -> None:
    eps = 0.2
    z = torch.zeros(1, dtype=torch.float64)
    best = torch.full((1,), math.log((1 - eps) / eps), dtype=torch.float64, requires_grad=True)
    cdpo = p.conservative_dpo_loss(best, z, z, z, beta=1.0, label_smoothing=eps)
    close(cdpo, -(eps * math.log(eps) + (1 - eps) * math.log(1 - eps)))
    close(torch.autograd.grad(cdpo, best)[0], 0.0)
    exo = p.exo_pair_loss(best, z, z, z, beta=1.0, label_smoothing=eps)
    close(exo, 0.0)
    close(torch.autograd.grad(exo, best)[0], 0.0)
    gap = torch.tensor([0.6], dtype=torch.float64)
    at = (gap / 0.25).requires_grad_()
    dno = p.dno_loss(at, z, z, z, gap, eta=0.25)
    close(torch.autograd.grad(dno, at)[0], 0.0)
    close(p.online_ipo_loss((gap - 0.5) / 0.25, z, z, z, gap, tau=0.25), 0.0)


def test_bounds() -> None:
    pc, pr, rc, rr = pair(200)
    kwargs: dict[str, Any] = {"beta": 1.0, "reduction": "none"}
    for variant in ("zero", "down"):
        apo = p.apo_loss(pc, pr, rc, rr, variant=variant, **kwargs)
        assert bool(((apo >= 0) & (apo <= 2)).all())
    for delta in (-1.0, 0.0, 2.0):
        upper = p.bco_pair_loss(pc, pr, rc, rr, delta=delta, **kwargs)
        assert bool((upper >= p.dpo_loss(pc, pr, rc, rr, **kwargs) - 1e-12).all())


def test_aot_is_the_cheapest_matching() -> None:
    pc, pr, rc, rr = pair(6, seed=7)
    for paired, (a, b) in ((True, (pc - pr, rc - rr)), (False, (pc - rc, pr - rr))):
        best = min(
            float(torch.nn.functional.softplus(-0.3 * (a - b[list(order)])).mean())
            for order in itertools.permutations(range(6))
        )
        ours = p.aot_loss(pc, pr, rc, rr, paired=paired, beta=0.3)
        close(ours, best)
        order = torch.tensor([3, 1, 5, 0, 2, 4])
        close(p.aot_loss(*(x[order] for x in (pc, pr, rc, rr)), paired=paired, beta=0.3), best)


def test_srpo_vanishes_at_its_closed_form_solution() -> None:
    k, beta = 5, 0.7
    g = torch.Generator().manual_seed(0)
    wins = torch.rand(k, k, generator=g, dtype=torch.float64)
    wins = torch.triu(wins, 1) + torch.tril(1 - wins.T, -1) + 0.5 * torch.eye(k)
    ref = torch.softmax(torch.randn(k, generator=g, dtype=torch.float64), 0)
    # improver[y2, y1] = ref(y2) exp(P(y2 > y1) / beta) / Z(y1); generator(y) ~ ref(y) / Z(y).
    unnormalised = ref[:, None] * torch.exp(wins / beta)
    z = unnormalised.sum(0)
    t = torch.log(unnormalised / z) - torch.log(ref)[:, None]
    generator = torch.log(ref / z) - torch.log((ref / z).sum()) - torch.log(ref)
    w, l = (x.flatten() for x in torch.meshgrid(torch.arange(k), torch.arange(k), indexing="ij"))
    for alpha in (0.1, 0.9):
        loss = p.srpo_loss(
            t[w, l], t[l, w], t[l, l], t[w, w], generator[w], generator[l], wins[w, l],
            beta=beta, alpha=alpha, reduction="none",
        )  # fmt: skip
        close(loss, 0.0)
    wrong = p.srpo_loss(t[w, l], t[l, w], t[l, l] + 0.1, t[w, w], generator[w], generator[l],
                        wins[w, l], beta=beta)  # fmt: skip
    assert wrong > 1e-4


@pytest.mark.parametrize("k", [1, 2])
def test_hypo_online_term_has_the_gradient_of_the_kl(k: int) -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(4, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(4, generator=g, dtype=torch.float64), 0)
    policy = torch.log_softmax(logits, 0)
    draws = torch.tensor(list(itertools.product(range(4), repeat=k)))
    chance = policy.detach()[draws].sum(1).exp()
    z = torch.zeros(len(draws), dtype=torch.float64)
    rows = p.hypo_loss(
        z, z, z, z, policy[draws.flatten()], ref[draws.flatten()],
        kl_weight=0.3, num_samples=k, reduction="none",
    )  # fmt: skip
    (found,) = torch.autograd.grad((chance * rows).sum(), logits, retain_graph=True)
    kl = (policy.exp() * (policy - ref)).sum()
    (expected,) = torch.autograd.grad(0.3 * kl, logits)
    close(found, expected)


def test_npo_becomes_gradient_ascent_for_a_small_beta() -> None:
    logps = pair()[0].requires_grad_()
    loss = npo_loss(logps, pair()[1], beta=1e-6)
    close(torch.autograd.grad(loss, logps)[0], 1 / 33, rtol=1e-4)


def test_kto_baseline_is_clamped_averaged_and_constant() -> None:
    logps, ref, more, less = pair()
    marks = torch.arange(33) % 2
    high, low = more.abs(), more.abs() - 2.0
    for a, b, z0 in ((high, low, 2.0), (low, high, 0.0)):
        ours = p.kto_loss(logps, ref, marks, a, b)
        close(ours, p.kto_loss(logps, ref, marks, kl=z0))
        close(ours, p.kto_loss(logps, ref, marks, kl=torch.tensor([z0])))
    leaf = less.requires_grad_()
    assert not p.kto_loss(logps, ref, marks, leaf, more).requires_grad


def test_kto_weights_each_class() -> None:
    logps, ref, *_ = pair()
    marks = torch.arange(33) % 2 == 0
    rows = p.kto_loss(logps, ref, marks, kl=0.0, reduction="none")
    weighted = p.kto_loss(
        logps, ref, marks, kl=0.0, desirable_weight=2.0, undesirable_weight=3.0, reduction="none"
    )
    close(weighted, torch.where(marks, 2 * rows, 3 * rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orpo_survives_an_answer_of_probability_one(dtype: torch.dtype) -> None:
    chosen = torch.tensor([0.0, -1.0, -1e-9], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1.0, 0.0, -1e-9], dtype=dtype, requires_grad=True)
    nll = torch.zeros(3, dtype=dtype)
    loss = p.orpo_loss(chosen, rejected, nll, reduction="none", impl="cpu")
    assert bool(torch.isfinite(loss).all())
    for x in torch.autograd.grad(loss.sum(), (chosen, rejected)):
        assert bool(torch.isfinite(x).all())


def test_orpo_keeps_its_digits_near_zero() -> None:
    a = torch.tensor([-1e-5], dtype=torch.float32)
    b = torch.tensor([-2e-5], dtype=torch.float32)
    ours = p.orpo_loss(a, b, torch.zeros(1), beta=1.0)
    # odds = a - log(-expm1(a)): the difference is ln 2 to first order.
    close(ours.double(), math.log1p(0.5), rtol=1e-5)


def test_integer_lengths_are_exact_in_half_precision() -> None:
    logps = torch.full((1,), -512.0, dtype=torch.bfloat16)
    z = torch.zeros(1, dtype=torch.bfloat16)
    lengths = torch.tensor([1001])
    ours = p.simpo_loss(logps, z, lengths, lengths, gamma=0.0, beta=1.0)
    close(ours.double(), math.log1p(math.exp(512 / 1001)), rtol=1e-6)


def test_lengths_below_one_count_as_one() -> None:
    pc, pr, rc, rr = pair(2)
    zero, one = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    close(p.dpo_norm_loss(pc, pr, rc, rr, zero, 0), p.dpo_norm_loss(pc, pr, rc, rr, one, 1.0))


def test_running_reward_mean_is_the_mean_of_all_rewards() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, generator=g) * 3 + 1 for n in (5, 1, 0, 17)]
    marks = [torch.rand(len(b), generator=g) < 0.7 for b in batches]
    pooled, balanced = p.RunningRewardMean(), p.RunningRewardMean(balanced=True)
    close(pooled.delta, 0.0)
    for rewards, mark in zip(batches, marks):
        leaf = rewards.clone().requires_grad_()
        a, b = pooled.update(leaf), balanced.update(leaf, mark)
        assert not a.requires_grad
    everything, mark = torch.cat(batches).double(), torch.cat(marks)
    close(a.double(), float(everything.mean()), rtol=1e-6)
    by_class = (everything[mark].mean() + everything[~mark].mean()) / 2
    close(b.double(), float(by_class), rtol=1e-6)
    again = p.RunningRewardMean(balanced=True)
    again.load_state_dict(balanced.state_dict())
    assert torch.equal(again.update(batches[0], marks[0]), balanced.update(batches[0], marks[0]))
    logps = torch.randn(4)
    assert p.bco_loss(logps, logps, mark[:4], delta=a).shape == ()


def test_running_reward_mean_sees_one_class_only() -> None:
    running = p.RunningRewardMean(balanced=True)
    close(running.update(torch.tensor([2.0, 4.0]), torch.ones(2)), 3.0)


def test_metrics_are_means_without_gradient() -> None:
    pc, pr, rc, rr = pair()
    found = p.preference_metrics(pc.requires_grad_(), pr, rc, rr, beta=0.3)
    assert list(found) == [
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    ]
    assert all(x.shape == () and not x.requires_grad for x in found.values())
    close(found["rewards/margins"], found["rewards/chosen"] - found["rewards/rejected"])
    tie = p.preference_metrics(pc, pc, rc, rc)
    close(tie["rewards/accuracies"], 0.0)


@IMPLS
@pytest.mark.parametrize("rho", [math.inf, math.nan])
def test_a_desirable_answer_ignores_its_density_weight(impl: str, rho: float) -> None:
    """A classifier that was run over the undesirable answers alone leaves NaN beside the others."""
    logps, up = torch.zeros(3, requires_grad=True), torch.tensor([True, False, True])

    def losses(weights: list[float]) -> Tensor:
        rho = torch.tensor(weights)
        return p.bco_loss(
            logps, torch.zeros(3), up, density_weights=rho, reduction="none", impl=impl
        )

    found, wanted = losses([rho, 0.5, rho]), losses([1.0, 0.5, 1.0])
    assert torch.equal(found, wanted)
    (gradient,), (right,) = (torch.autograd.grad(x.sum(), logps) for x in (found, wanted))
    assert torch.equal(gradient, right)
