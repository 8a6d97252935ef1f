# SPDX-License-Identifier: Apache-2.0
"""The laws of verification without a draw: every draft and every outcome of a small case, summed in float64.

The formulas are written here again. That the ops follow them is tested on the reference, which takes any uniforms: just
below and just above each threshold its decision has to change. The compiled loops give the reference's tokens, bit for
bit (test_decode_same_tokens.py).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import numpy as np
import pytest
from decode_cases import joint, renormalised
from hotloop.decode import (
    block_speculative_sampling,
    chain_speculative_sampling,
    tree_speculative_verify,
)
from hotloop.reference.decode import draws

NEAR = 1e-9
"""How far from a threshold a uniform is placed; the laws below have no two thresholds so close."""

Tables = tuple[np.ndarray, ...]


def random_tables(rng: np.random.Generator, vocabulary: int, length: int, sharp: float) -> Tables:
    """Laws (V,), (V, V), ... given the tokens so far."""
    return tuple(
        renormalised(rng.dirichlet(np.full(vocabulary, sharp), size=(vocabulary,) * i) + 1e-3)
        for i in range(length)
    )


def row(tables: Tables, x: tuple[int, ...], i: int) -> np.ndarray:
    return tables[i][x[:i]]


def chain_thresholds(p: Tables, q: Tables, x: tuple[int, ...]) -> list[float]:
    """Token i is accepted if u_i <= this."""
    return [min(1.0, row(p, x, i)[v] / row(q, x, i)[v]) for i, v in enumerate(x)]


def chain_left(p: Tables, q: Tables, x: tuple[int, ...], tau: int) -> np.ndarray:
    left = row(p, x, tau)
    return renormalised(np.maximum(left - row(q, x, tau), 0)) if tau < len(x) else left


def chain_outcomes(p: Tables, q: Tables, x: tuple[int, ...]) -> np.ndarray:
    """P(tau accepted | x) for tau = 0..K."""
    passing = chain_thresholds(p, q, x)
    reached = np.cumprod([1.0, *passing])
    return reached * np.append(1 - np.array(passing), 1.0)


def reach(p: Tables, q: Tables, x: tuple[int, ...]) -> list[float]:
    out = [1.0]
    for i, v in enumerate(x):
        out.append(min(1.0, out[-1] * row(p, x, i)[v] / row(q, x, i)[v]))
    return out


def block_thresholds(p: Tables, q: Tables, x: tuple[int, ...]) -> list[float]:
    """A prefix of i tokens passes if u_i <= this, i = 1..K."""
    r = reach(p, q, x)
    out = []
    for i in range(1, len(x)):
        s = np.maximum(r[i] * row(p, x, i) - row(q, x, i), 0).sum()
        out.append(1.0 if r[i] >= 1 else s / (s + 1 - r[i]))
    return [*out, r[-1]]


def block_left(p: Tables, q: Tables, x: tuple[int, ...], tau: int) -> np.ndarray:
    if tau == len(x):
        return row(p, x, tau)
    return renormalised(np.maximum(reach(p, q, x)[tau] * row(p, x, tau) - row(q, x, tau), 0))


def block_outcomes(p: Tables, q: Tables, x: tuple[int, ...]) -> np.ndarray:
    passing = np.array(block_thresholds(p, q, x))
    later = np.append(np.cumprod((1 - passing)[::-1])[::-1], 1.0)  # all of i..K failed
    return np.append(1.0, passing) * later


def emitted_law(p: Tables, q: Tables, outcomes: Any, left: Any) -> tuple[np.ndarray, float]:
    """The law (V, ..., V) of K+1 tokens, the last ones the target's own, and the mean number accepted."""
    vocabulary, k = p[0].size, len(q)
    law, accepted = np.zeros((vocabulary,) * (k + 1)), 0.0
    for x in product(range(vocabulary), repeat=k):
        weight = np.prod([row(q, x, i)[v] for i, v in enumerate(x)])
        for tau, chance in enumerate(outcomes(p, q, x)):
            if weight * chance == 0:
                continue
            accepted += weight * chance * tau
            token_law = left(p, q, x, tau)
            for token in range(vocabulary):
                start = (*x[:tau], token)
                rest = np.ones(())
                for i in range(tau + 1, k + 1):
                    rest = rest[..., None] * p[i][start]
                law[start] += weight * chance * token_law[token] * rest
    return law, accepted


