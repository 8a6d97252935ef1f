# SPDX-License-Identifier: Apache-2.0
"""Laws in plain float64 NumPy, draws that hotloop has no part in, and the test of one against the other.

Nothing here calls an op of hotloop: the softmax, the masks, the residuals and the uniforms are written again.
``uniforms`` alone reads hotloop's counter-based generator, for the tests that misuse it on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mpmath
import numpy as np
from hotloop import core

FALSE_ALARM = 1e-6
"""The chance that a test of a law fails although the law holds; seeds are fixed, so it fails never or always."""


def softmax(z: np.ndarray) -> np.ndarray:
    z = np.asarray(z, np.float64)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def renormalised(p: np.ndarray) -> np.ndarray:
    return p / p.sum(-1, keepdims=True)


@dataclass(frozen=True)
class Mode:
    """One way to turn logits into a law; ``bias`` maps a token to what its logit gains."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    filter_order: str = "top_k_first"
    mixture: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)

    def law(self, z: np.ndarray, reference: np.ndarray | None = None) -> np.ndarray:
        """Probabilities (..., V) of logits (..., V), each row with explicit masks."""
        z = np.asarray(z, np.float64)
        if self.mixture:
            z = (1 - self.mixture) * z + self.mixture * np.asarray(reference, np.float64)
        z = z.copy()
        for token, more in self.bias.items():
            z[..., token] += more
        return np.apply_along_axis(self._row, -1, z)

    def _row(self, z: np.ndarray) -> np.ndarray:
        if self.temperature == 0:
            return np.eye(z.size)[int(np.argmax(z))]
        p = softmax(z / self.temperature)
        order = sorted(range(p.size), key=lambda v: -p[v])
        # Whoever equals the last one kept is kept.
        least = p[order[self.top_k - 1]] if 0 < self.top_k < p.size else 0.0
        by_count = {v for v in order if p[v] >= least}
        share = renormalised(np.array([p[v] if v in by_count else 0.0 for v in range(p.size)]))
        measured = share if self.filter_order == "top_k_first" else p
        before, last = 0.0, order[0]
        for v in order:
            assert abs(before - self.top_p) > 1e-5 or self.top_p == 1, "too close to tell"
            if before >= self.top_p:
                break
            before, last = before + measured[v], v
        nucleus = {v for v in order if p[v] >= p[last]}
        likely = {v for v in order if p[v] >= self.min_p * p.max()}
        kept = by_count & nucleus & likely
        return renormalised(np.array([p[v] if v in kept else 0.0 for v in range(p.size)]))

    def arguments(self) -> dict[str, Any]:
        """The same for ``Logits``, but for the second model and the bias."""
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "filter_order": self.filter_order,
        }

    def bias_arguments(self, batch: int) -> dict[str, Any]:
        if not self.bias:
            return {}
        ids = np.tile(np.array(list(self.bias), np.int64), (batch, 1))
        return {
            "bias_ids": ids,
            "bias": np.tile(np.array(list(self.bias.values()), np.float32), (batch, 1)),
        }


def categorical(rng: np.random.Generator, laws: np.ndarray) -> np.ndarray:
    """One token for every row of (n, V)."""
    sums = np.cumsum(laws, axis=-1)
    u = rng.random(laws.shape[0]) * sums[:, -1]
    return (u[:, None] >= sums).sum(-1)


def without_replacement(rng: np.random.Generator, laws: np.ndarray, count: int) -> np.ndarray:
    """``count`` different tokens for every row of (n, V), in the order they were drawn."""
    left = laws.copy()
    drawn = np.empty((laws.shape[0], count), np.int64)
    for i in range(count):
        drawn[:, i] = categorical(rng, left)
        np.put_along_axis(left, drawn[:, i, None], 0.0, -1)
    return drawn


