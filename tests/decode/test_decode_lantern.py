# SPDX-License-Identifier: Apache-2.0
"""LANTERN: how far the relaxed acceptance moves the law, against its own bound, and the law of what it emits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decode_cases import assert_law, assert_rejected, assert_share, categorical, softmax
from hotloop.decode import Logits, chain_speculative_sampling, lantern_relaxed_accept

N, V = 10**6, 8
DELTAS = (0.0, 0.05, 0.1, 0.4, 1.0, 1.1, 1.5, 4.0)


def neighbours(seed: int, vocabulary: int = V) -> np.ndarray:
    """Every other token, in some order of distance."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(vocabulary, 3))
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    np.fill_diagonal(distance, np.inf)
    return np.argsort(distance, axis=1)[:, :-1].astype(np.int32)


def borrowed(p: np.ndarray, x: int, near: np.ndarray, k: int, delta: float) -> tuple[float, int]:
    """C_j* and j*: the longest run of nearest neighbours whose mass the bound allows."""
    bound = delta if delta <= 1 else (delta - 1) * p[x]
    sums = np.append(0.0, np.cumsum(p[near[x][:k]]))
    count = int((sums <= bound).sum()) - 1
    return float(sums[count]), count


def acceptance(p: np.ndarray, q: np.ndarray, x: int, c: float) -> float:
    """The chance that x is accepted once it is drafted."""
    return min(1.0, (p[x] + c) / q[x]) if p[x] > 0 else 0.0


def rejected_law(
    p: np.ndarray, q: np.ndarray | None, x: int, near: np.ndarray, k: int, c: float
) -> np.ndarray:
    """What a rejection of x draws from; one neighbour more is spared than may be counted, as the authors do."""
    spared = near[x][: k + 1] if c > 0 else near[x][:0]
    if q is None:
        left = p.copy()
        left[[x, *spared]] = 0
    else:
        left = np.maximum(p - q, 0)
        left[spared] = p[spared]
    return left / left.sum() if left.sum() > 1e-15 else p


def output_law(
    p: np.ndarray, q: np.ndarray, near: np.ndarray, k: int, delta: float
) -> tuple[np.ndarray, dict[str, float]]:
    """The law of the token at one position whose draft is drawn from q, and what bounds its distance from p."""
    out = np.zeros(V)
    rejections, average, largest, extra, tight = 0.0, 0.0, 0.0, 0.0, 0.0
    common = np.minimum(p, q)
    lost = 1 - common.sum()
    for x in np.flatnonzero(q):
        c, _ = borrowed(p, x, near, k, delta)
        accepted = q[x] * acceptance(p, q, x, c)
        extra += accepted - common[x]
        out[x] += accepted
        out += (q[x] - accepted) * rejected_law(p, q, x, near, k, c)
        spared = common[near[x][: k + 1]].sum() if c > 0 else 0.0
        tight += (q[x] - accepted) * (spared / (lost + spared) if spared else 0.0)
        rejections += q[x] - accepted
        average += (q[x] - accepted) * (q[near[x][: k + 1]].sum() if c > 0 else 0.0)
        largest = max(largest, q[near[x][: k + 1]].sum() if c > 0 else 0.0)
    average = average / rejections if rejections > 0 else 0.0
    return out, {
        "tight": extra + tight,
        "average": extra + average,
        "largest": extra + largest,
    }


def certain_law(p: np.ndarray, x: int, near: np.ndarray, k: int, delta: float) -> np.ndarray:
    """The law of the token at one position whose draft was certain of x."""
    c, _ = borrowed(p, x, near, k, delta)
    accepted = min(1.0, p[x] + c) if p[x] > 0 else 0.0
    out = (1 - accepted) * rejected_law(p, None, x, near, k, c)
    out[x] += accepted
    return out


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return 0.5 * float(np.abs(a - b).sum())


