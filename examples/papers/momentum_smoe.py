# SPDX-License-Identifier: Apache-2.0
"""MomentumSMoE on real text: does momentum across depth lower the loss of a sparse decoder, clean and attacked?

Run it with ``python -m examples.papers.momentum_smoe`` from the root of the repository. Teo and Nguyen 2024,
arXiv:2410.14574, report a lower perplexity on WikiText-103 than that of a plain sparse mixture (SMoE), on clean text
and under a word-swap attack. Here three decoders of one size read the text of the demo (the Python standard library)
byte by byte, for as many steps, from the same weights and the same windows. A layer is that of the released code, with
norms behind the residuals and a second residual around the first one:

    a = norm(x + attention(x)),  x' = norm(a + y)          z = SMoE(a)
    smoe        y = norm(a + z)
    momentum    y = norm(a - m'),  m' = mu m + gamma z     mu = 0.7, gamma = 1
    adam        the first layer takes a step of Adam, y = norm(-p' / sqrt(v' + eps)), the others are momentum's

An attack replaces a tenth of the words of the held-out text, drawn once for all runs: by other words of that text
("swapped"), or by AAA ("masked"). The released code has no attack in it. All bytes of the attacked text count.
"""

from __future__ import annotations

import math
import random
import re
import sys
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hotloop.logprob import linear_cross_entropy
from hotloop.moe import AdamMoE, MoE, MomentumMoE, ResidualStream
from torch import Tensor, nn

from bench.progress import Progress
from examples.learn_from_preferences import data
from examples.learn_from_preferences.model import VOCABULARY, rotary, rotate
from examples.learn_from_preferences.settings import DemoError, seed_of
from examples.learn_from_preferences.train import (
    apply_gradient,
    cosine,
    drawn_windows,
    mean_over_windows,
    new_optimizer,
)

from . import runs
from .runs import Comparison, Run

KINDS = ("smoe", "momentum", "adam")
LOSSES = ("clean", "swapped", "masked")
WORD = re.compile(rb"[A-Za-z_]{2,}")
_POINTS = 10
"""Of a curve."""


