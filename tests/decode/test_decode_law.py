# SPDX-License-Identifier: Apache-2.0
"""What is sampled and what is emitted after a chain or a block was verified follows the law, as a distribution.

Every case: at least 10^6 draws, chi-square against the law in float64 NumPy, false alarms at 1e-6 (fixed seeds), and a
control that is wrong by construction and has to be rejected: a wrong residual, or a wrong use of the seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from decode_cases import (
    SAMPLING,
    VERIFICATION,
    Mode,
    Story,
    assert_law,
    assert_rejected,
    assert_share,
    categorical,
    completed,
    drafted,
    histogram,
    inverse_cdf,
    joint,
    rows_of,
    uniforms,
)
from fixtures import threads
from hotloop.decode import (
    Logits,
    Probs,
    block_speculative_sampling,
    chain_speculative_sampling,
    sample,
    speculative_streaming_verify,
    tree_speculative_verify,
)

N, V = 10**6, 5
CONTROL = 2 * 10**5
STORY = Story.of(V, seed=11)
SECOND = Story.of(V, seed=12)


two_threads = threads(2, "module")


# A way of sampling, and the law that a slip in it would give.
SAMPLED: dict[str, tuple[Mode, Mode]] = {
    "plain": (Mode(), Mode(temperature=1.02)),
    "temperature": (Mode(temperature=0.6), Mode()),
    "top-k": (Mode(top_k=3), Mode(top_k=4)),
    "top-p": (Mode(top_p=0.75), Mode()),
    "min-p": (Mode(min_p=0.3), Mode()),
    "top-k first": (
        Mode(top_k=4, top_p=0.72),
        Mode(top_k=4, top_p=0.72, filter_order="joint"),
    ),
    "joint": (Mode(top_k=4, top_p=0.72, filter_order="joint"), Mode(top_k=4, top_p=0.72)),
    "all of them": (
        Mode(temperature=1.4, top_k=6, top_p=0.9, min_p=0.15),
        Mode(temperature=1.4, top_k=6),
    ),
    "mixture": (Mode(mixture=0.3), Mode(mixture=0.7)),
    "bias": (Mode(bias={1: 1.5, 4: -2.0}), Mode(bias={1: 1.5})),
    "mixture, bias, top-p": (
        Mode(mixture=0.5, bias={0: -30.0, 2: 1.0}, top_p=0.8, temperature=0.8),
        Mode(mixture=0.5, top_p=0.8, temperature=0.8),
    ),
}
# Eight tokens whose law is not near any threshold above, and a second model's.
Z = np.log(np.array([0.24, 0.21, 0.18, 0.13, 0.10, 0.07, 0.05, 0.02])).astype(np.float32)
Z2 = np.array([0.3, -1.0, 0.5, 1.1, -0.4, 0.0, 0.7, -2.0], np.float32)


def all_rows(row: np.ndarray, n: int = N) -> np.ndarray:
    return np.broadcast_to(row, (n, *row.shape))


def law_of(mode: Mode, z: np.ndarray, reference: np.ndarray | None) -> Logits:
    more = {"reference": reference, "mixture": mode.mixture} if mode.mixture else {}
    return Logits(z, **mode.arguments(), **more, **mode.bias_arguments(z.shape[0]))


@pytest.mark.parametrize("name", SAMPLED)
def test_sample(name: str) -> None:
    mode, slip = SAMPLED[name]
    ids = sample(law_of(mode, all_rows(Z), all_rows(Z2)), seed=3).token_ids
    counts = np.bincount(ids, minlength=Z.size)
    p = mode.law(Z, Z2)
    assert_law(counts, p)
    assert_rejected(counts, slip.law(Z, Z2))
    if (p == 0).any():  # the mass cut off, not renormalised away but left to the last token kept
        whole = Mode(temperature=mode.temperature, mixture=mode.mixture, bias=mode.bias).law(Z, Z2)
        wrong = np.where(p > 0, whole, 0.0)
        wrong[np.flatnonzero(p)[-1]] += 1 - wrong.sum()
        assert_rejected(counts, wrong)


@pytest.mark.parametrize("dtype", [np.float64, np.float16], ids=str)
def test_sample_from_probabilities(dtype: type) -> None:
    p = Mode().law(Z).astype(dtype)
    law = p.astype(np.float64) / p.astype(np.float64).sum()
    counts = np.bincount(sample(all_rows(p), seed=4).token_ids, minlength=p.size)
    assert_law(counts, law)
    kept = np.where(law >= np.sort(law)[-3], law, 0.0)
    counts = np.bincount(sample(Probs(all_rows(p), top_k=3), seed=4).token_ids, minlength=p.size)
    assert_law(counts, kept / kept.sum())
    assert_rejected(counts, law)


def test_positions_requests_and_seeds_draw_independently() -> None:
    p = Mode().law(Z)
    both = p[:, None] * p
    rows = np.broadcast_to(Z, (N, 2, Z.size))
    assert_law(histogram(sample(Logits(rows), seed=5).token_ids, Z.size), both)
    one = Logits(all_rows(Z))
    a, b = (sample(one, seed=5, offset=i).token_ids for i in (0, 1))
    assert_law(histogram(np.stack((a, b), 1), Z.size), both)
    assert_law(histogram(np.stack((a[:-1], a[1:]), 1), Z.size), both, N - 1)
    seeds = np.random.default_rng(0).integers(0, 2**62, N)
    own = sample(one, seed=seeds).token_ids
    assert_law(np.bincount(own, minlength=Z.size), p)
    assert_law(histogram(np.stack((a, own), 1), Z.size), both)
    # The same position drawn twice, and one seed given to every request, are found out.
    assert_rejected(histogram(np.stack((a, sample(one, seed=5).token_ids), 1), Z.size), both)
    same = sample(one, seed=np.full(N, 7), offset=0).token_ids
    assert_rejected(np.bincount(same, minlength=Z.size), p)


# Target and draft of a verified chain.
VERIFIED: dict[str, tuple[Mode, Mode]] = {
    "plain": (Mode(), Mode()),
    "target truncated": (Mode(top_k=4, top_p=0.85), Mode()),
    "draft truncated": (Mode(temperature=0.8), Mode(top_k=3)),
    "both truncated": (
        Mode(top_k=4, top_p=0.9, filter_order="joint", temperature=1.2),
        Mode(temperature=0.7, min_p=0.1),
    ),
    "mixture and bias": (Mode(mixture=0.4, bias={2: 0.8}, min_p=0.05), Mode(bias={2: 0.8})),
    "greedy draft": (Mode(), Mode(temperature=0)),
}
Tables = tuple[np.ndarray, ...]


def tables(mode: Mode, logits: Tables, reference: Tables) -> Tables:
    return tuple(mode.law(z, r) for z, r in zip(logits, reference))


def assert_story(done: Any, p: Tables, q: Tables, *, block: bool = False) -> None:
    """The emitted tokens, completed by the target's own, have the target's joint law; and what led there."""
    ids, accepted = done.output_token_ids, done.num_accepted
    n = ids.shape[0]
    rng = np.random.default_rng(99)
    assert_law(np.bincount(ids[:, 0], minlength=V), p[0])
    assert_law(histogram(completed(rng, p, ids), V), joint(p, 3))
    if block:
        return
    kept = [np.minimum(a, b) for a, b in zip(p, q)]
    assert_share(int((accepted >= 1).sum()), n, kept[0].sum())
    assert_share(int((accepted >= 2).sum()), n, (kept[0][:, None] * kept[1]).sum())
    second = kept[0][:, None] * p[1]
    emitted = ids[accepted >= 1, :2]
    assert_law(histogram(emitted, V), second / second.sum(), n // 4)
    bonus = (kept[0][:, None] * kept[1])[..., None] * p[2]
    assert_law(histogram(ids[accepted == 2], V), bonus / bonus.sum(), n // 10)


@pytest.mark.parametrize("name", VERIFIED)
def test_chain(name: str) -> None:
    target, draft = VERIFIED[name]
    p, q = tables(target, STORY.target, SECOND.target), tables(draft, STORY.draft, STORY.draft)
    x = drafted(np.random.default_rng(1), q, N, 2)
    done = chain_speculative_sampling(
        law_of(draft, rows_of(STORY.draft, x, 2), None),
        x,
        law_of(target, rows_of(STORY.target, x, 3), rows_of(SECOND.target, x, 3)),
        seed=21,
    )
    assert_story(done, p, q)


@pytest.mark.parametrize("truncated", [False, True])
def test_chain_over_probabilities(truncated: bool) -> None:
    p, q = tables(Mode(), STORY.target, STORY.target), tables(Mode(), STORY.draft, STORY.draft)
    x = drafted(np.random.default_rng(2), q, N, 2)
    target, draft = rows_of(p, x, 3), rows_of(q, x, 2).astype(np.float64)
    if truncated:
        p = tables(Mode(top_p=0.8, min_p=0.1), STORY.target, STORY.target)
        done = chain_speculative_sampling(draft, x, Probs(target, top_p=0.8, min_p=0.1), seed=22)
    else:
        done = chain_speculative_sampling(draft, x, target, seed=22)
    assert_story(done, p, q)


@pytest.mark.parametrize("name", ["plain", "both truncated"])
def test_block(name: str) -> None:
    target, draft = VERIFIED[name]
    p, q = tables(target, STORY.target, STORY.target), tables(draft, STORY.draft, STORY.draft)
    x = drafted(np.random.default_rng(3), q, N, 2)
    arguments = (
        law_of(draft, rows_of(STORY.draft, x, 2), None),
        x,
        law_of(target, rows_of(STORY.target, x, 3), None),
    )
    done = block_speculative_sampling(*arguments, seed=23)
    assert_story(done, p, q, block=True)
    chain = chain_speculative_sampling(*arguments, seed=23)
    gain = done.num_accepted - chain.num_accepted
    assert gain.mean() > 5 * gain.std() / np.sqrt(N), "a block keeps more on average"


def numpy_verified(
    p: Tables, q: Tables, x: np.ndarray, block: bool = False, flaw: str = ""
) -> np.ndarray:
    """Both verifications of two draft tokens again, with a flaw to order."""
    rng = np.random.default_rng(5)
    n = x.shape[0]
    prefix = [tuple(x[:, j] for j in range(i)) for i in range(3)]
    ps = [np.broadcast_to(t[at], (n, V)) for t, at in zip(p, prefix)]
    qs = [np.broadcast_to(t[at], (n, V)) for t, at in zip(q[:2], prefix)]
    at = np.arange(n)
    ratio = [ps[i][at, x[:, i]] / qs[i][at, x[:, i]] for i in (0, 1)]
    u = rng.random((2, n))
    reach = np.ones((3, n))
    if block:
        for i in (0, 1):
            reach[i + 1] = np.minimum(1, reach[i] * ratio[i])
        s = np.maximum(reach[1][:, None] * ps[1] - qs[1], 0).sum(-1)
        h = np.where(reach[1] >= 1, 1.0, s / np.maximum(s + 1 - reach[1], 1e-300))
        tau = np.where(u[1] <= reach[2], 2, np.where(u[0] <= h, 1, 0))
    else:
        first = u[0] <= ratio[0]
        tau = first.astype(int) + (first & (u[1] <= ratio[1]))
    out = np.full((n, 3), -1)
    for t in (0, 1, 2):
        hit = tau == t
        out[hit, :t] = x[hit, :t]
        left = ps[t][hit]
        if t < 2 and flaw != "target":
            weight = reach[t][hit, None] if flaw != "token by token" else 1.0
            left = np.maximum(weight * left - qs[t][hit], 0)
        if flaw == "not renormalised":
            out[hit, t] = inverse_cdf(left, rng.random(int(hit.sum())))
        else:
            out[hit, t] = categorical(rng, left)
    return out


@pytest.mark.parametrize("block", [False, True], ids=["chain", "block"])
def test_wrong_residuals_are_found(block: bool) -> None:
    p, q = tables(Mode(), STORY.target, STORY.target), tables(Mode(), STORY.draft, STORY.draft)
    x = drafted(np.random.default_rng(6), q, CONTROL, 2)

    def counts(flaw: str) -> np.ndarray:
        emitted = numpy_verified(p, q, x, block, flaw)
        return histogram(completed(np.random.default_rng(7), p, emitted), V)

    assert_law(counts(""), joint(p, 3), CONTROL)
    for flaw in ("target", "not renormalised", *(["token by token"] if block else [])):
        assert_rejected(counts(flaw), joint(p, 3))


@pytest.mark.parametrize("op", [chain_speculative_sampling, block_speculative_sampling])
def test_drafts_from_the_uniforms_of_the_verification_are_found(op: Any) -> None:
    """The draft has to be random on its own: one that shares its uniforms with the verifier breaks the law."""
    p, q = tables(Mode(), STORY.target, STORY.target), tables(Mode(), STORY.draft, STORY.draft)
    x = np.empty((CONTROL, 2), np.int64)
    for i in (0, 1):
        laws = np.broadcast_to(q[i][tuple(x[:, j] for j in range(i))], (CONTROL, V))
        x[:, i] = inverse_cdf(laws, uniforms(31, CONTROL, i, VERIFICATION)[0])
    done = op(rows_of(q, x, 2), x, rows_of(p, x, 3), seed=31)
    counts = histogram(completed(np.random.default_rng(8), p, done.output_token_ids), V)
    assert_rejected(counts, joint(p, 3))
    assert_law(
        histogram(
            completed(
                np.random.default_rng(8),
                p,
                op(rows_of(q, x, 2), x, rows_of(p, x, 3), seed=32).output_token_ids,
            ),
            V,
        ),
        joint(p, 3),
        CONTROL,
    )


def test_one_seed_serves_the_draft_and_its_verifier() -> None:
    p, q = tables(Mode(), STORY.target, STORY.target), tables(Mode(), STORY.draft, STORY.draft)
    x = np.empty((N, 2), np.int64)
    for i in (0, 1):
        rows = np.broadcast_to(STORY.draft[i][tuple(x[:, j] for j in range(i))], (N, V))
        x[:, i] = sample(Logits(rows), seed=41, offset=i).token_ids
    assert np.array_equal(x[:, 0], inverse_cdf(all_rows(q[0]), uniforms(41, N, 0, SAMPLING)[1]))
    done = chain_speculative_sampling(
        Logits(rows_of(STORY.draft, x, 2)), x, Logits(rows_of(STORY.target, x, 3)), seed=41
    )
    assert_story(done, p, q)


def test_streams_that_ignore_their_own_step() -> None:
    """Two streams a step: the second token is drawn from one law whatever the first was."""
    p = tables(Mode(), STORY.target, STORY.target)
    q = Mode().law(np.stack((STORY.draft[0], STORY.draft[1].mean(0))))
    rng = np.random.default_rng(9)
    x = np.stack([categorical(rng, all_rows(row)) for row in q], 1)
    done = speculative_streaming_verify(
        np.broadcast_to(q, (N, 1, 2, V)), x, Logits(rows_of(STORY.target, x, 3)), seed=51
    )
    assert_story(done, p, (q[0], np.broadcast_to(q[1], (V, V)), p[2]))
    # Verified against the law of the stream beside it, the output is off.
    wrong = speculative_streaming_verify(
        np.broadcast_to(q[::-1], (CONTROL, 1, 2, V)),
        x[:CONTROL],
        Logits(rows_of(STORY.target, x[:CONTROL], 3)),
        seed=51,
    )
    counts = np.bincount(wrong.output_token_ids[:, 0], minlength=V)
    assert_rejected(counts, p[0])


def verify_nothing(op: Any, rows: np.ndarray, seed: int) -> np.ndarray:
    none = np.empty((rows.shape[0], 0), np.int64)
    if op is tree_speculative_verify:
        return op(none, none, Logits(rows), seed=seed).output_token_ids[:, 0]
    return op(None, none, Logits(rows), seed=seed).output_token_ids[:, 0]


OPS = [chain_speculative_sampling, block_speculative_sampling, tree_speculative_verify]


@pytest.mark.parametrize("op", OPS)
def test_bonus_without_a_draft(op: Any) -> None:
    counts = np.bincount(verify_nothing(op, all_rows(Z)[:, None], 61), minlength=Z.size)
    assert_law(counts, Mode().law(Z))
    assert_rejected(counts, Mode().law(Z2))


@pytest.mark.parametrize("op", OPS[:2])
def test_bonus_after_a_whole_draft(op: Any) -> None:
    """p = q: everything is accepted, and the bonus token follows its own row and nothing else."""
    p = tables(Mode(), STORY.target, STORY.target)

    def emitted(x: np.ndarray, seed: int) -> np.ndarray:
        rows = Logits(rows_of(STORY.target, x, 2))
        draft = Logits(rows.values[:, :1])
        done = op(draft, x, rows, seed=seed)
        assert (done.num_accepted == 1).all()
        assert np.array_equal(done.output_token_ids[:, :1], x)
        return histogram(done.output_token_ids, V)

    assert_law(emitted(drafted(np.random.default_rng(10), p, N, 1), 62), joint(p, 2))
    # A draft token drawn with the uniform that then draws the bonus.
    wrong = inverse_cdf(all_rows(p[0]), uniforms(62, N, 1, VERIFICATION)[1])
    assert_rejected(emitted(wrong[:, None], 62), joint(p, 2))


def test_every_position_accepts_what_the_two_laws_share() -> None:
    rng = np.random.default_rng(13)
    z = rng.normal(size=(4, V)).astype(np.float32)
    w = (z + 0.8 * rng.normal(size=z.shape)).astype(np.float32)
    p, q = Mode().law(z), Mode().law(w)
    n = N // 2
    x = np.stack([categorical(rng, all_rows(row, n)) for row in q], 1)
    target = all_rows(np.concatenate((z, z[:1])), n)
    done = chain_speculative_sampling(Logits(all_rows(w, n)), x, Logits(target), seed=71)
    for i in range(4):
        reached = int((done.num_accepted >= i).sum())
        assert_share(int((done.num_accepted > i).sum()), reached, np.minimum(p, q)[i].sum())


def test_laws_that_agree_and_laws_that_share_nothing() -> None:
    rng = np.random.default_rng(14)
    z = rng.normal(size=(3, V)).astype(np.float32)
    n = N // 10
    x = np.stack([categorical(rng, all_rows(row, n)) for row in Mode().law(z[:2])], 1)
    for op in OPS[:2]:
        done = op(Logits(all_rows(z[:2], n)), x, Logits(all_rows(z, n)), seed=72)
        assert (done.num_accepted == 2).all()
        assert np.array_equal(done.output_token_ids[:, :2], x)
    p = np.array([0.0, 0.2, 0.5, 0.0, 0.3])
    q = np.array([0.4, 0.0, 0.0, 0.6, 0.0])
    x = categorical(rng, all_rows(q))[:, None]
    rows = np.broadcast_to(p, (N, 2, V))
    for op in OPS[:2]:
        done = op(np.broadcast_to(q, (N, 1, V)), x, rows, seed=73)
        assert not done.num_accepted.any()
        assert_law(np.bincount(done.output_token_ids[:, 0], minlength=V), p)


def test_a_certain_draft_is_accepted_with_its_probability() -> None:
    p = Mode().law(Z)
    rows = np.broadcast_to(Z, (N, 2, Z.size))
    for token, op in zip((0, 6), OPS):
        done = op(None, np.full((N, 1), token), Logits(rows), seed=74)
        assert_share(int(done.num_accepted.sum()), N, float(p[token]))
        assert_law(np.bincount(done.output_token_ids[:, 0], minlength=Z.size), p)
        left = np.where(np.arange(Z.size) == token, 0, p)
        rejected = done.output_token_ids[done.num_accepted == 0, 0]
        counts = np.bincount(rejected, minlength=Z.size)
        assert_law(counts, left / left.sum(), N // 2)
        assert_rejected(counts, p)
