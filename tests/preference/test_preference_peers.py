# SPDX-License-Identifier: Apache-2.0
"""Against TRL and Liger: their own code, run on the same log-probabilities."""

from __future__ import annotations

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import hotloop.preference as p
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.peer

B, T = 12, 9
BETA = 0.3


def logps(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (-20 + 4 * torch.randn(B, generator=g)).requires_grad_()


def same(ours: Tensor, theirs: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-6)
    found = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class Model:
    """What TRL's patched forward gives of these log-probabilities of tokens."""

    training = True

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __call__(self, **_: Any) -> Any:
        z = torch.zeros_like(self.tokens)
        return SimpleNamespace(log_probs=self.tokens, entropy=z, mean_logits=z, is_top1=z.bool())


class Trainer:
    """The attributes that DPOTrainer._compute_loss and KTOTrainer._compute_loss read."""

    def __init__(self, model: Any, **kwargs: Any) -> None:
        self.model = model
        self.accelerator = SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        )
        self.args = SimpleNamespace(discopop_tau=0.05)
        self.aux_loss_enabled = self.use_weighting = False
        self.precompute_ref_logps = True
        self.ld_alpha = None
        self.f_divergence_type, self.f_alpha_divergence_coef = "reverse_kl", 0.5
        self.label_smoothing = 0.0
        self.beta = BETA
        self._metrics: dict[str, Any] = {"train": defaultdict(list)}
        self._total_train_tokens, self._tp_size = 0, 1
        self.__dict__.update(kwargs)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Per-token log-probabilities (2 B, T), zero outside the answers, and the answers' mask."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, T + 1, (2 * B,), generator=g)
    mask = torch.arange(T) < counts[:, None]
    tokens = (-2 * torch.rand(2 * B, T, generator=g) * mask).requires_grad_()
    return tokens, mask


def trl_dpo(
    tokens: Tensor, mask: Tensor, refs: tuple[Tensor, Tensor], **kwargs: Any
) -> tuple[Tensor, dict[str, list[float]]]:
    trl = pytest.importorskip("trl")

    trainer = Trainer(Model(tokens), **{"loss_types": ["sigmoid"], "loss_weights": [1.0], **kwargs})
    prompt = torch.zeros(2 * B, 1, dtype=torch.long)
    inputs = {
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.long),
        "attention_mask": torch.ones(2 * B, T + 1, dtype=torch.long),
        "completion_mask": torch.cat((prompt, mask.long()), 1),
        "ref_chosen_logps": refs[0],
        "ref_rejected_logps": refs[1],
    }
    loss = trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    return loss, trainer._metrics["train"]


TRL_DPO: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
    ({"loss_types": ["sigmoid"]}, p.dpo_loss, {"beta": BETA}),
    ({"f_divergence_type": "forward_kl"}, p.dpo_loss, {"beta": BETA, "f_divergence": "forward_kl"}),
    ({"f_divergence_type": "js_divergence"}, p.dpo_loss, {"beta": BETA, "f_divergence": "js"}),
    (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
        p.dpo_loss,
        {"beta": BETA, "f_divergence": "alpha", "alpha": 0.7},
    ),
    ({"loss_types": ["hinge"]}, p.slic_hinge_loss, {"beta": BETA}),
    ({"loss_types": ["ipo"]}, p.ipo_loss, {"tau": BETA, "lengths": True}),
    (
        {"loss_types": ["exo_pair"], "label_smoothing": 0.01},
        p.exo_pair_loss,
        {"beta": BETA, "label_smoothing": 0.01},
    ),
    ({"loss_types": ["nca_pair"]}, p.nca_loss, {"beta": BETA}),
    (
        {"loss_types": ["robust"], "label_smoothing": 0.2},
        p.robust_dpo_loss,
        {"beta": BETA, "label_smoothing": 0.2},
    ),
    ({"loss_types": ["bco_pair"]}, p.bco_pair_loss, {"beta": BETA}),
    ({"loss_types": ["sppo_hard"]}, p.sppo_hard_loss, {"beta": BETA}),
    (
        {"loss_types": ["aot"], "label_smoothing": 0.2},
        p.aot_loss,
        {"beta": BETA, "label_smoothing": 0.2},
    ),
    ({"loss_types": ["aot_unpaired"]}, p.aot_loss, {"beta": BETA, "paired": False}),
    ({"loss_types": ["apo_zero"]}, p.apo_loss, {"beta": BETA}),
    ({"loss_types": ["apo_down"]}, p.apo_loss, {"beta": BETA, "variant": "down"}),
    ({"loss_types": ["sigmoid_norm"]}, p.dpo_norm_loss, {"beta": BETA, "lengths": True}),
]