def random_laws(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    z = rng.normal(size=V) * rng.choice([0.3, 1.5])
    p, q = softmax(z), softmax(rng.choice([0.0, 1.0]) * z + rng.normal(size=V))
    if rng.random() < 0.3:  # truncated
        p[np.argsort(p)[: rng.integers(1, 5)]] = 0
    if rng.random() < 0.3:
        q[np.argsort(q)[: rng.integers(1, 5)]] = 0
    return p / p.sum(), q / q.sum()


def test_the_output_law_stays_within_its_bound() -> None:
    """Exactly, over many laws.

    Drawn drafts: TV(out, p) <= A + S, A the additional acceptance and S the mean over rejections of the draft mass of
    the neighbours spared; in full S = sum_x P(x drafted and rejected) s_x / (1 - sum min(p, q) + s_x), s_x the mass of
    min(p, q) on the neighbours of x. Certain drafts: TV(out, p) <= p of the k+1 neighbours that a rejection takes away,
    with equality where something is left; delta alone does not bound it.
    """
    rng = np.random.default_rng(0)
    above_delta = 0
    for trial in range(400):
        p, q = random_laws(rng)
        near, k = neighbours(trial), int(rng.integers(0, V + 1))
        delta = float(rng.choice(DELTAS))
        out, bounds = output_law(p, q, near, k, delta)
        assert abs(out.sum() - 1) < 1e-12
        off = distance(out, p)
        assert off <= bounds["tight"] + 1e-12
        assert bounds["tight"] <= bounds["average"] + 1e-12
        assert bounds["average"] <= bounds["largest"] + 1e-12
        if delta == 0 or k == 0:
            assert off < 1e-12
        for x in range(V):
            c, _ = borrowed(p, x, near, k, delta)
            taken = p[near[x][: k + 1]].sum() if c > 0 else 0.0
            off = distance(certain_law(p, x, near, k, delta), p)
            assert off <= taken + 1e-12
            left = 1 - p[x] - taken
            if left > 1e-9 and p[x] > 0:
                assert abs(off - taken) < 1e-12
            above_delta += off > c + 1e-9
    assert above_delta > 0, "the relaxation alone bounds certain drafts: say so in the docstring"


# (k, delta): an absolute bound, one so large that every neighbour counts, and a factor (LANTERN++).
RELAXED = [(3, 0.2), (7, 1.0), (4, 1.6)]


def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    z = rng.normal(size=V)
    return softmax(z), softmax(0.5 * z + rng.normal(size=V)), neighbours(4)


@pytest.mark.parametrize(("k", "delta"), RELAXED)
def test_the_law_of_drawn_drafts(k: int, delta: float) -> None:
    p, q, near = pair()
    rows = np.broadcast_to(p, (N, 2, V))
    draft = np.broadcast_to(q, (N, 1, V))
    x = categorical(np.random.default_rng(5), draft[:, 0])[:, None]
    done = lantern_relaxed_accept(draft, x, rows, near, k=k, delta=delta, seed=1)
    counts = np.bincount(done.output_token_ids[:, 0], minlength=V)
    law, bounds = output_law(p, q, near, k, delta)
    assert_law(counts, law)
    assert_rejected(counts, p)
    # E|counts / N - law| <= sqrt(law / N) per token; three times that does not happen by chance (p < 1e-6).
    noise = 1.5 * np.sqrt(law / N).sum()
    assert 0 < distance(counts / N, p) <= bounds["tight"] + noise
    chance = sum(q[v] * acceptance(p, q, v, borrowed(p, v, near, k, delta)[0]) for v in range(V))
    assert_share(int(done.num_accepted.sum()), N, chance)
    exact = chain_speculative_sampling(draft, x, rows, seed=1)
    assert (done.num_accepted >= exact.num_accepted).all()


@pytest.mark.parametrize(("k", "delta"), RELAXED)
def test_the_law_of_certain_drafts(k: int, delta: float) -> None:
    p, _, near = pair()
    rows = np.broadcast_to(p, (N, 2, V))
    token = int(np.argsort(p)[-3])
    x = np.full((N, 1), token)
    done = lantern_relaxed_accept(None, x, rows, near, k=k, delta=delta, seed=2)
    counts = np.bincount(done.output_token_ids[:, 0], minlength=V)
    law = certain_law(p, token, near, k, delta)
    assert_law(counts, law)
    c, _ = borrowed(p, token, near, k, delta)
    assert c > 0
    if p[token] + c < 1 - 1e-9:
        assert_rejected(counts, p)
    taken = p[near[token][: k + 1]].sum()
    assert distance(counts / N, p) <= taken + 1.5 * np.sqrt(law / N).sum()
    assert_share(int(done.num_accepted.sum()), N, min(1.0, p[token] + c))


def positions(seed: int, n: int = 400) -> tuple[np.ndarray, ...]:
    """One position each of many requests: laws p, q and a token that need not be likely."""
    rng = np.random.default_rng(seed)
    laws = [random_laws(rng) for _ in range(n)]
    p, q = (np.stack(part)[:, None] for part in zip(*laws))
    return p, q, rng.integers(0, V, (n, 1))


def relaxation(
    p: np.ndarray, q: np.ndarray | None, x: np.ndarray, near: np.ndarray, k: int, delta: float
) -> Any:
    rows = np.concatenate((p, p), 1)
    return lantern_relaxed_accept(q, x, rows, near, k=k, delta=delta, seed=3)


@pytest.mark.parametrize("certain", [False, True])
@pytest.mark.parametrize("delta", DELTAS)
def test_the_relaxation_is_the_distance_moved_and_within_the_bound(
    delta: float, certain: bool
) -> None:
    p, q, x = positions(6)
    near = neighbours(6)
    for k in (0, 1, 3, 1000):
        done = relaxation(p, None if certain else q, x, near, k, delta)
        assert done.relaxation.dtype == np.float32
        for b in range(len(p)):
            token, law = int(x[b, 0]), p[b, 0]
            _, count = borrowed(law, token, near, k, delta)
            moved = law.copy()
            moved[token] += law[near[token][:count]].sum()
            moved[near[token][:count]] = 0
            brute = distance(law, moved)
            assert abs(done.relaxation[b, 0] - brute) <= 1e-7
        bound = delta if delta <= 1 else (delta - 1) * np.take_along_axis(p[:, 0], x, 1)
        assert (done.relaxation <= bound + 1e-7).all()


def test_more_is_borrowed_and_accepted_as_delta_and_k_grow() -> None:
    p, q, x = positions(7)
    near = neighbours(7)
    for draft in (q, None):
        for start in (0, 5):  # absolute bounds, then factors
            before, accepted = 0.0, 0
            for delta in DELTAS[start : start + 5]:
                done = relaxation(p, draft, x, near, 5, delta)
                assert (done.relaxation >= before).all()
                assert (done.num_accepted >= accepted).all()
                before, accepted = done.relaxation, done.num_accepted
        before, accepted = 0.0, 0
        for k in range(V + 1):
            done = relaxation(p, draft, x, near, k, 0.4)
            assert (done.relaxation >= before).all()
            assert (done.num_accepted >= accepted).all()
            before, accepted = done.relaxation, done.num_accepted
        assert before.max() > 0.3
        assert (accepted > relaxation(p, draft, x, near, 5, 0.0).num_accepted).any()


def test_positions_after_a_rejection_are_not_relaxed() -> None:
    rng = np.random.default_rng(8)
    p = rng.dirichlet(np.ones(V), size=(300, 5))
    x = rng.integers(0, V, (300, 4))
    done = lantern_relaxed_accept(None, x, p, neighbours(8), k=3, delta=0.3, seed=4)
    steps = np.arange(4)
    assert not done.relaxation[steps > done.num_accepted[:, None]].any()
    assert done.relaxation[steps <= done.num_accepted[:, None]].any()
    assert np.array_equal(done.rows_read, done.num_accepted + 1)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("delta", [0.0, 0.1, 0.4, 1.5])
def test_greedy(delta: float, impl: str) -> None:
    """x is accepted if it is the argmax once it has borrowed; else the argmax of the target is emitted."""
    rng = np.random.default_rng(9)
    n, k_draft, k = 200, 3, 4
    z = rng.normal(size=(n, k_draft + 1, V))
    z[::5] = np.round(z[::5])  # ties
    x = rng.integers(0, V, (n, k_draft))
    near = neighbours(9)
    done = lantern_relaxed_accept(
        None, x, Logits(z, temperature=0.0, top_k=1), near, k=k, delta=delta, impl=impl
    )
    p = softmax(z)
    for b in range(n):
        wanted: list[int] = []
        for i in range(k_draft + 1):
            best = int(np.argmax(z[b, i]))
            if i == k_draft:
                wanted.append(best)
                break
            token = int(x[b, i])
            c, _ = borrowed(p[b, i], token, near, k, delta)
            lifted = p[b, i].copy()
            lifted[token] += c
            others = np.delete(np.arange(V), token)
            # Equal logits have equal probabilities here; the law of the op is rounded, so ties are by logits.
            level = lifted[token] - lifted[others].max()
            if c == 0:
                accepted = token == best
            else:
                assert abs(level) > 1e-7
                accepted = level > 0
            if not accepted:
                wanted.append(best)
                break
            wanted.append(token)
        assert done.num_accepted[b] == len(wanted) - 1
        assert done.output_token_ids[b, : len(wanted)].tolist() == wanted
        assert (done.output_token_ids[b, len(wanted) :] == -1).all()
    if delta == 0:
        from hotloop.decode import greedy_speculative_accept

        plain = greedy_speculative_accept(x, z)
        assert np.array_equal(plain.output_token_ids, done.output_token_ids)


def test_a_token_without_mass_is_not_lifted_by_its_neighbours() -> None:
    p = np.array([[[0.0, 0.6, 0.4]] * 2])
    near = np.array([[1, 2], [0, 2], [1, 0]], np.int32)
    for q in (None, np.array([[[1.0, 0.0, 0.0]]])):
        for seed in range(50):
            done = lantern_relaxed_accept(q, np.array([[0]]), p, near, delta=1.0, seed=seed)
            assert done.num_accepted.tolist() == [0]
            assert done.output_token_ids[0, 0] in (1, 2)