@pytest.mark.parametrize("sharp", [0.3, 1.0, 5.0])
def test_chain_and_block_give_the_target_and_the_block_keeps_more(sharp: float) -> None:
    rng = np.random.default_rng(int(10 * sharp))
    off = [0.0, 0.0]
    for _ in range(15):
        p, q = random_tables(rng, 3, 3, sharp), random_tables(rng, 3, 2, sharp)
        chain, by_token = emitted_law(p, q, chain_outcomes, chain_left)
        block, by_block = emitted_law(p, q, block_outcomes, block_left)
        for law in (chain, block):
            np.testing.assert_allclose(law, joint(p, 3), rtol=0, atol=1e-14)
        assert by_block >= by_token - 1e-14
        kept = [np.minimum(a, b) for a, b in zip(p, q)]
        shared = kept[0].sum() + (kept[0][:, None] * kept[1]).sum()
        assert abs(by_token - shared) < 1e-14
        # A prefix is kept with the share r_i of it, and never more often than both models would write it.
        by_share = sum(
            np.prod([row(q, x, i)[v] for i, v in enumerate(x)]) * sum(reach(p, q, x)[1:])
            for x in product(range(3), repeat=2)
        )
        assert abs(by_block - by_share) < 1e-13
        most = kept[0].sum() + np.minimum(joint(p, 2), joint(q, 2)).sum()
        assert by_block <= most + 1e-13
        # A residual that forgets the share r_i that the prefix kept, and one that forgets q.
        for i, wrong in enumerate((chain_left, lambda p, q, x, tau: row(p, x, tau))):
            law, _ = emitted_law(p, q, block_outcomes, wrong)
            off[i] = max(off[i], np.abs(law - joint(p, 3)).sum())
    assert min(off) > 1e-2


def tree_level(
    p: np.ndarray, q: np.ndarray, x: tuple[int, ...], kind: str
) -> tuple[list[float], np.ndarray]:
    """The threshold of each child in turn (0 where it is not tried), and what all rejections leave."""
    left, drawn, tried, thresholds = p.copy(), q.copy(), set(), []
    for token in x:
        if left.sum() <= 0 or (kind == "certain" and token in tried):
            thresholds.append(0.0)
            continue
        tried.add(token)
        if kind == "certain":
            thresholds.append(left[token])
            left[token] = 0
        else:
            thresholds.append(min(1.0, left[token] / drawn[token]))
            left = np.maximum(left - drawn, 0)
            if kind == "without replacement":
                drawn[token] = 0
                drawn = drawn / drawn.sum() if drawn.sum() > 0 else drawn
        left = left / left.sum() if left.sum() > 1e-15 else np.zeros_like(left)
    return thresholds, left


def draft_chances(q: np.ndarray, count: int, kind: str) -> dict[tuple[int, ...], float]:
    """Every tuple of children with its probability."""
    if kind == "certain":
        return {tuple(np.argsort(-q)[:count].tolist()): 1.0}
    if kind == "with replacement":
        return {x: float(np.prod(q[list(x)])) for x in product(range(q.size), repeat=count)}
    chances = {}
    for x in permutations(range(q.size), count):
        left, chance = 1.0, 1.0
        for v in x:
            chance, left = chance * q[v] / left, left - q[v]
        chances[x] = float(chance)
    return chances