@pytest.mark.parametrize("row", TRL_DPO, ids=lambda r: "-".join(str(v) for v in r[0].values()))
def test_trl_dpo_trainer(row: tuple[dict[str, Any], Any, dict[str, Any]]) -> None:
    settings, fn, kwargs = row
    tokens, mask = batch(0)
    refs = tuple((x.detach() * 0.9).sum(1) for x in tokens.chunk(2))
    theirs, _ = trl_dpo(tokens, mask, (refs[0], refs[1]), **settings)
    chosen, rejected = tokens.sum(1).chunk(2)
    lengths = mask.sum(1).chunk(2) if kwargs.get("lengths") else ()
    ours = fn(
        chosen, rejected, *refs, *lengths, **{k: v for k, v in kwargs.items() if k != "lengths"}
    )
    same(ours, theirs, [tokens])


def test_trl_sigmoid_plus_sft_averages_over_the_batch() -> None:
    leaf, mask = batch(1)
    tokens = leaf * mask
    chosen, rejected = tokens.sum(1).chunk(2)
    refs = chosen.detach() + 1, rejected.detach() - 1
    theirs, _ = trl_dpo(tokens, mask, refs, loss_types=["sigmoid", "sft"], loss_weights=[1.0, 0.3])
    counts = mask.sum(1)[:B]
    # Weights n_i / mean(n) turn our average per answer into TRL's average over all chosen tokens.
    ours = p.rpo_sft_loss(
        chosen,
        rejected,
        *refs,
        torch.full((B,), float(counts.float().mean())),
        beta=BETA,
        alpha=0.3,
    )
    same(ours, theirs, [leaf])


def test_trl_metrics() -> None:
    tokens, mask = batch(2)
    chosen, rejected = tokens.sum(1).chunk(2)
    refs = chosen.detach() * 0.8, rejected.detach() * 1.1
    _, logged = trl_dpo(tokens, mask, refs)
    ours = p.preference_metrics(chosen, rejected, *refs, beta=BETA)
    for name, value in ours.items():
        assert float(value) == pytest.approx(logged[name][0], rel=1e-5), name
    assert {k for k in logged if k.split("/")[0] in ("rewards", "logps")} == set(ours)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_trl_kto_trainer(loss_type: str) -> None:
    trl = pytest.importorskip("trl")
    tokens, mask = batch(3)
    g = torch.Generator().manual_seed(3)
    marks = torch.rand(2 * B, generator=g) < 0.6
    ref = tokens.detach().sum(1) * 0.9
    kl_tokens = -2 * torch.rand(2 * B, T, generator=g)
    ref_kl = kl_tokens.sum(1) - 0.4

    trainer = Trainer(
        Model(tokens),
        loss_type=loss_type,
        calculate_KL=loss_type == "kto",
        desirable_weight=1.0,
        undesirable_weight=1.2,
        _compute_kl_logps=lambda model, batch: kl_tokens.sum(1),
    )
    long = torch.zeros(2 * B, T + 1, dtype=torch.long)
    inputs = {
        "input_ids": long,
        "attention_mask": long + 1,
        "completion_mask": torch.cat((long[:, :1], mask.long()), 1),
        "label": marks,
        "ref_logps": ref,
        "ref_KL_logps": ref_kl,
    }
    theirs = trl.KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)
    baseline: dict[str, Any] = {"kl": 0.0}
    if loss_type == "kto":
        baseline = {"policy_kl_logps": kl_tokens.sum(1), "ref_kl_logps": ref_kl}
    ours = p.kto_loss(tokens.sum(1), ref, marks, **baseline, beta=BETA, undesirable_weight=1.2)
    same(ours, theirs, [tokens])


