# SPDX-License-Identifier: Apache-2.0
"""Losses on pairs and on marked answers, each beside what TRL's trainers compute in eager torch, up to the mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.pointwise import Row


def dpo(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, beta: float) -> Tensor:
    delta = (pc - rc) - (pr - rr)
    return -F.logsigmoid(beta * delta).mean()


def ipo(
    pc: Tensor,
    pr: Tensor,
    rc: Tensor,
    rr: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    tau: float,
) -> Tensor:
    chosen = (pc - rc) / chosen_lengths.clamp(min=1.0)
    rejected = (pr - rr) / rejected_lengths.clamp(min=1.0)
    return ((chosen - rejected - 1 / (2 * tau)) ** 2).mean()


def robust_dpo(
    pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, beta: float, smoothing: float
) -> Tensor:
    delta = (pc - rc) - (pr - rr)
    clean = -(1 - smoothing) * F.logsigmoid(beta * delta)
    flipped = -smoothing * F.logsigmoid(-beta * delta)
    return ((clean - flipped) / (1 - 2 * smoothing)).mean()


def exo_pair(
    pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, beta: float, smoothing: float
) -> Tensor:
    delta = (pc - rc) - (pr - rr)
    epsilon = torch.tensor(smoothing, device=pc.device)
    qw, log_qw = torch.sigmoid(beta * delta), F.logsigmoid(beta * delta)
    ql, log_ql = torch.sigmoid(-beta * delta), F.logsigmoid(-beta * delta)
    return (qw * (log_qw - torch.log1p(-epsilon)) + ql * (log_ql - torch.log(epsilon))).mean()


def nca(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, beta: float) -> Tensor:
    chosen, rejected = beta * (pc - rc), beta * (pr - rr)
    losses = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return losses.mean()


def sppo_hard(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, beta: float) -> Tensor:
    winner = ((pc - rc) - 0.5 / beta) ** 2
    loser = ((pr - rr) + 0.5 / beta) ** 2
    return (winner + loser).mean()


def apo_zero(pc: Tensor, pr: Tensor, rc: Tensor, rr: Tensor, beta: float) -> Tensor:
    chosen = 1 - torch.sigmoid(beta * (pc - rc))
    rejected = torch.sigmoid(beta * (pr - rr))
    return (chosen + rejected).mean()


def simpo(
    pc: Tensor,
    pr: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    gamma: float,
) -> Tensor:
    logits = pc / chosen_lengths - pr / rejected_lengths
    logits = logits - gamma / beta
    return -F.logsigmoid(beta * logits).mean()


def _log1mexp(x: Tensor) -> Tensor:
    return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def orpo(pc: Tensor, pr: Tensor, nll: Tensor, beta: float) -> Tensor:
    log_odds = (pc - pr) - (_log1mexp(pc) - _log1mexp(pr))
    return (nll - beta * F.logsigmoid(log_odds)).mean()


def kto(
    logps: Tensor,
    ref: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    kl_logps: Tensor,
    ref_kl_logps: Tensor,
    beta: float,
) -> Tensor:
    """``chosen`` and ``rejected`` index the rows, as the trainer does."""
    kl = (kl_logps - ref_kl_logps).mean().detach().clamp(min=0)
    good = logps.index_select(0, chosen) - ref.index_select(0, chosen)
    bad = logps.index_select(0, rejected) - ref.index_select(0, rejected)
    losses = torch.cat((1 - F.sigmoid(beta * (good - kl)), 1 - F.sigmoid(beta * (kl - bad))), 0)
    return losses.mean()


_POLICY, _REF, _LENGTHS = ("pc", "pr"), ("rc", "rr"), ("nc", "nr")
_SMOOTHED = {"beta": 0.1, "label_smoothing": 0.1}

ROWS = (
    Row("dpo_loss", dpo, _POLICY, _REF, {"beta": 0.1}, quick=True),
    Row("ipo_loss", ipo, _POLICY, (*_REF, *_LENGTHS), {"tau": 0.1}),
    Row("simpo_loss", simpo, _POLICY, _LENGTHS, {"beta": 2.5, "gamma": 1.25}),
    Row("orpo_loss", orpo, ("mc", "mr", "nll"), (), {"beta": 0.1}, quick=True),
    Row(
        "kto_loss",
        kto,
        ("pc",),
        ("rc", "good", "kl", "ref_kl"),
        {"beta": 0.1},
        rival_const=("rc", "chosen", "rejected", "kl", "ref_kl"),
        quick=True,
    ),
    Row("robust_dpo_loss", robust_dpo, _POLICY, _REF, _SMOOTHED),
    Row("exo_pair_loss", exo_pair, _POLICY, _REF, {"beta": 0.1, "label_smoothing": 1e-3}),
    Row("nca_loss", nca, _POLICY, _REF, {"beta": 0.1}),
    Row("sppo_hard_loss", sppo_hard, _POLICY, _REF, {"beta": 0.01}),
    Row("apo_loss", apo_zero, _POLICY, _REF, {"beta": 0.1, "variant": "zero"}),
)
