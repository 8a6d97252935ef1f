# SPDX-License-Identifier: Apache-2.0
"""What a verified tree emits follows the target's law, as a distribution, for the three ways to draft children."""

from __future__ import annotations

import numpy as np
import pytest
from decode_cases import (
    VERIFICATION,
    Mode,
    Story,
    assert_law,
    assert_rejected,
    categorical,
    completed,
    histogram,
    inverse_cdf,
    joint,
    uniforms,
    without_replacement,
)
from fixtures import threads
from hotloop.decode import Logits, VerifiedTree, tree_speculative_verify

N, V = 10**6, 5
CONTROL = 2 * 10**5
STORY = Story.of(V, seed=15)
# Two children of the root, with two children each.
PARENTS = np.array([[-1, -1, 0, 0, 1, 1]])
KINDS = ("certain", "with replacement", "without replacement")
Tables = tuple[np.ndarray, ...]


two_threads = threads(2, "module")


def children(rng: np.random.Generator, q: np.ndarray, kind: str, count: int = 2) -> np.ndarray:
    """Tokens (n, count) of the children of nodes whose draft laws are (n, V)."""
    if kind == "certain":
        return np.argsort(-q, axis=-1, kind="stable")[:, :count]
    if kind == "without replacement":
        return without_replacement(rng, q, count)
    return np.stack([categorical(rng, q) for _ in range(count)], 1)


def planted(rng: np.random.Generator, q: Tables, kind: str, n: int) -> np.ndarray:
    """Tokens (n, 6) of the tree."""
    first = children(rng, np.broadcast_to(q[0], (n, V)), kind)
    return np.concatenate([first, *(children(rng, q[1][first[:, i]], kind) for i in (0, 1))], 1)


def tree_rows(tables: Tables, x: np.ndarray, leaves: bool = True) -> np.ndarray:
    """Row 0 at the root, row j + 1 after node j."""
    rows = np.zeros((x.shape[0], 7, V), tables[0].dtype)
    rows[:, 0] = tables[0]
    for j in (0, 1):
        rows[:, j + 1] = tables[1][x[:, j]]
    for j in (2, 3, 4, 5) if leaves else ():
        rows[:, j + 1] = tables[2][x[:, PARENTS[0, j]], x[:, j]]
    return rows


def verified(
    x: np.ndarray, kind: str, seed: int, target: Mode | None = None, draft: Mode | None = None
) -> VerifiedTree:
    cut = (target or Mode()).arguments()
    q = Logits(tree_rows(STORY.draft, x, leaves=False), **(draft or Mode()).arguments())
    return tree_speculative_verify(
        x,
        np.broadcast_to(PARENTS, x.shape),
        Logits(tree_rows(STORY.target, x), **cut),
        None if kind == "certain" else q,
        replacement=kind == "with replacement",
        max_depth=2,
        seed=seed,
    )


def laws(mode: Mode, tables: Tables) -> Tables:
    return tuple(mode.law(z) for z in tables)


def story_counts(done: VerifiedTree, p: Tables) -> np.ndarray:
    return histogram(completed(np.random.default_rng(1), p, done.output_token_ids), V)


@pytest.mark.parametrize("kind", KINDS)
def test_tree(kind: str) -> None:
    p, q = laws(Mode(), STORY.target), laws(Mode(), STORY.draft)
    x = planted(np.random.default_rng(2), q, kind, N)
    done = verified(x, kind, seed=81)
    assert_law(np.bincount(done.output_token_ids[:, 0], minlength=V), p[0])
    assert_law(story_counts(done, p), joint(p, 3))
    # The second token, given that there is one, is independent of how the first came about.
    first, second = done.output_token_ids[:, :2][done.num_accepted >= 1].T
    for token in np.unique(first):
        counts = np.bincount(second[first == token], minlength=V)
        assert_law(counts, p[1][token], 1000)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_tree(kind: str) -> None:
    target, draft = Mode(top_k=4, top_p=0.92, temperature=1.1), Mode(min_p=0.1, temperature=0.9)
    p, q = laws(target, STORY.target), laws(draft, STORY.draft)
    if kind == "without replacement":  # the draft needs two tokens to give
        draft = Mode(top_k=3)
        q = laws(draft, STORY.draft)
    x = planted(np.random.default_rng(3), q, kind, N)
    assert_law(story_counts(verified(x, kind, 82, target, draft), p), joint(p, 3))


