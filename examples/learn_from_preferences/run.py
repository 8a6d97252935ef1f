# SPDX-License-Identifier: Apache-2.0
"""The program as a row of stages that can be cut off between any two steps and taken up again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.progress import Progress

from . import checkpoint, data, evaluate, generate, head_comparison, serve, train
from .data import Corpus, Prompt
from .judge import judge_for
from .model import Decoder
from .settings import Settings, seed_of


@dataclass
class Stage:
    name: str
    begin: Callable[[], None]
    total: Callable[[], int]
    step: Callable[[int], str]  # takes the position, returns a short note to show
    end: Callable[[], None]


def nothing() -> None:
    pass


class Run:
    """State of one run. Everything that outlives a step is in ``state`` or the two models' weights.

    Each step depends on the state and its position only, as random numbers are drawn from a seed made
    of both; so the checkpoint holds no generator, and a run that was killed ends as if it had not been.
    """

    def __init__(
        self, corpus: Corpus, settings: Settings, folder: Path, progress: Progress
    ) -> None:
        self.corpus, self.settings, self.folder, self.progress = corpus, settings, folder, progress
        self.judge = judge_for(corpus)
        self.train_tokens, self.heldout_tokens = corpus.train_tokens, corpus.heldout_tokens
        self.feedback_prompts = data.prompts(
            corpus, "train", settings.rounds * settings.round_prompts, settings
        )
        self.eval_prompts = data.prompts(corpus, "heldout", settings.eval_prompts, settings)
        self.model = train.new_model(settings)
        self.optimizer = train.new_optimizer(self.model, settings.weight_decay)
        self.base: Decoder | None = None
        self.draft: Decoder | None = None
        self.draft_optimizer: torch.optim.Optimizer | None = None
        self.answer_rows: Tensor | None = None
        self.pairs: train.Pairs | None = None
        self.state: dict[str, Any] = {
            "fingerprint": settings.fingerprint(corpus.digest),
            "stage": 0,
            "position": 0,
            "seconds": {},
            "resumed": 0,
            "curve": [],
            "rounds": [],
            "answers": [],
            "sampled": {},
            "served": [],
            "draft_loss": None,
            "measured": [],
        }
        self.stages = self._stages()

    def restore(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved.pop("model"))
        base, optimizer, pairs = saved.pop("base"), saved.pop("optimizer"), saved.pop("pairs")
        draft = saved.pop("draft")
        self.state = saved
        if base is not None:
            self.base = self._frozen(base)
        self.optimizer.load_state_dict(optimizer)
        self.pairs = None if pairs is None else train.Pairs(*pairs)
        self.state["resumed"] += 1
        if draft is not None:
            weights, moments = draft
            self._new_draft()
            assert self.draft is not None
            assert self.draft_optimizer is not None
            self.draft.load_state_dict(weights)
            self.draft_optimizer.load_state_dict(moments)

    def save(self) -> None:
        pairs, draft, moments = self.pairs, self.draft, self.draft_optimizer
        checkpoint.save(
            self.folder,
            self.state
            | {
                "model": self.model.state_dict(),
                "base": None if self.base is None else self.base.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "draft": None
                if draft is None or moments is None
                else (draft.state_dict(), moments.state_dict()),
                "pairs": None if pairs is None else (pairs.tokens, pairs.labels, pairs.ref_logps),
            },
        )

    def go(self) -> None:
        """Run every stage from where the state stands."""
        saved_at = time.monotonic()
        while self.state["stage"] < len(self.stages):
            stage = self.stages[self.state["stage"]]
            clock = time.monotonic()
            if self.state["position"] == 0:
                stage.begin()
            total = stage.total()
            self.progress.stage(stage.name, total, self.state["position"])
            while self.state["position"] < total:
                note = stage.step(self.state["position"])
                self.state["position"] += 1
                self.progress.step(self.state["position"], note)
                clock = self._count(stage.name, clock)
                if clock - saved_at > self.settings.checkpoint_seconds:
                    self.save()
                    saved_at = time.monotonic()
            stage.end()
            self._count(stage.name, clock)
            self.state["stage"] += 1
            self.state["position"] = 0
        self.save()

    def _count(self, name: str, since: float) -> float:
        now = time.monotonic()
        seconds = self.state["seconds"]
        seconds[name] = seconds.get(name, 0.0) + now - since
        return now

    def _frozen(self, weights: dict[str, Any]) -> Decoder:
        base = train.new_model(self.settings)
        base.load_state_dict(weights)
        return base.requires_grad_(False)

    def _stages(self) -> list[Stage]:
        settings = self.settings
        stages = [
            Stage(
                "read the text",
                nothing,
                lambda: settings.pretrain_steps,
                self._text_step,
                self._freeze,
            )
        ]
        for round_ in range(settings.rounds):
            stages += [
                self._sampling(f"round {round_ + 1}: answer", self._round_prompts(round_),
                               settings.answers, lambda: self.model),
                Stage(
                    f"round {round_ + 1}: learn from pairs",
                    lambda round_=round_: self._begin_pairs(round_),  # type: ignore[misc]
                    lambda: train.pair_steps(len(self.pairs or ()), settings),
                    lambda step, round_=round_: self._pair_step(round_, step),  # type: ignore[misc]
                    self._end_pairs,
                ),
            ]  # fmt: skip
        stages += [
            self._sampling("held-out prompts, before", self.eval_prompts, settings.eval_answers,
                           lambda: self.base or self.model),
            self._sampling("held-out prompts, after", self.eval_prompts, settings.eval_answers,
                           lambda: self.model),
        ]  # fmt: skip
        stages += self._serving()
        if settings.measure:
            cases = head_comparison.cases(settings)
            stages.append(
                Stage(
                    "measure the head",
                    nothing,
                    lambda: len(cases),
                    lambda i: self._measure(cases[i]),
                    nothing,
                )
            )
        return stages

    # Reading

    def _text_step(self, step: int) -> str:
        settings, curve = self.settings, self.state["curve"]
        loss = train.text_step(self.model, self.optimizer, self.train_tokens, step, settings)
        every = max(1, settings.pretrain_steps // settings.loss_points)
        if (step + 1) % every == 0 or step + 1 == settings.pretrain_steps:
            self._curve_point("text", step + 1, loss)
        heldout = f"  held-out {curve[-1]['heldout']:.3f}" if curve else ""
        return f"loss {loss:.3f}{heldout} nats/byte"

    def _curve_point(self, phase: str, step: int, loss: float | None) -> None:
        heldout = train.heldout_loss(self.model, self.heldout_tokens, self.settings)
        self.state["curve"].append(
            {
                "phase": phase,
                "step": step,
                "seconds": sum(self.state["seconds"].values()),
                "train": loss,
                "heldout": heldout,
            }
        )

    def _freeze(self) -> None:
        self.base = self._frozen(self.model.state_dict())
        self.optimizer = train.new_optimizer(self.model, 0.0)

    # Answering

    def _round_prompts(self, round_: int) -> list[Prompt]:
        n = min(self.settings.round_prompts, len(self.feedback_prompts))
        start = round_ * n
        many = self.feedback_prompts
        return [many[i % len(many)] for i in range(start, start + n)]

    def _sampling(
        self, name: str, prompts: list[Prompt], each: int, model: Callable[[], Decoder]
    ) -> Stage:
        """Draw ``each`` answers per prompt; a step is a batch of rows."""
        rows = [prompt for prompt in prompts for _ in range(each)]
        size = self.settings.sample_batch

        def begin() -> None:
            self.state["answers"] = []

        def step(position: int) -> str:
            seed = seed_of(self.settings.seed, name, position)
            part = rows[position * size : (position + 1) * size]
            drawn = generate.answers(model(), part, self.settings, seed)
            self.state["answers"] += drawn
            scores = [self.judge.score(p, a) for p, a in zip(part, drawn)]
            return f"score {sum(scores) / len(scores):.3f}"

        def end() -> None:
            flat = self.state["answers"]
            self.state["sampled"][name] = [flat[i : i + each] for i in range(0, len(flat), each)]
            self.state["answers"] = []

        return Stage(name, begin, lambda: math.ceil(len(rows) / size), step, end)

    # Learning from pairs

    def _begin_pairs(self, round_: int) -> None:
        assert self.base is not None
        prompts = self._round_prompts(round_)
        answers = self.state["sampled"][f"round {round_ + 1}: answer"]
        chosen, scores = train.choose_pairs(prompts, answers, self.judge, self.settings)
        self.pairs = train.pack_pairs(chosen, self.judge, self.base, self.settings)
        del self.state["rounds"][round_:]
        self.state["rounds"].append(
            {
                "prompts": len(prompts),
                "pairs": len(chosen),
                "score": sum(scores) / len(scores),
                "steps": [],
            }
        )

    def _pair_step(self, round_: int, step: int) -> str:
        assert self.pairs is not None
        metrics = train.pair_step(
            self.model, self.optimizer, self.pairs, round_, step, self.settings
        )
        self.state["rounds"][round_]["steps"].append(metrics)
        return f"loss {metrics['loss']:.3f}  margin {metrics['rewards/margins']:.2f}"

    def _end_pairs(self) -> None:
        self.pairs = None
        self._curve_point("pairs", len(self.state["curve"]), None)

    # Serving

    def _serving(self) -> list[Stage]:
        settings = self.settings
        served = self.eval_prompts[: settings.serve_prompts]
        batches = [
            served[i : i + settings.serve_batch]
            for i in range(0, len(served), settings.serve_batch)
        ]
        # Modes take turns batch by batch, so that a busy moment of the machine hits them alike.
        work = [(mode, batch) for batch in range(len(batches)) for mode in serve.MODES]

        def begin() -> None:
            self.state["served"] = []

        def step(position: int) -> str:
            mode, batch = work[position]
            assert self.draft is not None
            seed = seed_of(settings.seed, "serve", batch)
            found = serve.serve(mode, self.model, self.draft, batches[batch], settings, seed)
            self.state["served"].append(found)
            return f"{mode}: {found['bytes'] / found['calls']:.2f} bytes per call of the model"

        return [
            Stage(
                "teach the draft",
                self._new_draft,
                lambda: settings.draft_steps,
                self._draft_step,
                nothing,
            ),
            Stage("serve held-out prompts", begin, lambda: len(work), step, nothing),
        ]

    def _new_draft(self) -> None:
        self.draft = serve.new_draft(self.settings)
        self.draft_optimizer = train.new_optimizer(self.draft, 0.0)

    def _draft_step(self, step: int) -> str:
        assert self.draft is not None
        assert self.draft_optimizer is not None
        if self.answer_rows is None:  # a resumed run makes them again
            self.answer_rows = self._rows_for_the_draft()
        loss = serve.draft_step(
            self.draft, self.draft_optimizer, self.model, self.answer_rows, step, self.settings
        )
        self.state["draft_loss"] = loss
        return f"divergence {loss:.3f} nats/byte"

    def _rows_for_the_draft(self) -> Tensor:
        """Answers given while the model learned; pieces of the text where it learned from no answers."""
        rounds, context = range(self.settings.rounds), self.settings.context
        rows = [
            serve.answered(
                self._round_prompts(round_),
                self.state["sampled"][f"round {round_ + 1}: answer"],
                self.settings,
            )
            for round_ in rounds
        ]
        starts = torch.arange(0, len(self.train_tokens) - context, context)[:4096]
        pieces = self.train_tokens[starts[:, None] + torch.arange(context)].to(torch.uint8)
        return torch.cat(rows) if rows else pieces

    # Measuring

    def _measure(self, case: dict[str, Any]) -> str:
        results = head_comparison.in_fresh_process(case)
        self.state["measured"] += results
        return "  ".join(
            f"{found['loss']}: {found['torch']['median_ms'] / found['hotloop']['median_ms']:.2f} x "
            "the speed of torch"
            for found in results
        )

    def comparison(self) -> dict[str, Any]:
        sampled = self.state["sampled"]
        return evaluate.compare(
            self.eval_prompts,
            sampled["held-out prompts, before"],
            sampled["held-out prompts, after"],
            self.judge,
            self.settings,
        )
