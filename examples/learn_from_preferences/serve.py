# SPDX-License-Identifier: Apache-2.0
"""A small draft model serves together with the trained one: fewer calls of it, the same law.

The draft learns from the trained model on answers that were sampled while that one learned. Then both answer held-out
prompts: the draft proposes a few bytes, the model looks at all of them in one call, and hotloop decides how many stay.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from hotloop.decode import (
    Logits,
    block_speculative_sampling,
    chain_speculative_sampling,
    sample,
)
from hotloop.logprob import linear_kl
from torch import Tensor

from .data import Prompt
from .generate import bytes_as_rows, precision
from .model import Decoder
from .settings import Settings, seed_of
from .train import IGNORE_INDEX, apply_gradient, cosine, hidden_states

MODES = ("plain", "token", "block")
BINS = 20
VERIFY = {"token": chain_speculative_sampling, "block": block_speculative_sampling}


def new_draft(settings: Settings) -> Decoder:
    torch.manual_seed(seed_of(settings.seed, "draft weights"))
    return Decoder(
        settings.draft_width,
        settings.draft_layers,
        settings.draft_heads,
        settings.context,
        settings.ngram_rows,
    )


def answered(prompts: list[Prompt], answers: list[list[bytes]], settings: Settings) -> Tensor:
    """Prompts with their answers as rows of bytes, (n, context) uint8."""
    texts = [p.text + a for p, several in zip(prompts, answers) for a in several]
    return bytes_as_rows(texts, settings.context).to(torch.uint8)


def draft_step(
    draft: Decoder,
    optimizer: torch.optim.Optimizer,
    teacher: Decoder,
    rows: Tensor,
    step: int,
    settings: Settings,
) -> float:
    """One step of distillation on answers; returns KL(model || draft) in nats per byte."""
    generator = torch.Generator().manual_seed(seed_of(settings.seed, "draft rows", step))
    chosen = torch.randint(0, len(rows), (settings.draft_batch,), generator=generator)
    tokens = rows[chosen].long()[:, :-1]
    learned = torch.arange(1, settings.context) >= settings.prompt_bytes
    labels = torch.where(learned, 0, IGNORE_INDEX).expand_as(tokens)
    with torch.no_grad():
        known = hidden_states(teacher, tokens, settings)
    loss = linear_kl(
        hidden_states(draft, tokens, settings),
        draft.head,
        known,
        teacher.head,
        labels=labels,
        reduction="mean",
    )
    apply_gradient(draft, optimizer, loss, cosine(step, settings.draft_steps, settings.draft_lr))
    return float(loss.detach())


class Requests:
    """Rows that are being answered: what is known of each, and the caches of the two models."""

    def __init__(self, prompts: list[Prompt], models: list[Decoder], settings: Settings) -> None:
        self.settings = settings
        start = settings.prompt_bytes
        self.tokens = torch.zeros(len(prompts), settings.context, dtype=torch.long)
        self.tokens[:, :start] = bytes_as_rows([p.text for p in prompts], start)
        self.known = torch.full((len(prompts),), start)
        self.seeds = torch.arange(len(prompts))
        self.caches = [m.new_cache(len(prompts), settings.context) for m in models]
        for model, cache in zip(models, self.caches):
            with precision(settings.bfloat16):
                model(self.tokens[:, : start - 1], cache)

    @property
    def left(self) -> Tensor:
        return self.settings.context - self.known

    def drop_finished(self) -> None:
        going = (self.left > 0).nonzero()[:, 0]
        if len(going) == len(self.known):
            return
        self.tokens, self.known, self.seeds = (
            x[going] for x in (self.tokens, self.known, self.seeds)
        )
        for cache in self.caches:
            cache.keep(going)


@torch.inference_mode()
def serve(
    mode: str,
    model: Decoder,
    draft: Decoder,
    prompts: list[Prompt],
    settings: Settings,
    seed: int,
) -> dict[str, Any]:
    """Answer the prompts together, one byte per call of the model or several, and count."""
    begun = time.perf_counter()
    if mode == "plain":
        found = _plain(model, prompts, settings, seed)
    else:
        found = _speculative(mode, model, draft, prompts, settings, seed)
    return {"mode": mode, "seconds": time.perf_counter() - begun} | found


def _plain(model: Decoder, prompts: list[Prompt], settings: Settings, seed: int) -> dict[str, Any]:
    requests = Requests(prompts, [model], settings)
    tokens, cache = requests.tokens, requests.caches[0]
    for position in range(settings.prompt_bytes, settings.context):
        with precision(settings.bfloat16):
            hidden = model(tokens[:, :position], cache)[:, -1]
        law = Logits(_logits(hidden, model), temperature=settings.temperature)
        tokens[:, position] = sample(law, seed=seed, offset=position).token_ids
    count = len(prompts) * settings.answer_bytes
    return {"bytes": count, "calls": count, "rounds": settings.answer_bytes}


def _speculative(
    mode: str,
    model: Decoder,
    draft: Decoder,
    prompts: list[Prompt],
    settings: Settings,
    seed: int,
) -> dict[str, Any]:
    """Rows keep different numbers of bytes per call, and leave when they are done."""
    most = settings.draft_tokens
    requests = Requests(prompts, [model, draft], settings)
    judge = LawTest(seed)
    emitted = calls = rounds = 0
    kept_at = [0] * (most + 1)
    while len(requests.known):
        # Block verification decides by draws beyond the byte it emits: they must not come twice.
        offset = (
            requests.known
            if mode == "token"
            else torch.full_like(requests.known, rounds * (most + 1))
        )
        seeds = requests.seeds + seed % 2**40
        drafted, laws = _draft(draft, requests, seeds, offset, settings)
        with precision(settings.bfloat16):
            hidden = model.extend(requests.tokens, requests.known - 1, most + 1, requests.caches[0])
        target = _logits(hidden, model)
        lengths = torch.minimum(requests.left - 1, torch.tensor(most))
        done = VERIFY[mode](
            Logits(laws, temperature=settings.temperature),
            drafted,
            Logits(target, temperature=settings.temperature),
            num_draft_tokens=lengths,
            seed=seeds,
            offset=offset,
        )
        judge.see(target, laws, done, lengths, settings.temperature)
        steps = torch.arange(most + 1)
        here = steps <= done.num_accepted[:, None]
        places = (requests.known[:, None] + steps)[here]
        requests.tokens[here.nonzero()[:, 0], places] = done.output_token_ids[here]
        requests.known = requests.known + done.num_accepted + 1
        emitted += int(here.sum())
        calls += len(here)
        rounds += 1
        for accepted in done.num_accepted.tolist():
            kept_at[accepted] += 1
        requests.drop_finished()
    return {
        "bytes": emitted,
        "calls": calls,
        "rounds": rounds,
        "accepted": kept_at,
        "law": judge.counts.tolist(),
        "control": judge.control.tolist(),
    }


def _draft(
    draft: Decoder, requests: Requests, seeds: Tensor, offset: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Bytes drafted one after the other (B, K), written behind what is known, and their logits (B, K, 256)."""
    most, cache = settings.draft_tokens, requests.caches[1]
    rows = torch.arange(len(requests.known))
    drafted, laws = [], []
    for i in range(most):
        # The first step looks at two bytes: the last one accepted may be one the draft has not seen.
        count = 2 if i == 0 else 1
        with precision(settings.bfloat16):
            hidden = draft.extend(requests.tokens, requests.known + i - count, count, cache)[:, -1]
        laws.append(_logits(hidden, draft))
        law = Logits(laws[-1], temperature=settings.temperature)
        drafted.append(sample(law, seed=seeds, offset=offset + i).token_ids)
        # A row near its end drafts bytes that are not verified; they go where nothing follows.
        places = (requests.known + i).clamp(max=settings.context - 1)
        requests.tokens[rows, places] = drafted[-1]
    return torch.stack(drafted, 1), torch.stack(laws, 1)


