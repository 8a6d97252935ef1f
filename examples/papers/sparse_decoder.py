# SPDX-License-Identifier: Apache-2.0
"""The demo's decoder with experts in the place of its feed-forward layers: is it better after the same time?

Run it with ``python -m examples.papers.sparse_decoder`` from the root of the repository. Three decoders of one width
and depth read the text of the demo (the Python standard library) byte by byte, each for --seconds of processor time:

    dense       the demo's own: a squared-ReLU layer of four times the width
    sparse      8 experts of twice the width, of which 2 are chosen: as many products per token
    momentum    the same in ``MomentumMoE``, mu = 0.7, gamma = 1

Processor time does not count what other programs do meanwhile. The learning rate falls with the share of the time that
is gone, so that every decoder ends at the same one.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch
from hotloop.logprob import linear_cross_entropy
from hotloop.moe import MoE, MomentumMoE, ResidualStream
from torch import Tensor, nn

from bench.progress import Progress
from examples.learn_from_preferences import data
from examples.learn_from_preferences.model import Decoder
from examples.learn_from_preferences.settings import seed_of
from examples.learn_from_preferences.train import (
    apply_gradient,
    cosine,
    drawn_windows,
    mean_over_windows,
    new_optimizer,
)

from . import runs
from .runs import Comparison, Run

KINDS = ("dense", "sparse", "momentum")
_SHARES = 10_000
"""Parts of the time between which the learning rate moves."""


@dataclass(frozen=True)
class Sizes:
    """Everything a run depends on but its kind and seed."""

    seconds: float = 240.0
    width: int = 192
    layers: int = 4
    heads: int = 4
    ngram_rows: int = 4096
    context: int = 256
    batch: int = 8
    lr: float = 3e-3
    weight_decay: float = 0.1
    windows: int = 96
    experts: int = 8
    top_k: int = 2
    hidden: int = 384
    balance: float = 0.01
    mu: float = 0.7
    gamma: float = 1.0


class SparseDecoder(Decoder):
    """The demo's decoder whose feed-forward layers are mixtures of experts in a residual stream."""

    def __init__(self, sizes: Sizes, mu: float, gamma: float) -> None:
        super().__init__(sizes.width, sizes.layers, sizes.heads, sizes.context, sizes.ngram_rows)
        self.experts = nn.ModuleList()
        for block in self.blocks:
            mixture = MoE(
                sizes.width, sizes.hidden, sizes.experts, sizes.top_k, activation="relu2",
                load_balance_weight=sizes.balance,
            )  # fmt: skip
            into_stream = 0.02 / (2 * sizes.layers) ** 0.5
            nn.init.normal_(mixture.router.weight, std=0.02)
            nn.init.normal_(mixture.experts.up_proj, std=0.02)
            nn.init.normal_(mixture.experts.down_proj, std=into_stream)
            self.experts.append(MomentumMoE(mixture, block.mlp_norm, mu=mu, gamma=gamma))
            del block.up, block.down, block.mlp_norm

    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the tokens, and the auxiliary loss of the routers."""
        following = [*(block.attention_norm for block in self.blocks), self.norm]
        table = self.table[:, : tokens.shape[1]]
        stream = ResidualStream.start(self.embed(tokens, 0), following[0])
        for layer, (block, experts) in enumerate(zip(self.blocks, self.experts)):
            update = block.attend(stream.normed, table, None, layer)
            stream = experts(stream.add(update, experts.norm), following[layer + 1])
        assert stream.normed is not None
        assert stream.aux_loss is not None
        return stream.normed, stream.aux_loss


def made(kind: str, sizes: Sizes, seed: int) -> Decoder:
    torch.manual_seed(seed_of(seed, "weights"))
    if kind == "dense":
        return Decoder(sizes.width, sizes.layers, sizes.heads, sizes.context, sizes.ngram_rows)
    numbers = (sizes.mu, sizes.gamma) if kind == "momentum" else (0.0, -1.0)
    return SparseDecoder(sizes, *numbers)


def loss_of(model: Decoder, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | float]:
    """The loss in nats per byte, and the auxiliary loss of the routers."""
    sparse = isinstance(model, SparseDecoder)
    hidden, balance = model.losses(inputs) if sparse else (model(inputs), 0.0)
    return linear_cross_entropy(hidden, model.head, labels), balance


def trained(kind: str, seed: int, sizes: Sizes, corpus: data.Corpus, progress: Progress) -> Run:
    """Train one decoder for its time; its loss, and how many steps it made."""
    model, text = made(kind, sizes, seed), corpus.train_tokens
    optimizer = new_optimizer(model, sizes.weight_decay)
    spent, step, curve = 0.0, 0, []

    def heldout() -> float:
        def loss(inputs: Tensor, labels: Tensor) -> Tensor:
            return loss_of(model, inputs, labels)[0]

        return mean_over_windows(loss, corpus.heldout_tokens, sizes.windows, sizes.context)

    while spent < sizes.seconds:
        began = time.process_time()
        loss, balance = loss_of(model, *drawn_windows(text, sizes.batch, sizes.context, seed, step))
        share = min(1.0, spent / sizes.seconds)
        lr = cosine(int(share * _SHARES), _SHARES, sizes.lr)
        apply_gradient(model, optimizer, loss + balance, lr)
        spent += time.process_time() - began
        step += 1
        progress.step(spent)
        if len(curve) < 10 * spent / sizes.seconds:
            curve.append((round(spent, 1), round(heldout(), 4)))
    parameters = sum(p.numel() for p in model.parameters())
    return {"heldout": heldout(), "steps": step, "parameters": parameters, "curve": curve}


def table(found: list[Run]) -> str:
    lines = [
        "| decoder | parameters | steps | held-out nats per byte | against dense, by seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        if mine := runs.of_kind(found, kind):
            size = f"{mine[0]['parameters'] / 1e6:.1f}M"
            steps = round(sum(run["steps"] for run in mine) / len(mine))
            loss = runs.spread([run["heldout"] for run in mine])
            beside = "" if kind == KINDS[0] else runs.against(found, kind, KINDS[0], "heldout")
            lines.append(f"| {kind} | {size} | {steps} | {loss} | {beside} |")
    return "\n".join(lines)


COMPARISON = Comparison(
    name="sparse_decoder",
    about="The demo's decoder, dense and with experts, after the same processor time.",
    kinds=KINDS,
    sizes=Sizes(),
    length="seconds",
    train=trained,
    table=table,
    axis="seconds of processor time",
)

if __name__ == "__main__":
    sys.exit(COMPARISON.main())