def level_law(p: np.ndarray, q: np.ndarray, count: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The law of the token emitted at a node, and its part that came from accepted children."""
    law, accepted = np.zeros_like(p), np.zeros_like(p)
    for x, chance in draft_chances(q, count, kind).items():
        thresholds, left = tree_level(p, q, x, kind)
        for token, passes in zip(x, thresholds):
            accepted[token] += chance * passes
            chance *= 1 - passes
        law += chance * left
    return law + accepted, accepted


KINDS = ("certain", "with replacement", "without replacement")


@pytest.mark.parametrize("kind", KINDS)
def test_trees_give_the_target(kind: str) -> None:
    """Depth 2: the subtrees under a token are drafted from the law there, so two levels multiply."""
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(10):
        p, q = random_tables(rng, 4, 2, 0.7), random_tables(rng, 4, 2, 0.7)
        for count in (1, 2, 3):
            first, accepted = level_law(p[0], q[0], count, kind)
            np.testing.assert_allclose(first, p[0], rtol=0, atol=1e-13)
            both = np.stack([level_law(p[1][v], q[1][v], count, kind)[0] for v in range(4)])
            emitted = accepted[:, None] * both + (first - accepted)[:, None] * p[1]
            np.testing.assert_allclose(emitted, joint(p, 2), rtol=0, atol=1e-13)
            if count == 1 and kind != "certain":
                np.testing.assert_allclose(accepted, np.minimum(p[0], q[0]), rtol=0, atol=1e-15)
    everything, accepted = level_law(p[0], q[0], 4, "certain")
    np.testing.assert_allclose(accepted, p[0], rtol=0, atol=1e-14)
    assert np.array_equal(everything, accepted)


class Scripted:
    """Stands in for the reference's uniforms: by position and try, else the least or the largest number."""

    def __init__(self) -> None:
        self.accept: dict[tuple[int, int], float] = {}
        self.picked = 0.5

    def draw(self, position: int, domain: int, attempt: int = 0) -> tuple[float, float]:
        return self.accept.get((position, attempt), 1.0), self.picked


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr(
        draws.Stream, "draw", lambda self, *args, **kwargs: scripted.draw(*args, **kwargs)
    )
    return scripted


def assert_draws(script: Scripted, call: Callable[[], int], law: np.ndarray) -> None:
    """The token drawn changes where the law's running sum says so."""
    sums = np.cumsum(law)
    for v in np.flatnonzero(law > 2 * NEAR):
        script.picked = sums[v] - NEAR
        assert call() == v
        script.picked = sums[v] - law[v] + NEAR
        assert call() == v


@pytest.mark.parametrize("block", [False, True], ids=["chain", "block"])
def test_the_reference_has_these_thresholds_and_residuals(block: bool, script: Scripted) -> None:
    op = block_speculative_sampling if block else chain_speculative_sampling
    left_of = block_left if block else chain_left
    rng = np.random.default_rng(20 + block)
    p, q = random_tables(rng, 3, 3, 1.0), random_tables(rng, 3, 2, 1.0)
    for x in product(range(3), repeat=2):
        target = np.stack([row(p, x, i) for i in range(3)])[None]
        draft = np.stack([row(q, x, i) for i in range(2)])[None]

        def run() -> Any:
            return op(draft, np.array([x]), target, impl="reference")  # noqa: B023

        passing = (block_thresholds if block else chain_thresholds)(p, q, x)
        for tau in (0, 1, 2):
            # Decisions that lead to exactly tau accepted tokens: None where any uniform does.
            if block:
                wanted = [None] * (tau - 1) + [True] * (tau > 0) + [False] * (2 - tau)
            else:
                wanted = ([True] * tau + [False, None])[:2]
            for i, passes in enumerate(wanted):
                script.accept[i, 0] = (
                    1.0
                    if passes is None
                    else min(passing[i], 1.0)
                    if passes and passing[i] >= 1
                    else passing[i] + (-NEAR if passes else NEAR)
                )
            possible = all(passes is not False or passing[i] < 1 for i, passes in enumerate(wanted))
            possible &= all(
                passes is not True or passing[i] > NEAR for i, passes in enumerate(wanted)
            )
            if not possible:
                continue
            assert run().num_accepted.tolist() == [tau], (x, tau, passing)
            emitted = run().output_token_ids[0]
            assert emitted[:tau].tolist() == list(x[:tau])
            assert_draws(script, lambda: run().output_token_ids[0, tau], left_of(p, q, x, tau))  # noqa: B023
        script.picked = 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_tree_has_these_thresholds(kind: str, script: Scripted) -> None:
    rng = np.random.default_rng(30)
    p, q = random_tables(rng, 4, 1, 1.0)[0], random_tables(rng, 4, 1, 1.0)[0]
    rows = np.tile(p, (1, 4, 1))
    draft = None if kind == "certain" else np.tile(q, (1, 4, 1))
    for x in draft_chances(q, 3, kind):

        def run() -> Any:
            return tree_speculative_verify(
                np.array([x]),  # noqa: B023
                np.full((1, 3), -1),
                rows,
                draft,
                replacement=kind == "with replacement",
                max_depth=1,
                impl="reference",
            )

        thresholds, left = tree_level(p, q, x, kind)
        script.accept.clear()
        for j, passes in enumerate(thresholds):
            if passes > NEAR:
                script.accept[0, j] = passes - NEAR
                assert run().accepted_nodes[0, 0] == j, (x, thresholds)
            if passes >= 1:
                break
            script.accept[0, j] = passes + NEAR
        else:
            assert run().num_accepted[0] == 0
            if left.any():
                assert_draws(script, lambda: run().output_token_ids[0, 0], left)
        script.picked = 0.5