def _logits(hidden: Tensor, model: Decoder) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.linear(hidden.float(), model.head)


class LawTest:
    """Whether emitted bytes follow the model's law: their randomised probability integral transform is uniform.

    For a byte x of law p the value sum_{y before x} p(y) + w p(x), w uniform, is uniform on (0, 1] whatever order the
    bytes are put in, as long as the order depends on the past only. They are put in order of p / q, q the draft's law,
    so that a byte taken from the wrong law shows. The control fills what was rejected from the draft, a mistake that is
    easily made, and must be found out.
    """

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.counts = torch.zeros(BINS, dtype=torch.long)
        self.control = torch.zeros(BINS, dtype=torch.long)

    def see(
        self,
        target: Tensor,
        laws: Tensor,
        done: Any,
        lengths: Tensor,
        temperature: float,
    ) -> None:
        rows = torch.arange(len(target))
        steps = torch.arange(target.shape[1])
        emitted = (steps <= done.num_accepted[:, None]).nonzero(as_tuple=True)
        p = (target.double() / temperature).softmax(-1)
        q = (laws.double() / temperature).softmax(-1)
        q = torch.cat((q, torch.full_like(p[:, :1], 1 / p.shape[-1])), 1)
        tokens = done.output_token_ids.clone()
        self.counts += self._histogram(p[emitted], q[emitted], tokens[emitted])
        # After the last draft the byte is the model's own, in the control too.
        rejected = rows[done.num_accepted < lengths]
        at = done.num_accepted[rejected]
        tokens[rejected, at] = torch.multinomial(
            q[rejected, at].float(), 1, generator=self.generator
        )[:, 0] if len(rejected) else tokens[rejected, at]  # fmt: skip
        self.control += self._histogram(p[emitted], q[emitted], tokens[emitted])

    def _histogram(self, p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
        order = (p / q).argsort(dim=-1, stable=True)
        place = (order == tokens[:, None]).long().argmax(-1, keepdim=True)
        ordered = p.gather(-1, order)
        upper = ordered.cumsum(-1).gather(-1, place)[:, 0]
        own = ordered.gather(-1, place)[:, 0]
        noise = torch.rand(len(p), generator=self.generator, dtype=torch.float64)
        value = (upper - noise * own).clamp(0, 1 - 1e-12)
        return torch.bincount((value * BINS).long(), minlength=BINS)


def p_value(counts: list[int]) -> float:
    """Chi-square of equal shares: the chance of a deviation as large as this one, or larger."""
    seen = torch.tensor(counts, dtype=torch.float64)
    expected = seen.sum() / len(counts)
    if expected == 0:
        return 1.0
    statistic = ((seen - expected).square() / expected).sum()
    freedom = torch.tensor(len(counts) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, statistic / 2))


def summary(steps: list[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """What the steps of all batches found, by mode."""
    found: dict[str, Any] = {"draft_tokens": settings.draft_tokens, "batch": settings.serve_batch}
    for mode in MODES:
        mine = [step for step in steps if step["mode"] == mode]
        count = sum(step["bytes"] for step in mine)
        facts = {
            "bytes": count,
            "model_calls_per_row": sum(step["calls"] for step in mine),
            "bytes_per_call": count / max(1, sum(step["calls"] for step in mine)),
            "seconds": sum(step["seconds"] for step in mine),
        }
        facts["bytes_per_second"] = count / max(facts["seconds"], 1e-9)
        if mode != "plain":
            law = [sum(column) for column in zip(*(step["law"] for step in mine))]
            control = [sum(column) for column in zip(*(step["control"] for step in mine))]
            accepted = [sum(column) for column in zip(*(step["accepted"] for step in mine))]
            facts |= {
                "accepted": accepted,
                "law_counts": law,
                "law_p_value": p_value(law),
                "control_p_value": p_value(control),
            }
        found[mode] = facts
    return found
