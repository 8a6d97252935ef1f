# SPDX-License-Identifier: Apache-2.0
"""The demo's decoder with experts in the place of its feed-forward layers: is it better after the same time?

Run it with ``python -m examples.papers.sparse_decoder`` from the root of the repository. Three decoders of one width
and depth read the text of the demo (the Python standard library) byte by byte, each for --seconds of processor time:

    dense       the demo's own: a squared-ReLU layer of four times the width
    sparse      8 experts of twice the width, of which 2 are chosen: as many products per token
    momentum    the same in ``MomentumMoE``, mu = 0.7, gamma = 1

Processor time does not count what other programs do meanwhile. The learning rate falls with the share of the time that
is gone, so that every decoder ends at the same one. A finished run is a line of ``runs.jsonl`` in --out, and is not run
again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hotloop.logprob import linear_cross_entropy
from hotloop.moe import MoE, MomentumMoE, ResidualStream
from torch import Tensor, nn

from examples.learn_from_preferences import data
from examples.learn_from_preferences.model import Decoder
from examples.learn_from_preferences.settings import DemoError, Settings, seed_of
from examples.learn_from_preferences.train import cosine, windows

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


def hidden_of(model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor | float]:
    return model.losses(tokens) if isinstance(model, SparseDecoder) else (model(tokens), 0.0)


def loss_of(model: Decoder, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | float]:
    hidden, balance = hidden_of(model, inputs)
    return linear_cross_entropy(hidden, model.head, labels), balance


def new_optimizer(model: Decoder, sizes: Sizes) -> torch.optim.AdamW:
    """The demo's, with the experts (E, ..., ...) among the matrices."""
    groups = [
        {
            "params": [p for p in model.parameters() if p.ndim >= 2],
            "weight_decay": sizes.weight_decay,
        },
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


@torch.no_grad()
def heldout(model: Decoder, tokens: Tensor, sizes: Sizes) -> float:
    """Mean loss over windows spread evenly over the held-out text, nats per byte."""
    last = len(tokens) - sizes.context - 1
    starts = torch.linspace(0, last, sizes.windows).long()
    losses = [
        float(loss_of(model, *windows(tokens, part, sizes.context))[0]) * len(part)
        for part in starts.split(16)
    ]
    return sum(losses) / sizes.windows


def trained(kind: str, seed: int, sizes: Sizes, corpus: data.Corpus) -> dict[str, Any]:
    """Train one decoder for its time; its losses, and how many steps it made."""
    model, text, other = made(kind, sizes, seed), corpus.train_tokens, corpus.heldout_tokens
    optimizer = new_optimizer(model, sizes)
    spent, step, curve = 0.0, 0, []
    while spent < sizes.seconds:
        began = time.process_time()
        generator = torch.Generator().manual_seed(seed_of(seed, "windows", step))
        starts = torch.randint(
            0, len(text) - sizes.context - 1, (sizes.batch,), generator=generator
        )
        loss, balance = loss_of(model, *windows(text, starts, sizes.context))
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1.0, spent / sizes.seconds)
        for group in optimizer.param_groups:
            group["lr"] = cosine(int(share * _SHARES), _SHARES, sizes.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent += time.process_time() - began
        step += 1
        if len(curve) < 10 * spent / sizes.seconds:
            curve.append([round(spent, 1), round(heldout(model, other, sizes), 4)])
    return {
        "kind": kind,
        "seed": seed,
        "steps": step,
        "heldout": heldout(model, other, sizes),
        "parameters": sum(p.numel() for p in model.parameters()),
        "curve": curve,
        "sizes": asdict(sizes),
        "text": corpus.digest,
    }


def table(runs: list[dict[str, Any]]) -> str:
    lines = [
        "| decoder | parameters | steps | held-out nats per byte, by seed | mean |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind in KINDS:
        mine = sorted((r for r in runs if r["kind"] == kind), key=lambda r: r["seed"])
        if mine:
            losses = [r["heldout"] for r in mine]
            steps = round(statistics.mean(r["steps"] for r in mine))
            each = ", ".join(f"{x:.4f}" for x in losses)
            lines.append(
                f"| {kind} | {mine[0]['parameters'] / 1e6:.1f}M | {steps} | {each} | {statistics.mean(losses):.4f} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="examples.papers.sparse_decoder", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--seconds", type=float, default=Sizes.seconds, help="of processor time of a run"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--text", type=Path, help="a folder; default: the Python standard library")
    parser.add_argument("--out", type=Path, default=Path("out/papers/sparse_decoder"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    sizes = dataclasses.replace(Sizes(), seconds=given.seconds)
    try:
        corpus = data.load(given.text, Settings())
    except DemoError as error:
        print(error, file=sys.stderr)
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "runs.jsonl"
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    runs = [r for r in runs if r["sizes"] == asdict(sizes) and r["text"] == corpus.digest]
    done = {(r["kind"], r["seed"]) for r in runs}
    for seed in range(given.seeds):
        for kind in KINDS:
            if (kind, seed) in done:
                continue
            runs.append(trained(kind, seed, sizes, corpus))
            with file.open("a") as out:
                out.write(json.dumps(runs[-1]) + "\n")
            print(
                f"{kind} {seed}: {runs[-1]['steps']} steps, {runs[-1]['heldout']:.4f}", flush=True
            )
    print(table(runs))
    (given.out / "table.md").write_text(table(runs) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
