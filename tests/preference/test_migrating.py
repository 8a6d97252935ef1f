# SPDX-License-Identifier: Apache-2.0
"""Every row of the tables in docs/migrating.md: both columns, run as they are written, give the same numbers."""

from __future__ import annotations

import dataclasses
import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hotloop.logprob import linear_cross_entropy, linear_jsd, linear_logprob, token_logprob
from hotloop.preference import linear_preference_loss
from test_preference_peers import Model, Trainer
from torch import Tensor

pytestmark = [pytest.mark.peer, pytest.mark.source, pytest.mark.filterwarnings("ignore")]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migrating.md"
PAIRS, T, D, V = 4, 7, 6, 50
EVERYTHING = "x, W, y, ref_hidden=x_ref, ref_weight=W_ref"


def rows() -> list[tuple[str, str]]:
    """(their expression, ours), of all tables whose cells are code."""
    lines = re.findall(r"^\| `(.*)` \| `(.*)` \|$", PAGE.read_text(encoding="utf-8"), re.M)
    return [(theirs, ours.replace("...", EVERYTHING)) for theirs, ours in lines]


def inputs() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)

    def made(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, generator=g)

    y = torch.randint(0, V, (2 * PAIRS, T), generator=g)
    lengths = torch.tensor([3, 7, 5, 4, 6, 2, 7, 5])
    y[torch.arange(T) >= lengths[:, None]] = -100
    ids = torch.randint(0, V, (11,), generator=g)
    ids[::4] = -100
    x, W = made(2 * PAIRS, T, D), made(V, D, scale=0.6)
    found: dict[str, Any] = {
        "x": x, "W": W, "y": y, "x_ref": x + made(2 * PAIRS, T, D, scale=0.2), "W_ref": W + made(V, D, scale=0.1),
        "h": made(11, D), "b": made(V), "T": 0.7, "cap": 4.0, "scale": 0.5, "logits": made(11, V, scale=2.0),
        "hs": made(11, D), "Ws": made(V, D), "bs": made(V), "ht": made(11, 3), "Wt": made(V, 3), "bt": made(V),
        "ids": ids, "good": torch.arange(2 * PAIRS) % 3 > 0, "kl": torch.tensor([0.4]),
    }  # fmt: skip
    return found


LEAVES = ("x", "W", "h", "b", "logits", "hs", "Ws", "bs")


def token_logps(x: Tensor, W: Tensor, y: Tensor) -> Tensor:
    logps = (x @ W.T).log_softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return logps * (y != -100)


def trl_dpo(names: dict[str, Any]) -> Callable[..., Tensor]:
    """``DPOConfig(...)``: TRL's trainer with that configuration, its defaults for the rest, on these inputs."""
    trl = pytest.importorskip("trl")
    defaults = {
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()  # type: ignore[misc]
        for f in dataclasses.fields(trl.DPOConfig)
        if f.name in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef", "loss_type")
    }  # fmt: skip

    def loss(**settings: Any) -> Tensor:
        config = {**defaults, **settings}
        kind = config.pop("loss_type")
        y = names["y"]
        tokens = token_logps(names["x"], names["W"], y)
        refs = token_logps(names["x_ref"], names["W_ref"], y).sum(1).chunk(2)

        kinds = [kind] if isinstance(kind, str) else list(kind)
        trainer = Trainer(
            Model(tokens), loss_types=kinds, loss_weights=[1.0] * len(kinds), **config
        )
        shape = (len(y), T + 1)
        batch = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "completion_mask": torch.cat(
                (torch.zeros(len(y), 1, dtype=torch.long), (y != -100).long()), 1
            ),
            "ref_chosen_logps": refs[0],
            "ref_rejected_logps": refs[1],
        }
        found: Tensor = trl.DPOTrainer._compute_loss(trainer, trainer.model, batch, False)
        return found

    return loss


def trl_cpo(names: dict[str, Any]) -> Callable[..., Tensor]:
    """``CPOConfig(...)`` without the likelihood term: TRL's ``cpo_loss``."""
    module = pytest.importorskip("trl.experimental.cpo")
    defaults = {f.name: f.default for f in dataclasses.fields(module.CPOConfig)}

    def loss(**settings: Any) -> Tensor:
        config = {**defaults, **settings}
        assert config["cpo_alpha"] == 0
        assert defaults["cpo_alpha"] == 1.0
        sums = token_logps(names["x"], names["W"], names["y"]).sum(1)
        if config["loss_type"] == "simpo":  # the trainer hands means to that one
            sums = sums / (names["y"] != -100).sum(1)
        wanted = ("beta", "label_smoothing", "loss_type", "simpo_gamma", "alpha")
        trainer = Trainer(None, **{name: config[name] for name in wanted})
        losses: Tensor = module.CPOTrainer.cpo_loss(trainer, *sums.chunk(2))[0]
        return losses.mean()

    return loss


