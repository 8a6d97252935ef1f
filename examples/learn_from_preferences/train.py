# SPDX-License-Identifier: Apache-2.0
"""The two ways the decoder learns: the next byte of a text, and which of two answers is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hotloop.logprob import linear_cross_entropy, linear_logprob
from hotloop.preference import linear_preference_loss
from torch import Tensor, nn

from .data import Prompt
from .generate import bytes_as_rows, precision
from .judge import Judge
from .model import Decoder
from .settings import Settings, seed_of

IGNORE_INDEX = -100


def new_model(settings: Settings) -> Decoder:
    torch.manual_seed(seed_of(settings.seed, "weights"))
    return Decoder(
        settings.width, settings.layers, settings.heads, settings.context, settings.ngram_rows
    )


def new_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def cosine(step: int, steps: int, peak: float) -> float:
    """Up in the first twentieth of the steps, then down a half cosine to a hundredth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    along = (step - warm) / max(1, steps - warm)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along)))


def apply_gradient(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float
) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def hidden_states(model: Decoder, tokens: Tensor, settings: Settings) -> Tensor:
    """Hidden states in float32: the head, where the loss is, works in full precision."""
    with precision(settings.bfloat16):
        hidden: Tensor = model(tokens)
    return hidden.float()


def windows(tokens: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    cut = tokens[starts[:, None] + torch.arange(length + 1)].long()
    return cut[:, :-1], cut[:, 1:]


def drawn_windows(
    tokens: Tensor, count: int, length: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Inputs and labels of this step."""
    generator = torch.Generator().manual_seed(seed_of(seed, "windows", step))
    starts = torch.randint(0, len(tokens) - length - 1, (count,), generator=generator)
    return windows(tokens, starts, length)


@torch.no_grad()
def mean_over_windows(
    loss: Callable[[Tensor, Tensor], Tensor], tokens: Tensor, count: int, length: int
) -> float:
    """Mean loss over windows spread evenly over the text."""
    last = len(tokens) - length - 1
    count = max(1, min(count, last))
    starts = torch.linspace(0, last, count).long()
    losses = [loss(*windows(tokens, part, length)) * len(part) for part in starts.split(16)]
    return float(sum(losses)) / count


def text_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    step: int,
    settings: Settings,
) -> float:
    """One step on windows drawn for this step; returns the loss in nats per byte."""
    inputs, labels = drawn_windows(
        tokens, settings.pretrain_batch, settings.context, settings.seed, step
    )
    loss = linear_cross_entropy(hidden_states(model, inputs, settings), model.head, labels)
    lr = cosine(step, settings.pretrain_steps, settings.pretrain_lr)
    apply_gradient(model, optimizer, loss, lr)
    return float(loss.detach())


def heldout_loss(model: Decoder, tokens: Tensor, settings: Settings) -> float:
    """Of the held-out text, nats per byte."""

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden_states(model, inputs, settings), model.head, labels)

    return mean_over_windows(loss, tokens, settings.heldout_windows, settings.context)


@dataclass
class Pairs:
    """Rows 2i and 2i + 1 are the better and the worse answer to one prompt."""

    tokens: Tensor  # (2n, context) uint8
    labels: Tensor  # (2n, context) int16: tokens to learn, shifted; IGNORE_INDEX elsewhere
    ref_logps: Tensor  # (2n,)

    def __len__(self) -> int:
        return len(self.tokens) // 2

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Better answers first, then the worse ones, cut to the longest of them."""
        rows = torch.cat((2 * indices, 2 * indices + 1))
        labels = self.labels[rows]
        used = int((labels != IGNORE_INDEX).any(0).nonzero().max()) + 1
        return self.tokens[rows, :used].long(), labels[:, :used].long(), self.ref_logps[rows]


def choose_pairs(
    prompts: list[Prompt], answers: list[list[bytes]], judge: Judge, settings: Settings
) -> tuple[list[tuple[Prompt, bytes, bytes]], list[float]]:
    """Best against worst answer of each prompt where they differ enough, and all scores."""
    chosen, scores = [], []
    for prompt, several in zip(prompts, answers):
        ranked = sorted(several, key=lambda answer: judge.score(prompt, answer))
        low, high = judge.score(prompt, ranked[0]), judge.score(prompt, ranked[-1])
        scores += [judge.score(prompt, answer) for answer in several]
        if high - low >= settings.least_gap:
            chosen.append((prompt, ranked[-1], ranked[0]))
    return chosen, scores


def pack_pairs(
    chosen: list[tuple[Prompt, bytes, bytes]], judge: Judge, base: Decoder, settings: Settings
) -> Pairs:
    """Tokens, labels and the frozen model's log-probabilities, computed once."""
    start, length = settings.prompt_bytes, settings.context
    if not chosen:
        empty = torch.zeros(0, length, dtype=torch.uint8)
        return Pairs(empty, empty.to(torch.int16), torch.zeros(0))
    texts: list[bytes] = []
    ends: list[int] = []
    for prompt, better, worse in chosen:
        for answer in (better, worse):
            # Beyond what is judged, up to the byte that may have ended the answer.
            kept = judge.kept(prompt, answer) + prompt.indent + 1
            texts.append(prompt.text + answer[:kept])
            ends.append(min(start + kept, length))
    tokens = bytes_as_rows(texts, length)
    place = torch.arange(1, length + 1)
    learned = (place >= start) & (place < torch.tensor(ends)[:, None])
    shifted = torch.cat((tokens[:, 1:], torch.zeros(len(tokens), 1, dtype=torch.long)), 1)
    labels = shifted.masked_fill(~learned, IGNORE_INDEX)
    logps = [
        sequence_logps(base, part, label, settings)
        for part, label in zip(tokens.split(32), labels.split(32))
    ]
    return Pairs(tokens.to(torch.uint8), labels.to(torch.int16), torch.cat(logps))


@torch.no_grad()
def sequence_logps(model: Decoder, tokens: Tensor, labels: Tensor, settings: Settings) -> Tensor:
    hidden = hidden_states(model, tokens, settings)
    return linear_logprob(hidden, model.head, labels, ignore_index=IGNORE_INDEX).logps.sum(-1)


def pair_steps(pairs: int, settings: Settings) -> int:
    return settings.pair_epochs * math.ceil(pairs / settings.pair_batch)


def pair_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    pairs: Pairs,
    round_: int,
    step: int,
    settings: Settings,
) -> dict[str, float]:
    """One step of direct preference optimisation; returns its loss and metrics."""
    per_epoch = math.ceil(len(pairs) / settings.pair_batch)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed_of(settings.seed, "pairs", round_, epoch))
    order = torch.randperm(len(pairs), generator=generator)
    indices = order[place * settings.pair_batch : (place + 1) * settings.pair_batch]
    tokens, labels, ref_logps = pairs.batch(indices)
    loss, metrics = linear_preference_loss(
        hidden_states(model, tokens, settings),
        model.head,
        labels,
        loss="dpo",
        ref_logps=ref_logps,
        options={"beta": settings.beta},
        ignore_index=IGNORE_INDEX,
    )
    warm = min(1.0, (step + 1) / 4)  # fresh pairs, and in the first round empty moments
    apply_gradient(model, optimizer, loss, settings.pair_lr * warm)
    return {"loss": float(loss.detach())} | {name: float(x) for name, x in metrics.items()}
