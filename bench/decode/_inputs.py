# SPDX-License-Identifier: Apache-2.0
"""Logits as a language model gives them, a draft that is right about 70 % of the time, a tree."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _roofs
from .._case import Cost, Inputs

ACCEPTED = 0.7
"""Share of draft tokens that are accepted; the noise of the draft is set to it."""

# A bulk of logits with a standard deviation of 2, and 64 likely tokens: together 70 % to 99 % of
# the mass, falling as a power of their rank. A nucleus of 90 % then has a few tokens or thousands.
_STD, _LIKELY = 2.0, 64
_SHARE, _POWER = (0.70, 0.99), (0.5, 2.5)
# Measured over 4000 rows of 32000 tokens: 0.70 of the tokens drawn from the draft are accepted.
_NOISE = 0.88

_BRANCHES = (0.55, 0.15, 0.08, 0.04)
"""Probabilities of the children of a node: of the four one is accepted in about 80 % of cases."""
_SEEDS = 16


def logits(generator: torch.Generator, shape: Sequence[int], vocabulary: int) -> Tensor:
    """float32 (*shape, V)."""
    device = generator.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(rows, 1, generator=generator, device=device) * (high - low) + low

    rows, likely = math.prod(shape), min(_LIKELY, vocabulary // 4)
    z = torch.randn(rows, vocabulary, generator=generator, device=device) * _STD
    share, power = uniform(*_SHARE), uniform(*_POWER)
    weights = -power * torch.arange(1, likely + 1, device=device).log()
    raised = weights - weights.logsumexp(-1, keepdim=True) + (share / (1 - share)).log()
    raised += z.logsumexp(-1, keepdim=True)
    places = torch.rand(rows, vocabulary, generator=generator, device=device).topk(likely).indices
    return z.scatter_(-1, places, raised).reshape(*shape, vocabulary)


def rows_read(dtype: str, device: str, **sizes: int) -> dict[str, Any]:
    """Dtype, device, cost and roof of a ``Case`` that reads the product of ``sizes`` logits once."""
    item = torch.finfo(getattr(torch, dtype)).bits // 8
    cost = Cost("bytes", "*".join([*sizes, "item"]), {**sizes, "item": item})
    roof = _roofs.read(int(cost.amount), device)
    return {"dtype": dtype, "device": device, "cost": cost, "roof": roof}


def chain(
    seed: int, size: tuple[int, int, int], dtype: str, device: str, probabilities: bool = False
) -> Inputs:
    """``target`` (B, K+1, V), ``draft`` (B, K, V) and ``tokens`` (B, K) drawn from the draft."""
    batch, k, vocabulary = size
    generator = torch.Generator(device).manual_seed(seed)
    target = logits(generator, (batch, k + 1), vocabulary)
    noise = torch.randn(batch, k, vocabulary, generator=generator, device=device)
    draft = (target[:, :k] + _NOISE * noise).to(getattr(torch, dtype))
    target = target.to(draft.dtype)
    law = draft.float().softmax(-1)
    tokens = torch.multinomial(law.reshape(batch * k, vocabulary), 1, generator=generator)
    if probabilities:
        target, draft = target.float().softmax(-1), law
    # Every call draws anew, as the rivals do.
    return Inputs(
        {
            "target": target,
            "draft": draft,
            "tokens": tokens.reshape(batch, k),
            "probabilities": probabilities,
            "seeds": itertools.count(),
        },
        (),
    )


def visited_rows(batch: int, k: int) -> int:
    """Rows of target and draft up to the first rejection, on average."""
    target = sum(ACCEPTED**i for i in range(k + 1))
    return round(batch * (2 * target - ACCEPTED**k))


def residual_rows(batch: int, k: int) -> int:
    """Rows of probabilities that are read whole: two after a rejection, else one."""
    return round(batch * (2 - ACCEPTED**k))


def topology(nodes: int, children: int, depth: int) -> list[int]:
    """Parents of a tree, -1 for the root: the likeliest node under each of two goes on."""
    parents: list[int] = []
    level = [-1]
    for at in range(depth):
        own = range(len(parents), len(parents) + children * len(level))
        parents += [parent for parent in level for _ in range(children)]
        # The last level takes what is left.
        wide = 2 if at + 2 < depth else (nodes - len(parents)) // children
        level = [*own[::children], *own[1::children]][:wide]
    return parents


def tree(
    seed: int, size: tuple[int, int, int], children: int, depth: int, dtype: str, device: str
) -> Inputs:
    """``target`` (B, M+1, V), ``tokens`` and ``parents`` (B, M), ``children`` of each row.

    ``chains`` holds for each of a few seeds a chain that visits as many rows in the same way: token
    after token is accepted with certainty, the last one rejected or the chain at its end.
    """
    batch, nodes, vocabulary = size
    generator = torch.Generator(device).manual_seed(seed)
    target = logits(generator, (batch, nodes + 1), vocabulary)
    parents = topology(nodes, children, depth)
    kids = [[j for j, p in enumerate(parents) if p == row - 1] for row in range(nodes + 1)]
    tokens = torch.zeros(batch, nodes, dtype=torch.long, device=device)
    rest = math.log(1.0 - sum(_BRANCHES[:children]))
    for row, own in enumerate(kids):
        if not own:
            continue
        order = torch.rand(batch, vocabulary, generator=generator, device=device)
        chosen = order.topk(len(own)).indices
        law = target[:, row]
        level = law.scatter(-1, chosen, -math.inf).logsumexp(-1, keepdim=True) - rest
        raised = level + torch.tensor(_BRANCHES[: len(own)], device=device).log()
        law.scatter_(-1, chosen, raised)
        tokens[:, own] = chosen
    made = {
        "target": target.to(getattr(torch, dtype)),
        "tokens": tokens,
        "parents": torch.tensor(parents, device=device).expand(batch, -1).contiguous(),
        "children": kids,
        "depth": depth,
    }
    seeds = itertools.cycle(range(_SEEDS))
    return Inputs({**made, "seeds": seeds, "chains": _as_many_rows(made, depth)}, ())


# p = 1 - 1e-9 over a bulk whose log-sum-exp is about 12 to 14: accepted for certain, and still no
# chunk of the row is so far below it that it need not be weighed.
_CERTAIN = 34.0


def _as_many_rows(made: dict[str, object], depth: int) -> object:
    from hotloop import decode

    target, tokens, parents = made["target"], made["tokens"], made["parents"]
    children = made["children"]
    assert isinstance(target, Tensor) and isinstance(tokens, Tensor)
    assert isinstance(children, list)
    batch = len(tokens)
    rows = target[:, : depth + 1].clone()
    rows[..., 0], rows[..., 1] = _CERTAIN, -math.inf
    chains = []
    for seed in range(_SEEDS):
        done = decode.tree_speculative_verify(
            tokens, parents, decode.Logits(target), max_depth=depth, seed=seed
        )
        accepted = done.num_accepted
        ids, lengths = torch.zeros_like(tokens[:, :depth]), accepted.clone()
        for b in range(batch):
            n = int(accepted[b])
            last = int(done.accepted_nodes[b, n - 1]) + 1 if n else 0
            if n < depth and children[last]:
                ids[b, n], lengths[b] = 1, n + 1
        chains.append((ids, lengths))
    return {"rows": rows, "chains": itertools.cycle(chains)}
