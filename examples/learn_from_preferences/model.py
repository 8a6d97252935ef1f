# SPDX-License-Identifier: Apache-2.0
"""A byte-level decoder: hashed n-grams in, rotary positions, causal attention, an untied head.

Beside the byte itself, each position adds one row for its last two, three and four bytes, from hashed
tables: one byte says little, and a few hundred steps are too few to learn to put bytes together. Measured
on the Python standard library with two tables of 8192 rows: 1.75 to 1.43 nats per held-out byte after 400
steps, for 5 % more time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # bytes; 0 ends a file, and no text holds it
NGRAMS = (2, 3, 4)
_MULTIPLIERS = (1, 257, 66_047, 16_777_619)  # one odd number per place, so that order counts


class Cache:
    """Keys [B, head width, T] and values [B, T, head width] seen so far, one pair per layer."""

    def __init__(self, layers: int, rows: int, length: int, head_width: int) -> None:
        self.keys = [torch.zeros(rows, head_width, length) for _ in range(layers)]
        self.values = [torch.zeros(rows, length, head_width) for _ in range(layers)]
        self.filled = 0

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]


class Places:
    """Where new tokens stand, [B, T], when each row of a batch has come to a place of its own."""

    def __init__(self, places: Tensor) -> None:
        self.places = places
        self.rows = torch.arange(len(places))[:, None]
        self.end = int(places.max()) + 1
        later = torch.arange(self.end) > places[:, :, None]
        self.bias = torch.zeros(later.shape).masked_fill_(later, -torch.inf)[
            :, None
        ]  # (B, 1, T, end)


def rotary(length: int, head_width: int) -> Tensor:
    """Rotation of each position as (2, length, head_width): cosines, then signed sines."""
    half = head_width // 2
    frequency = 10000.0 ** (-torch.arange(half) / half)
    angle = torch.outer(torch.arange(length), frequency)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    swapped = torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)
    return x * table[0] + swapped * table[1]


class Block(nn.Module):
    """Attention whose heads share one key and one value, then a squared-ReLU layer.

    Sampling on a CPU is bound by reading the cache; one key for four heads is a quarter of it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, width + 2 * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        table: Tensor,
        cache: Cache | None,
        layer: int,
        ragged: Places | None = None,
    ) -> Tensor:
        x = x + self.attend(self.attention_norm(x), table, cache, layer, ragged)
        grown: Tensor = F.relu(self.up(self.mlp_norm(x))).square()
        added: Tensor = self.down(grown)
        return x + added

    def attend(
        self,
        x: Tensor,
        table: Tensor,
        cache: Cache | None,
        layer: int,
        ragged: Places | None = None,
    ) -> Tensor:
        """What attention adds to the stream, of its norm."""
        rows, length, width = x.shape
        split = self.qkv(x).view(rows, length, self.heads + 2, -1)
        mixed = split.transpose(1, 2)  # (B, heads + 2, T, head width)
        q = rotate(mixed[:, : self.heads], table)
        k = rotate(mixed[:, self.heads : -1], table)
        v = mixed[:, -1:]
        if cache is not None and ragged is not None:
            cache.keys[layer][ragged.rows, :, ragged.places] = k[:, 0].float()
            cache.values[layer][ragged.rows, ragged.places] = v[:, 0].float()
        elif cache is not None:
            start, end = cache.filled, cache.filled + length
            cache.keys[layer][:, :, start:end] = k[:, 0].transpose(1, 2)
            cache.values[layer][:, start:end] = v[:, 0]
        if cache is not None and ragged is not None:
            seen = self._several_steps(q, cache, layer, ragged)
        elif length == 1 and cache is not None:
            seen = self._one_step(q[:, :, 0], cache, layer)
        else:
            shape = (rows, self.heads, length, self.head_width)
            seen = F.scaled_dot_product_attention(
                q, k.expand(shape), v.expand(shape), is_causal=True
            ).transpose(1, 2)
        update: Tensor = self.out(seen.reshape(rows, length, width))
        return update

    def _one_step(self, q: Tensor, cache: Cache, layer: int) -> Tensor:
        """One new position. torch's fused attention took ten times as long for a single query."""
        end = cache.filled + 1
        with torch.autocast("cpu", enabled=False):  # it would copy the cache to cast it
            scores = torch.matmul(q.float(), cache.keys[layer][:, :, :end])
            weights = (scores * self.head_width**-0.5).softmax(-1)
            return torch.matmul(weights, cache.values[layer][:, :end])

    def _several_steps(self, q: Tensor, cache: Cache, layer: int, ragged: Places) -> Tensor:
        """A few new positions of each row, wherever that row stands."""
        rows, heads, length, _ = q.shape
        with torch.autocast("cpu", enabled=False):  # as in _one_step
            scores = torch.matmul(q.float().flatten(1, 2), cache.keys[layer][:, :, : ragged.end])
            scores = scores.view(rows, heads, length, -1) * self.head_width**-0.5 + ragged.bias
            weights = scores.softmax(-1).flatten(1, 2)
            seen = torch.matmul(weights, cache.values[layer][:, : ragged.end])
        return seen.view(q.shape).transpose(1, 2)


