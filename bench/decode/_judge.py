# SPDX-License-Identifier: Apache-2.0
"""Random results before times: frequencies against the exact law, and ours against its reference.

A contender runs many times on one input set. What it emits must be possible, and what is counted
must lie within Bernstein's bound of its exact mean: a count of independent events with variance v
is off by t with probability 2 exp(-t^2 / (2 v + 2 t / 3)) at most, however few they are. The
bound is set so that a right contender fails one count in 10^7. Ours must also equal
``hotloop.reference`` for the same seed, token by token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._case import Contender, Inputs, Verdict

_ALARM = 1e-7
_REQUESTS = 512
"""At least so many requests are looked at, and so many calls."""
_CALLS = 8
_SEED = 20
# Rivals form p - q and sums of float32 probabilities: a token this near to none is no error.
_ROUNDING = 1e-4


def bernstein(variance: float) -> float:
    """The deviation that a sum of independent events exceeds with probability ``_ALARM``."""
    log = math.log(2 / _ALARM)
    return log / 3 + math.sqrt(log * log / 9 + 2 * log * variance)


@dataclass
class Count:
    """Independent events: how many came true, and how many should have."""

    what: str
    seen: float = 0.0
    mean: float = 0.0
    variance: float = 0.0
    events: int = 0

    def add(self, happened: bool, probability: float) -> None:
        self.seen += happened
        self.mean += probability
        self.variance += probability * (1 - probability)
        self.events += 1

    @property
    def share_off(self) -> float:
        return abs(self.seen - self.mean) / max(self.events, 1)

    def complaint(self) -> str:
        bound = bernstein(self.variance)
        if abs(self.seen - self.mean) <= bound:
            return ""
        return (
            f"{self.what} {self.seen:.0f} of {self.events} times, expected {self.mean:.1f} "
            f"+- {bound:.1f}"
        )


@dataclass(frozen=True)
class Law:
    """What one token is drawn from: the tokens possible, and the likelier half of its mass."""

    possible: Tensor
    likely: Tensor
    share: float

    @staticmethod
    def of(mass: Tensor, possible: Tensor | None = None) -> Law:
        """``mass``: float64 (V,), any sum. The likelier half: the fewest tokens with half of it."""
        p = mass / mass.sum()
        ordered, places = p.sort(descending=True, stable=True)
        count = int((ordered.cumsum(-1) < 0.5).sum()) + 1
        likely = torch.zeros_like(p, dtype=torch.bool)
        likely[places[:count]] = True
        return Law(mass > 0 if possible is None else possible, likely, float(p[likely].sum()))


def softmax(x: Tensor) -> Tensor:
    return x.double().softmax(-1)


@dataclass(frozen=True)
class Verification:
    """The exact law of a verification that keeps some tokens and draws one."""

    depth: int
    survival: Callable[[int], list[float]]
    """Of a request: the probability of more than i kept tokens, i from 0."""
    follow: Callable[[int, list[int]], Law | None]
    """Of a request, after these kept tokens: the law of the next; None if they cannot be kept."""


Exact = Callable[[Inputs], Verification]
Reference = Callable[[Inputs, int], tuple[Any, ...]]


def verification(exact: Exact, reference: Reference) -> Callable[[Contender, Inputs], Verdict]:
    """Judge contenders that give (tokens, number kept, ...)."""

    def judge(contender: Contender, inputs: Inputs) -> Verdict:
        law = exact(inputs)
        survival = cache(law.survival)
        after = cache(lambda b, kept: law.follow(b, list(kept)))
        batch = len(inputs["target"])
        counts = [Count(f"kept more than {i}") for i in range(law.depth)]
        drawn = Count("drew from the likelier half")
        for ids, number in _calls(contender, inputs, batch):
            for b in range(batch):
                n = number[b]
                for i, probability in enumerate(survival(b)):
                    counts[i].add(n > i, probability)
                kept, last = tuple(ids[b][:n]), ids[b][n]
                following = after(b, kept)
                if following is None or not 0 <= last < len(following.possible):
                    return Verdict([math.inf], f"emitted {ids[b]}, which is no path of the draft")
                if not following.possible[last]:
                    return Verdict([math.inf], f"emitted token {last} of probability 0")
                drawn.add(bool(following.likely[last]), following.share)
        return _verdict([*counts, drawn], contender, inputs, reference)

    return judge


def draws(
    laws: Callable[[Inputs], list[Law]], reference: Reference
) -> Callable[[Contender, Inputs], Verdict]:
    """Judge contenders that give one token of each row."""

    def judge(contender: Contender, inputs: Inputs) -> Verdict:
        rows = laws(inputs)
        drawn = Count("drew from the likelier half")
        for (ids,) in _calls(contender, inputs, len(rows)):
            for law, token in zip(rows, ids, strict=True):
                if not (0 <= token < len(law.possible) and law.possible[token]):
                    return Verdict([math.inf], f"emitted token {token} of probability 0")
                drawn.add(bool(law.likely[token]), law.share)
        return _verdict([drawn], contender, inputs, reference)

    return judge


def _calls(contender: Contender, inputs: Inputs, batch: int) -> Any:
    """What repeated calls gave, as lists."""
    for _ in range(max(_CALLS, math.ceil(_REQUESTS / batch))):
        value = contender.forward(inputs)
        if value[0].ndim == 1:
            yield (value[0].tolist(),)
            continue
        kept = value.num_accepted if hasattr(value, "num_accepted") else value[1]
        yield value[0].tolist(), kept.reshape(-1).tolist()


def _verdict(
    counts: list[Count], contender: Contender, inputs: Inputs, reference: Reference
) -> Verdict:
    """The largest deviations of a share, and what is wrong, if anything."""
    errors = [max((c.share_off for c in counts[:-1]), default=0.0), counts[-1].share_off]
    complaints = [text for c in counts if (text := c.complaint())]
    if contender.role == "ours":
        fixed = Inputs({**inputs.tensors, "seeds": itertools.repeat(_SEED)}, inputs.wrt)
        found, wanted = contender.forward(fixed), reference(inputs, _SEED)
        for at, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
            same = (
                torch.allclose(mine.double(), theirs.double(), rtol=1e-5, atol=1e-5)
                if theirs.is_floating_point()
                else torch.equal(mine.cpu(), theirs.cpu())
            )
            if not same:
                complaints.append(f"differs from hotloop.reference in result {at} for one seed")
    return Verdict(errors, "; ".join(complaints))


def chain(inputs: Inputs) -> Verification:
    return _chain_like(inputs, False)


def block(inputs: Inputs) -> Verification:
    return _chain_like(inputs, True)


def _chain_like(inputs: Inputs, whole_block: bool) -> Verification:
    target, draft = inputs["target"], inputs["draft"]
    tokens = inputs["tokens"].tolist()
    k = len(tokens[0])
    to_law = (lambda x: x.double()) if inputs.tensors.get("probabilities") else softmax

    def left(b: int, i: int, reach: float) -> Tensor:
        return (reach * to_law(target[b, i]) - to_law(draft[b, i])).clamp(min=0)

    @cache
    def reaches(b: int) -> list[float]:
        """Share of each prefix that the target keeps, block by block or on its own."""
        found = [1.0]
        for i, token in enumerate(tokens[b]):
            ratio = float(to_law(target[b, i])[token] / to_law(draft[b, i])[token])
            found.append(min(1.0, found[i] * ratio if whole_block else ratio))
        return found

    def survival(b: int) -> list[float]:
        r = reaches(b)
        if not whole_block:
            return list(itertools.accumulate(r[1:], lambda x, y: x * y))
        fails, found = 1.0 - r[k], [r[k]]
        for i in range(k - 1, 0, -1):
            rest = float(left(b, i, r[i]).sum())
            fails *= 1 - (1.0 if r[i] >= 1 else rest / (rest + 1 - r[i]))
            found.append(1 - fails)
        return found[::-1]

    def follow(b: int, kept: list[int]) -> Law | None:
        n = len(kept)
        if kept != tokens[b][:n]:
            return None
        if n == k:
            return Law.of(to_law(target[b, k]))
        reach = reaches(b)[n] if whole_block else 1.0
        p, q = reach * to_law(target[b, n]), to_law(draft[b, n])
        return Law.of((p - q).clamp(min=0), (p > 0) & (p >= q * (1 - _ROUNDING)))

    return Verification(k, survival, follow)


def tree(inputs: Inputs) -> Verification:
    """Children without chance: each is kept with its probability, the rest is drawn."""
    target, children, depth = inputs["target"], inputs["children"], inputs["depth"]
    tokens = inputs["tokens"].tolist()

    def survival(b: int) -> list[float]:
        found, level = [], {0: 1.0}
        for _ in range(depth):
            following: dict[int, float] = {}
            for row, reached in level.items():
                p = softmax(target[b, row]) if children[row] else None
                for j in children[row]:
                    assert p is not None
                    following[j + 1] = reached * float(p[tokens[b][j]])
            level = following
            found.append(sum(level.values()))
        return found

    def follow(b: int, kept: list[int]) -> Law | None:
        row = 0
        for token in kept:
            fitting = [j for j in children[row] if tokens[b][j] == token]
            if not fitting:
                return None
            row = fitting[0] + 1
        p = softmax(target[b, row])
        p[[tokens[b][j] for j in children[row]]] = 0
        return Law.of(p)

    return Verification(depth, survival, follow)


def truncated(top_k: int, top_p: float) -> Callable[[Inputs], list[Law]]:
    """Laws of rows of logits after top-k and then top-p, ties kept."""

    def law(z: Tensor) -> Law:
        mass = softmax(z)
        if top_k:
            mass = torch.where(z >= z.topk(top_k).values[-1], mass, 0)
        if top_p >= 1:
            return Law.of(mass)
        ordered = (mass / mass.sum()).sort(descending=True)
        before = ordered.values.cumsum(-1) - ordered.values
        # float32 sums end a nucleus some tokens sooner or later than exact ones.
        least, ample = (
            ordered.values[(before < share).sum() - 1] for share in (top_p, top_p + _ROUNDING)
        )
        p = mass / mass.sum()
        return Law.of(torch.where(p >= least, mass, 0), (p > 0) & (p >= ample))

    return lambda inputs: [law(z.double()) for z in inputs["logits"]]