class DocumentedCrossEntropy:
    """Stands for Liger's Triton kernel, which has no CPU form: the mean over the tokens that count."""

    def __call__(self, weight: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(hidden @ weight.T, labels)


def imported(module: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip(module.partition(".")[0])
        return getattr(importlib.import_module(module), name)


def uncompiled(cls: Any) -> Callable[..., Any]:
    return lambda **settings: cls(compiled=False, **settings)


def peers(names: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        f"LigerFusedLinear{name}Loss": lambda name=name: uncompiled(
            imported("liger_kernel.chunked_loss", f"LigerFusedLinear{name}Loss")
        )
        for name in ("DPO", "ORPO", "CPO", "SimPO", "KTO", "JSD")
    }
    found["LigerFusedLinearCrossEntropyLoss"] = lambda: DocumentedCrossEntropy
    for module, names_of in {
        "trl.kernels": ("ChunkedLogProbFunction",),
        "trl.kernels.chunked_divergence": ("ChunkedDivergenceFunction",),
        "trl.trainer.utils": ("selective_log_softmax", "entropy_from_logits"),
    }.items():
        for name in names_of:
            found[name] = lambda module=module, name=name: imported(module, name)
    cce = "cut_cross_entropy"
    found["cce"] = lambda: (
        lambda *a, **k: imported(cce, "linear_cross_entropy")(*a, impl="torch_compile", **k)
    )
    found["DPOConfig"] = lambda: trl_dpo(names)
    found["CPOConfig"] = lambda: trl_cpo(names)
    return found


OURS = {
    "linear_logprob": linear_logprob,
    "token_logprob": token_logprob,
    "linear_jsd": linear_jsd,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_preference_loss": linear_preference_loss,
}


def value_and_gradients(expression: str, names: dict[str, Any]) -> list[Tensor]:
    leaves = {n: names[n].clone().requires_grad_() for n in LEAVES}
    scope = {**names, **leaves, **OURS}
    if "ChunkedLogProb" in expression or "selective" in expression or "token_logprob" in expression:
        scope["ids"] = names["ids"].clamp(min=0)  # TRL has no label to ignore there
    if "linear_logprob" in expression:
        scope["ids"] = names["ids"].clamp(min=0)
    for name, get in peers(scope).items():
        if name in expression:
            scope[name] = get()
    value = eval(expression, scope)  # a cell of our own page
    value = value[0] if isinstance(value, tuple) else value
    weights = torch.linspace(0.5, 1.5, value.numel()).reshape(value.shape)
    total = (value * weights).sum()
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if g is None else g for g in found)]


@pytest.mark.parametrize(("theirs", "ours"), rows(), ids=lambda cell: cell[:70])
def test_both_columns_give_the_same(theirs: str, ours: str) -> None:
    names = inputs()
    found, expected = value_and_gradients(ours, names), value_and_gradients(theirs, names)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a.reshape(b.shape) if a.numel() == b.numel() else a, b, rtol=1e-4, atol=2e-5
        )


def test_the_page_has_its_tables() -> None:
    """As many rows as lines of tables: none is left out because it is no code."""
    text = PAGE.read_text(encoding="utf-8")
    tables = re.findall(r"^\| (?!---)(.*) \|$", text, re.M)
    heads = [line for line in tables if line.endswith("| hotloop")]
    assert len(rows()) == len(tables) - len(heads)
    assert len(rows()) > 30


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "LigerFusedLinearJSDLoss()(hs, Ws, ht, Wt, ids)",
            "linear_jsd(hs, Ws, ht, Wt, labels=ids)",
        ),
        (
            'CPOConfig(loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=0.5)',
            'linear_preference_loss(x, W, y, loss="simpo", options={"beta": 2.0, "gamma": 1.0})',
        ),
    ],
    ids=["Liger's JSD has half of a cross-entropy in it", "simpo_gamma is not multiplied by beta"],
)
def test_another_objective_is_found_out(theirs: str, ours: str) -> None:
    found, expected = (value_and_gradients(text, inputs()) for text in (ours, theirs))
    assert abs(float(found[0]) - float(expected[0])) > 0.1