def chi_square(counts: np.ndarray, law: np.ndarray) -> float:
    """The p-value of counts under a law; 0 if something impossible was counted.

    Cells that expect less than 10 go together.
    """
    counts, law = np.asarray(counts, np.float64).ravel(), np.asarray(law, np.float64).ravel()
    assert counts.shape == law.shape
    assert abs(law.sum() - 1) < 1e-9
    assert counts.min() >= 0
    if counts[law <= 0].any():
        return 0.0
    expected = counts.sum() * law
    small = expected < 10
    if small.any():
        counts = np.append(counts[~small], counts[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
        if expected[-1] < 10:  # too little even together: it joins the next smallest cell
            at = int(np.argmin(expected[:-1]))
            counts[at] += counts[-1]
            expected[at] += expected[-1]
            counts, expected = counts[:-1], expected[:-1]
    if counts.size < 2:
        return 1.0
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = (counts.size - 1) / 2
    return float(mpmath.gammainc(freedom, statistic / 2, mpmath.inf, regularized=True))


def assert_law(counts: np.ndarray, law: np.ndarray, least: int = 10**6) -> None:
    assert counts.sum() >= least
    p = chi_square(counts, law)
    assert p > FALSE_ALARM, (
        f"p-value {p:.3g}: {counts.ravel()} against {counts.sum() * law.ravel()}"
    )


def assert_rejected(counts: np.ndarray, law: np.ndarray) -> None:
    """A negative control: what is wrong by construction has to be found out."""
    p = chi_square(counts, law)
    assert p < FALSE_ALARM, f"p-value {p:.3g}: the control passed"


def assert_share(hits: int, trials: int, probability: float) -> None:
    """Binomial: |hits - n p| <= 5 sqrt(n p (1 - p)); wrong by chance 6e-7 of the time."""
    spread = np.sqrt(trials * probability * (1 - probability))
    assert abs(hits - trials * probability) <= 5 * spread + 1e-9, (hits / trials, probability)


def histogram(tokens: np.ndarray, vocabulary: int) -> np.ndarray:
    """Counts (V, ..., V) of token sequences (n, L)."""
    shape = (vocabulary,) * tokens.shape[1]
    flat = np.ravel_multi_index(tuple(tokens.T.astype(np.int64)), shape)
    return np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True)
class Story:
    """A target and a draft model over three positions, whose laws depend on the tokens so far.

    Logits (V,), (V, V) and (V, V, V): row [x0, x1] is the law after x0, x1.
    """

    target: tuple[np.ndarray, ...]
    draft: tuple[np.ndarray, ...]

    @staticmethod
    def of(vocabulary: int, seed: int, likeness: float = 0.7) -> Story:
        rng = np.random.default_rng(seed)
        shapes = [(vocabulary,) * (i + 1) for i in range(3)]
        target = tuple((1.2 * rng.normal(size=s)).astype(np.float32) for s in shapes)
        draft = tuple(
            (likeness * t + 0.7 * rng.normal(size=t.shape)).astype(np.float32) for t in target
        )
        return Story(target, draft)


def rows_of(tables: tuple[np.ndarray, ...], x: np.ndarray, count: int) -> np.ndarray:
    """Rows (n, count, V) of the tables along the tokens (n, count - 1)."""
    n, vocabulary = x.shape[0], tables[0].size
    out = np.empty((n, count, vocabulary), tables[0].dtype)
    for i in range(count):
        out[:, i] = tables[i][tuple(x[:, j] for j in range(i))]
    return out


def drafted(
    rng: np.random.Generator, laws: tuple[np.ndarray, ...], n: int, count: int
) -> np.ndarray:
    """n sequences of ``count`` tokens, drawn position by position."""
    x = np.empty((n, count), np.int64)
    for i in range(count):
        rows = laws[i][tuple(x[:, j] for j in range(i))]
        x[:, i] = categorical(rng, np.broadcast_to(rows, (n, rows.shape[-1])))
    return x


def completed(
    rng: np.random.Generator, laws: tuple[np.ndarray, ...], tokens: np.ndarray
) -> np.ndarray:
    """Emitted tokens (n, L), continued with tokens of the target's own where -1 stands."""
    out = tokens.astype(np.int64).copy()
    assert (out[:, 0] >= 0).all()
    for i in range(1, out.shape[1]):
        open_ = np.flatnonzero(out[:, i] < 0)
        rows = laws[i][tuple(out[open_, j] for j in range(i))]
        out[open_, i] = categorical(rng, rows)
    return out


def joint(laws: tuple[np.ndarray, ...], length: int) -> np.ndarray:
    """The law (V, ..., V) of the first ``length`` tokens."""
    p = laws[0]
    for i in range(1, length):
        p = p[..., None] * laws[i]
    return p


SAMPLING, VERIFICATION = 0, 1


def uniforms(
    seed: int, n: int, position: int, domain: int, attempt: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(accept, pick) of n requests under one seed: what the ops draw, for tests of misuse and of extremes."""
    first = attempt << 32 | domain << 56
    words = core.philox(seed, n, offset=position, first_item=first).astype(np.uint64)
    bits = [(words[:, i] << np.uint64(32) | words[:, i + 1]) >> np.uint64(11) for i in (0, 2)]
    a, b = ((x + np.uint64(1)).astype(np.float64) * 2.0**-53 for x in bits)
    return a, b


def inverse_cdf(laws: np.ndarray, u: np.ndarray) -> np.ndarray:
    sums = np.cumsum(laws, axis=-1)
    return np.minimum((u[:, None] > sums).sum(-1), laws.shape[-1] - 1)