class Decoder(nn.Module):
    """Bytes [B, T] to hidden states [B, T, D]; ``head`` [256, D] turns those into logits."""

    def __init__(self, width: int, layers: int, heads: int, context: int, ngram_rows: int) -> None:
        super().__init__()
        self.width, self.head_width, self.ngram_rows = width, width // heads, ngram_rows
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.ngrams = nn.ModuleList([nn.Embedding(ngram_rows, width) for _ in NGRAMS])
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Parameter(torch.empty(VOCABULARY, width))
        self.register_buffer("table", rotary(context, self.head_width), persistent=False)
        self._start(layers)

    table: Tensor

    def _start(self, layers: int) -> None:
        for embedding in (self.embedding, *self.ngrams):
            nn.init.normal_(embedding.weight, std=0.02)
        nn.init.normal_(self.head, std=0.02)
        for name, parameter in self.blocks.named_parameters():
            if parameter.ndim == 2:
                into_stream = name.endswith(("out.weight", "down.weight"))
                std = 0.02 / (2 * layers) ** 0.5 if into_stream else 0.02
                nn.init.normal_(parameter, std=std)

    def new_cache(self, rows: int, length: int) -> Cache:
        return Cache(len(self.blocks), rows, length, self.head_width)

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """Rows of positions ``start`` and later; earlier bytes only complete their n-grams."""
        first = max(0, start - max(NGRAMS) + 1)
        seen = tokens[:, first:]
        x: Tensor = self.embedding(seen[:, start - first :])
        mixed = seen * _MULTIPLIERS[0]
        for back in range(1, max(NGRAMS)):
            mixed = mixed + F.pad(seen, (back, 0))[:, : seen.shape[1]] * _MULTIPLIERS[back]
            if back + 1 in NGRAMS:
                hashed = (mixed % 2_147_483_629 % self.ngram_rows)[:, start - first :]
                x = x + self.ngrams[NGRAMS.index(back + 1)](hashed)
        return x

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Hidden states of the tokens that ``cache`` does not hold yet, all of them without one."""
        start = 0 if cache is None else cache.filled
        table = self.table[:, start : tokens.shape[1]]
        x = self.embed(tokens, start)
        for layer, block in enumerate(self.blocks):
            x = block(x, table, cache, layer)
        if cache is not None:
            cache.filled = tokens.shape[1]
        hidden: Tensor = self.norm(x)
        return hidden

    def extend(self, tokens: Tensor, filled: Tensor, count: int, cache: Cache) -> Tensor:
        """Hidden states [B, count, D] of the tokens of row b from position filled[b] on, which is at least 3.

        What ``cache`` holds at these positions and later is replaced or not looked at, so rejected drafts
        need no clearing. Positions beyond the last one stand for nothing and share its place, which no
        token that is still to be followed by another one can have.
        """
        before = max(NGRAMS) - 1
        places = (filled[:, None] + torch.arange(-before, count)).clamp(max=tokens.shape[1] - 1)
        x = self.embed(tokens.gather(1, places), before)
        ragged = Places(places[:, before:])
        table = self.table[:, ragged.places][:, :, None]
        for layer, block in enumerate(self.blocks):
            x = block(x, table, cache, layer, ragged)
        hidden: Tensor = self.norm(x)
        return hidden
