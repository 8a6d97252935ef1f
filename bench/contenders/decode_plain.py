# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding and sampling in plain torch, as one writes them without a library.

A verification gives the tokens (B, K+1), -1 after the last, and how many of the draft were kept.
``torch.multinomial`` draws a number for every token of a row, and on the CPU most of the time goes
there: each recipe is also there with a draw by the inverse of the distribution function.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from .._case import Inputs

Verified = tuple[Tensor, Tensor]
Draw = Callable[[Tensor], Tensor]


def multinomial(mass: Tensor) -> Tensor:
    return torch.multinomial(mass, 1)


def inverse_cdf(mass: Tensor) -> Tensor:
    """One number per row, and where the running sum of its mass reaches it."""
    sums = mass.cumsum(-1)
    return torch.searchsorted(sums, (1 - torch.rand_like(sums[:, :1])) * sums[:, -1:])


def chain(target: Tensor, draft: Tensor, tokens: Tensor, draw: Draw = multinomial) -> Verified:
    """All requests at once: softmax of every row, no loop over requests or positions."""
    return chain_of_probs(target.float().softmax(-1), draft.float().softmax(-1), tokens, draw)


def chain_of_probs(p: Tensor, q: Tensor, tokens: Tensor, draw: Draw = multinomial) -> Verified:
    at = tokens.unsqueeze(-1)
    mine, theirs = p[:, :-1].gather(-1, at).squeeze(-1), q.gather(-1, at).squeeze(-1)
    accepted = torch.rand_like(mine) * theirs <= mine
    n = accepted.long().cumprod(-1).sum(-1)
    # Only the row that counts is gathered, and only what a rejection leaves of it is formed.
    requests = torch.arange(n.numel(), device=n.device)
    row = p[requests, n]
    rejected = q[requests, n.clamp(max=q.shape[1] - 1)]
    all_kept = (n == q.shape[1]).unsqueeze(-1)
    left = torch.where(all_kept, row, (row - rejected).clamp(min=0))
    return _emit(tokens, n, draw(left))


def block(target: Tensor, draft: Tensor, tokens: Tensor, draw: Draw = multinomial) -> Verified:
    """Block verification: the loop is over positions, on one number per request."""
    p, q = target.float().softmax(-1), draft.float().softmax(-1)
    k = q.shape[1]
    at = tokens.unsqueeze(-1)
    ratio = p[:, :-1].gather(-1, at).squeeze(-1) / q.gather(-1, at).squeeze(-1)
    reach = [torch.ones_like(ratio[:, 0])]
    for i in range(k):
        reach.append((reach[-1] * ratio[:, i]).clamp(max=1))
    r = torch.stack(reach, 1)
    left = (r[:, :k, None] * p[:, :k] - q).clamp(min=0)
    mass = left.sum(-1)
    h = torch.where(r[:, :k] >= 1, 1.0, mass / (mass + 1 - r[:, :k]))
    passes = torch.rand_like(ratio) <= torch.cat([h[:, 1:], r[:, k:]], 1)
    n = (passes * torch.arange(1, k + 1, device=p.device)).amax(-1)
    requests = torch.arange(n.numel(), device=n.device)
    row = torch.where((n == k).unsqueeze(-1), p[:, k], left[requests, n.clamp(max=k - 1)])
    return _emit(tokens, n, draw(row))


def _emit(tokens: Tensor, n: Tensor, last: Tensor) -> Verified:
    places = torch.arange(tokens.shape[1] + 1, device=n.device)
    padded = torch.nn.functional.pad(tokens, (0, 1), value=-1)
    after = torch.where(places == n.unsqueeze(-1), last, -1)
    return torch.where(places < n.unsqueeze(-1), padded, after), n


def tree(inputs: Inputs) -> Verified:
    """One request after the other, one child after the other, as EAGLE walks its tree: a child that
    was sampled without chance is kept with the probability that the target gives it now."""
    target, children = inputs["target"], inputs["children"]
    batch, depth = len(target), inputs["depth"]
    tokens = inputs["tokens"].tolist()
    out = torch.full((batch, depth + 1), -1)
    count = torch.zeros(batch, dtype=torch.long)
    for b in range(batch):
        row, n = 0, 0
        while True:
            p = target[b, row].float().softmax(-1)
            kept = -1
            for j in children[row]:
                token = tokens[b][j]
                if random.random() <= p[token].item():
                    kept = j
                    break
                p[token] = 0
                p = p / p.sum()
            if kept < 0:
                break
            out[b, n] = tokens[b][kept]
            row, n = kept + 1, n + 1
        out[b, n] = torch.multinomial(p, 1)
        count[b] = n
    return out, count


def sample_sorted(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor]:
    """Top-k and top-p by one sort: mask the sorted row, put it back, draw."""
    ordered, places = logits.float().sort(dim=-1, descending=False)
    if top_k:
        ordered.masked_fill_(ordered < ordered[:, -top_k, None], -torch.inf)
    if top_p < 1:
        below = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        below[:, -1] = False
        ordered.masked_fill_(below, -torch.inf)
    kept = torch.empty_like(ordered).scatter_(-1, places, ordered)
    return (torch.multinomial(kept.softmax(-1), 1).squeeze(-1),)


def sample_topk_first(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor]:
    """Top-k by selection; all that follows is on k tokens."""
    values, ids = logits.float().topk(top_k)
    p = values.softmax(-1)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)
    return (ids.gather(-1, torch.multinomial(p, 1)).squeeze(-1),)


def sample(logits: Tensor, draw: Draw = multinomial) -> tuple[Tensor]:
    return (draw(logits.float().softmax(-1)).squeeze(-1),)


def beam_step(logits: Tensor, scores: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The best k children of k beams: their scores and sequences."""
    batch, beams, vocabulary = logits.shape
    totals = logits.float().log_softmax(-1) + scores.unsqueeze(-1)
    best, at = totals.reshape(batch, beams * vocabulary).topk(beams)
    parents = (at // vocabulary).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return best, torch.cat([tokens.gather(1, parents), (at % vocabulary).unsqueeze(-1)], -1)


def neighbor_table(codebook: Tensor, k: int) -> tuple[Tensor]:
    distances = torch.cdist(codebook, codebook).fill_diagonal_(torch.inf)
    return (distances.topk(k, largest=False).indices.int(),)