@dataclass(frozen=True)
class Sizes:
    """Everything a run depends on but its kind and seed."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    hidden: int = 128
    context: int = 128
    batch: int = 8
    steps: int = 1000
    lr: float = 3e-3
    weight_decay: float = 0.1
    balance: float = 0.01
    mu: float = 0.7
    gamma: float = 1.0
    attacked: float = 0.1
    windows: int = 1024


class Layer(nn.Module):
    """Causal attention, then a mixture of experts, as in the released code of the paper."""

    def __init__(self, kind: str, sizes: Sizes) -> None:
        super().__init__()
        width, self.heads = sizes.width, sizes.heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.attention_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        mixture = MoE(
            width, sizes.hidden, sizes.experts, sizes.top_k, activation="relu", bias=True,
            order="topk_then_softmax", load_balance_weight=sizes.balance, convention="fastmoe",
        )  # fmt: skip
        inner = nn.LayerNorm(width)
        self.experts: AdamMoE | MomentumMoE
        if kind == "adam":
            self.experts = AdamMoE(mixture, inner, mu=sizes.mu, gamma2=sizes.gamma, post_norm=True)
        else:
            mu, gamma = (sizes.mu, sizes.gamma) if kind == "momentum" else (0.0, -1.0)
            self.experts = MomentumMoE(mixture, inner, mu=mu, gamma=gamma, post_norm=True)

    def attend(self, x: Tensor, table: Tensor) -> Tensor:
        rows, length, width = x.shape
        split = self.qkv(x).view(rows, length, 3, self.heads, -1)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v, is_causal=True)
        update: Tensor = self.out(seen.transpose(1, 2).reshape(rows, length, width))
        return update

    def forward(self, stream: ResidualStream, table: Tensor) -> ResidualStream:
        x = self.attention_norm(stream.x + self.attend(stream.x, table))
        mixed: ResidualStream = self.experts(stream._replace(x=x))
        return mixed._replace(x=self.norm(x + mixed.x), normed=None)


class Decoder(nn.Module):
    """Bytes (B, T) to hidden states (B, T, D) and the load-balance loss; ``head`` turns those into logits."""

    table: Tensor

    def __init__(self, kind: str, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, sizes.width)
        self.layers = nn.ModuleList([Layer(kind, sizes) for _ in range(sizes.layers)])
        self.head = nn.Parameter(torch.randn(VOCABULARY, sizes.width) * sizes.width**-0.5)
        self.register_buffer("table", rotary(sizes.context, sizes.width // sizes.heads))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        stream = ResidualStream.start(self.embedding(tokens))
        for layer in self.layers:
            stream = layer(stream, self.table[:, : tokens.shape[1]])
        assert stream.aux_loss is not None
        return stream.x, stream.aux_loss

    def loss(self, inputs: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(self(inputs)[0], self.head, labels)


def attack(text: bytes, share: float, instead: bytes | None = None) -> bytes:
    """The text with about this share of its words replaced: by other words of it, or all by ``instead``."""
    words = WORD.findall(text)
    chance, chosen = (random.Random(seed_of("attack", what)) for what in ("where", "word"))

    def replaced(match: re.Match[bytes]) -> bytes:
        if chance.random() >= share:
            return match.group()
        return chosen.choice(words) if instead is None else instead

    return WORD.sub(replaced, text)


def texts(corpus: data.Corpus, sizes: Sizes) -> dict[str, Tensor]:
    """The held-out text, clean and attacked, by the name of its loss."""
    clean = corpus.heldout_tokens
    changed = [attack(bytes(clean.numpy()), sizes.attacked, instead) for instead in (None, b"AAA")]
    attacked = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in changed]
    return dict(zip(LOSSES, (clean, *attacked)))


def train(kind: str, seed: int, sizes: Sizes, corpus: data.Corpus, progress: Progress) -> Run:
    """One run: its three losses at the end, and the curve of the clean one."""
    torch.manual_seed(seed_of(seed, "weights"))
    model = Decoder(kind, sizes)
    optimizer = new_optimizer(model, sizes.weight_decay)
    tokens, heldout = corpus.train_tokens, texts(corpus, sizes)
    curve: list[tuple[int, float]] = []
    every = max(1, sizes.steps // _POINTS)
    for step in range(sizes.steps):
        inputs, labels = drawn_windows(tokens, sizes.batch, sizes.context, seed, step)
        hidden, balance = model(inputs)
        loss = linear_cross_entropy(hidden, model.head, labels) + balance
        if not math.isfinite(float(loss.detach())):
            raise DemoError(f"{kind}, seed {seed}: the loss is not finite at step {step}.")
        apply_gradient(model, optimizer, loss, cosine(step, sizes.steps, sizes.lr))
        progress.step(step + 1)
        if (step + 1) % every == 0:
            count = sizes.windows // 4
            found = mean_over_windows(model.loss, heldout["clean"], count, sizes.context)
            curve.append((step + 1, round(found, 4)))
    losses = {
        name: mean_over_windows(model.loss, text, sizes.windows, sizes.context)
        for name, text in heldout.items()
    }
    return {**losses, "parameters": sum(p.numel() for p in model.parameters()), "curve": curve}


def table(found: list[Run]) -> str:
    """Mean over the seeds and the farthest seed's distance; then every seed against the plain mixture."""
    lines = [
        "| | seeds | clean | words swapped | words masked |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        if mine := runs.of_kind(found, kind):
            cells = [runs.spread([run[name] for run in mine]) for name in LOSSES]
            lines.append(f"| {kind} | {len(mine)} | {' | '.join(cells)} |")
    for kind in KINDS[1:]:
        cells = [runs.against(found, kind, KINDS[0], name) for name in LOSSES]
        if all(cells):
            lines.append(f"| {kind} - {KINDS[0]}, by seed | | {' | '.join(cells)} |")
    return "\n".join(lines)


COMPARISON = Comparison(
    name="momentum_smoe",
    about="SMoE, MomentumSMoE and AdamSMoE decoders of one size on one text, clean and with words replaced.",
    kinds=KINDS,
    sizes=Sizes(),
    length="steps",
    train=train,
    table=table,
    axis="step",
)

if __name__ == "__main__":
    sys.exit(COMPARISON.main())