def numpy_level(p: np.ndarray, q: np.ndarray, x: np.ndarray, kind: str, flaw: str) -> np.ndarray:
    """The token at the root (n,): children x (n, k) tried in turn against one p and one q, with a flaw to order."""
    rng = np.random.default_rng(4)
    n = x.shape[0]
    at = np.arange(n)
    left, drawn = np.tile(p, (n, 1)), np.tile(q, (n, 1))
    out = np.full(n, -1)
    for j in range(x.shape[1]):
        token = x[:, j]
        chance = left[at, token] if kind == "certain" else left[at, token] / drawn[at, token]
        new = (out < 0) & (rng.random(n) <= chance)
        out[new] = token[new]
        if flaw == "every child against p":
            continue
        if kind == "certain":
            left[at, token] = 0
        else:
            left = np.maximum(left - drawn, 0)
        left = left / np.maximum(left.sum(-1, keepdims=True), 1e-300)
        if kind == "without replacement":
            drawn[at, token] = 0
            if flaw != "q not renormalised":
                drawn = drawn / np.maximum(drawn.sum(-1, keepdims=True), 1e-300)
    rest = np.flatnonzero(out < 0)
    out[rest] = categorical(rng, np.tile(p, (rest.size, 1)) if flaw == "target" else left[rest])
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_residuals_are_found(kind: str) -> None:
    p, q = laws(Mode(), STORY.target)[0], laws(Mode(), STORY.draft)[0]
    x = children(np.random.default_rng(5), np.broadcast_to(q, (CONTROL, V)), kind)

    def counts(flaw: str) -> np.ndarray:
        return np.bincount(numpy_level(p, q, x, kind, flaw), minlength=V)

    assert_law(counts(""), p, CONTROL)
    assert_rejected(counts("target"), p)
    assert_rejected(counts("every child against p"), p)
    if kind == "without replacement":
        assert_rejected(counts("q not renormalised"), p)
    # The op under a rule that is not the one the children were drafted by.
    wrong = {"without replacement": "with replacement"}.get(kind)
    if wrong is not None:
        tokens = planted(np.random.default_rng(6), laws(Mode(), STORY.draft), kind, N)
        done = verified(tokens, wrong, seed=83)
        assert_rejected(np.bincount(done.output_token_ids[:, 0], minlength=V), p)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_seeds_are_found(kind: str) -> None:
    p, q = laws(Mode(), STORY.target), laws(Mode(), STORY.draft)
    x = planted(np.random.default_rng(7), q, kind, CONTROL)
    if kind == "certain":  # one stream for all requests
        done = tree_speculative_verify(
            x,
            np.broadcast_to(PARENTS, x.shape),
            Logits(tree_rows(STORY.target, x)),
            seed=np.full(CONTROL, 9),
        )
    else:  # children drawn with the uniforms that then try them
        root = np.broadcast_to(q[0], (CONTROL, V)).copy()
        for i in (0, 1):
            x[:, i] = inverse_cdf(
                root / root.sum(-1, keepdims=True), uniforms(84, CONTROL, 0, VERIFICATION, i)[0]
            )
            if kind == "without replacement":
                root[np.arange(CONTROL), x[:, i]] = 0
        x[:, 2:] = 0
        done = verified(x, kind, seed=84)
    assert_rejected(np.bincount(done.output_token_ids[:, 0], minlength=V), p[0])


def test_all_children_leave_nothing_to_reject() -> None:
    """V children chosen without chance: one is always accepted, in the proportions of the target."""
    p = laws(Mode(), STORY.target)[0]
    order = np.random.default_rng(8).permutation(V)
    x = np.broadcast_to(order, (N, V))
    parents = np.full((N, V), -1)
    rows = np.broadcast_to(STORY.target[0], (N, V + 1, V))
    done = tree_speculative_verify(x, parents, Logits(rows), max_depth=1, seed=85)
    assert (done.num_accepted == 1).all()
    assert np.array_equal(order[done.accepted_nodes[:, 0]], done.output_token_ids[:, 0])
    assert_law(np.bincount(done.output_token_ids[:, 0], minlength=V), p)


def test_repeated_children() -> None:
    """Equal siblings count once if they were chosen, and each on its own if they were drawn with replacement."""
    p, q = laws(Mode(), STORY.target)[0], laws(Mode(), STORY.draft)[0]
    n = N
    rows = np.broadcast_to(STORY.target[0], (n, 4, V))
    parents = np.full((n, 3), -1)
    chosen = np.broadcast_to(np.array([2, 2, 1]), (n, 3))
    done = tree_speculative_verify(chosen, parents, Logits(rows), max_depth=1, seed=86)
    assert_law(np.bincount(done.output_token_ids[:, 0], minlength=V), p)
    assert not (done.accepted_nodes == 1).any()
    drawn = children(np.random.default_rng(9), np.broadcast_to(q, (n, V)), "with replacement", 3)
    assert (drawn[:, 0] == drawn[:, 1]).mean() > 0.1
    draft = np.broadcast_to(STORY.draft[0], (n, 4, V))
    done = tree_speculative_verify(
        drawn, parents, Logits(rows), Logits(draft), replacement=True, max_depth=1, seed=87
    )
    assert_law(np.bincount(done.output_token_ids[:, 0], minlength=V), p)
    # What is left of independent draws without their repeats is a draw without replacement: exact as well.
    done = tree_speculative_verify(
        drawn, parents, Logits(rows), Logits(draft), max_depth=1, seed=87
    )
    assert_law(np.bincount(done.output_token_ids[:, 0], minlength=V), p)
    # Repeats tried again, of children that were chosen: the same chance twice.
    left, out, rng = p, np.full(CONTROL, -1), np.random.default_rng(10)
    for token in (2, 2, 1):
        out[(out < 0) & (rng.random(CONTROL) <= left[token])] = token
        left = left / left.sum() * (np.arange(V) != token) if token == 1 else left
    out[out < 0] = categorical(rng, np.tile(left, (int((out < 0).sum()), 1)))
    assert_rejected(np.bincount(out, minlength=V), p)