def experimental(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn that they are experimental
        return getattr(pytest.importorskip(f"trl.experimental.{module}"), name)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_trl_cpo_trainer(loss_type: str, alpha: float) -> None:
    trainer = Trainer(None, alpha=alpha, loss_type=loss_type, simpo_gamma=0.5, label_smoothing=0.1)
    # Means: TRL's alpha leaves float32 on sums.
    chosen, rejected = logps(0), logps(1)
    losses, *_ = experimental("cpo", "CPOTrainer").cpo_loss(trainer, chosen / 20, rejected / 20)
    ours = p.cpo_loss(
        chosen,
        rejected,
        chosen_lengths=20,
        rejected_lengths=20,
        beta=BETA,
        alpha=alpha,
        gamma=0.5 if loss_type == "simpo" else 0.0,
        label_smoothing=0.1,
    )
    same(ours, losses.mean(), [chosen, rejected])


def test_trl_orpo_trainer() -> None:
    trainer = Trainer(None)
    chosen, rejected = logps(0), logps(1)
    losses, *_ = experimental("orpo", "ORPOTrainer").odds_ratio_loss(
        trainer, chosen / 20, rejected / 20
    )
    nll = -chosen / 20
    theirs = (nll - losses).mean()
    same(p.orpo_loss(chosen / 20, rejected / 20, nll, beta=BETA), theirs, [chosen, rejected])


def liger(module: str, name: str) -> Any:
    return getattr(pytest.importorskip(f"liger_kernel.chunked_loss.{module}"), name)


LIGER_DPO: list[tuple[str, Any, dict[str, Any]]] = [
    ("sigmoid", p.dpo_loss, {}),
    ("hinge", p.slic_hinge_loss, {}),
    ("exo_pair", p.exo_pair_loss, {"label_smoothing": 0.01}),
    ("nca_pair", p.nca_loss, {}),
    ("robust", p.robust_dpo_loss, {"label_smoothing": 0.2}),
    ("bco_pair", p.bco_pair_loss, {}),
    ("sppo_hard", p.sppo_hard_loss, {}),
    ("apo_zero", p.apo_loss, {}),
    ("apo_down", p.apo_loss, {"variant": "down"}),
]


@pytest.mark.parametrize("row", LIGER_DPO, ids=lambda r: r[0])
def test_liger_dpo(row: tuple[str, Any, dict[str, Any]]) -> None:
    loss_type, fn, kwargs = row
    values = [logps(seed) for seed in range(4)]
    theirs, *_ = liger("dpo_loss", "LigerFusedLinearDPOFunction").preference_loss_fn(
        values[0],
        values[1],
        torch.empty(2 * B),
        values[2].detach(),
        values[3].detach(),
        beta=BETA,
        loss_type=loss_type,
        label_smoothing=kwargs.get("label_smoothing", 0.0),
    )
    same(fn(*values, beta=BETA, **kwargs), theirs, values[:2])


def test_liger_cpo_simpo_orpo() -> None:
    chosen, rejected = logps(0), logps(1)
    full = torch.empty(2 * B)
    theirs, *_ = liger("cpo_loss", "LigerFusedLinearCPOFunction").preference_loss_fn(
        chosen, rejected, full, beta=BETA, label_smoothing=0.1
    )
    same(p.cpo_loss(chosen, rejected, beta=BETA, label_smoothing=0.1), theirs, [chosen, rejected])
    theirs, *_ = liger("simpo_loss", "LigerFusedLinearSimPOFunction").preference_loss_fn(
        chosen / 20, rejected / 20, full, beta=2.0, gamma=0.5
    )
    ours = p.simpo_loss(chosen, rejected, 20, 20, beta=2.0, gamma=0.5)
    same(ours, theirs, [chosen, rejected])
    theirs, *_ = liger("orpo_loss", "LigerFusedLinearORPOFunction").preference_loss_fn(
        chosen / 20, rejected / 20, full, beta=BETA
    )
    ours = p.orpo_loss(chosen / 20, rejected / 20, torch.zeros(()), beta=BETA)
    same(ours, theirs, [chosen, rejected])


def test_liger_kto() -> None:
    policy, ref = logps(0), logps(1).detach()
    marks = torch.arange(B) % 3 > 0
    theirs, *_ = liger("kto_loss", "LigerFusedLinearKTOFunction").preference_loss_fn(
        policy, marks, torch.empty(B), ref, beta=BETA, kl=torch.tensor([0.8])
    )
    same(p.kto_loss(policy, ref, marks, kl=0.8, beta=BETA), theirs, [policy])
