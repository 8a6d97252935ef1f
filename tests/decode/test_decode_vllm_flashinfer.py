# SPDX-License-Identifier: Apache-2.0
"""What users of vLLM and FlashInfer know: padding, the bonus token, counts, ragged requests.

The traces follow the published rules, with every probability 0 or 1 so that no draw has a say.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hotloop.decode import (
    Logits,
    block_speculative_sampling,
    chain_speculative_sampling,
    greedy_speculative_accept,
    tree_speculative_verify,
)

V = 10
CHAINS = [chain_speculative_sampling, block_speculative_sampling]
IMPLS = ("cpu", "reference")
by_impl = pytest.mark.parametrize("impl", IMPLS)


def one_hot(tokens: list[list[int]]) -> np.ndarray:
    return np.eye(V, dtype=np.float32)[np.array(tokens)]


def published(draft: list[int], target: list[int]) -> list[int]:
    """Accept while the target says the same; then its token; after a whole draft its bonus token; -1 after that."""
    out = []
    for i, token in enumerate(draft):
        out.append(target[i])
        if target[i] != token:
            break
    else:
        out.append(target[len(draft)])
    return out + [-1] * (len(draft) + 1 - len(out))


# (draft, target, emitted), by hand.
TRACE = [
    ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]),
    ([1, 2, 3], [1, 5, 3, 4], [1, 5, -1, -1]),
    ([1, 2, 3], [7, 2, 3, 4], [7, -1, -1, -1]),
    ([1, 2, 3], [1, 2, 6, 4], [1, 2, 6, -1]),
    ([0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]),
    ([9, 9, 9], [0, 9, 9, 9], [0, -1, -1, -1]),
]
DRAFT, TARGET, EMITTED = ([list(row[i]) for row in TRACE] for i in range(3))


def test_the_trace_is_the_published_rule() -> None:
    for draft, target, emitted in TRACE:
        assert published(draft, target) == emitted


@by_impl
@pytest.mark.parametrize("op", CHAINS)
@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("with_draft", [True, False])
def test_trace(op: Any, ids: torch.dtype, with_draft: bool, impl: str) -> None:
    draft, target = torch.from_numpy(one_hot(DRAFT)), torch.from_numpy(one_hot(TARGET))
    x = torch.tensor(DRAFT, dtype=ids)
    # FlashInfer's order: draft_probs, draft_token_ids, target_probs.
    done = op(draft if with_draft else None, x, target, seed=11, impl=impl)
    assert done.output_token_ids.tolist() == EMITTED
    assert done.output_token_ids.dtype == ids
    assert done.num_accepted.dtype == torch.int64
    assert done.num_accepted.tolist() == [3, 1, 0, 2, 3, 0]


def sampled(n: int, k: int, seed: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k + 1, V)).astype(np.float32)
    w = (z[:, :k] + 0.5 * rng.normal(size=(n, k, V))).astype(np.float32)
    q = np.exp(w) / np.exp(w).sum(-1, keepdims=True)
    x = (rng.random((n, k, 1)) > np.cumsum(q, -1)).sum(-1).clip(max=V - 1).astype(np.int32)
    return Logits(w), x, Logits(z), rng.integers(0, k + 1, n)


@by_impl
@pytest.mark.parametrize("op", CHAINS)
@pytest.mark.parametrize("ragged", [False, True])
def test_counts_and_padding(op: Any, ragged: bool, impl: str) -> None:
    """emitted = accepted + 1; the accepted ones are the draft's; the last is a token of its own; then -1."""
    n, k = 300, 4
    q, x, p, lengths = sampled(n, k, 1)
    lengths = lengths if ragged else np.full(n, k)
    done = op(q, x, p, num_draft_tokens=lengths if ragged else None, seed=12, impl=impl)
    ids, accepted = done.output_token_ids, done.num_accepted
    assert ids.shape == (n, k + 1)
    assert ids.dtype == np.int32
    assert ((ids >= 0).sum(-1) == accepted + 1).all()
    assert (accepted <= lengths).all()
    assert len(np.unique(accepted)) == k + 1
    for b in range(n):
        tau = accepted[b]
        assert np.array_equal(ids[b, :tau], x[b, :tau])
        assert ids[b, tau] >= 0
        assert (ids[b, tau + 1 :] == -1).all()
        assert (done.logprobs[b, : tau + 1] <= 0).all()
        assert (done.logprobs[b, tau + 1 :] == 0).all()
    if op is chain_speculative_sampling:
        # A bonus token only after the whole draft: the token after a rejection is never the one rejected.
        cut = accepted < lengths
        assert cut.any()
        assert (~cut).any()
        at = accepted[cut]
        rejected = x[np.flatnonzero(cut), at]
        certain = chain_speculative_sampling(
            None, x, p, num_draft_tokens=lengths, seed=12, impl=impl
        )
        cut = certain.num_accepted < lengths
        rows = np.flatnonzero(cut)
        at = certain.num_accepted[cut]
        rejected = x[rows, at]
        assert (certain.output_token_ids[rows, at] != rejected).all()


@by_impl
@pytest.mark.parametrize("op", CHAINS)
def test_a_ragged_batch_is_its_requests_alone(op: Any, impl: str) -> None:
    n, k = 40, 4
    q, x, p, lengths = sampled(n, k, 2)
    seeds = np.arange(n) + 100
    done = op(q, x, p, num_draft_tokens=lengths, seed=seeds, impl=impl)
    for b in range(n):
        m = lengths[b]
        alone = op(
            Logits(q.values[b : b + 1, :m]),
            x[b : b + 1, :m],
            Logits(p.values[b : b + 1, : m + 1]),
            seed=seeds[b : b + 1],
            impl=impl,
        )
        assert np.array_equal(done.output_token_ids[b, : m + 1], alone.output_token_ids[0])
        assert (done.output_token_ids[b, m + 1 :] == -1).all()
        assert done.num_accepted[b] == alone.num_accepted[0]
        # What lies beyond a request's own draft does not matter.
    other = Logits(p.values.copy())
    for b in range(n):
        other.values[b, lengths[b] + 1 :] = np.nan
    again = op(q, x, other, num_draft_tokens=lengths, seed=seeds, impl=impl)
    assert np.array_equal(again.output_token_ids, done.output_token_ids)


@by_impl
def test_greedy_rejection(impl: str) -> None:
    """Temperature 0 and a draft given by its tokens: accepted where argmax agrees, else argmax instead."""
    rng = np.random.default_rng(3)
    n, k = 200, 4
    z = rng.normal(size=(n, k + 1, V))
    best = z.argmax(-1)
    x = np.where(rng.random((n, k)) < 0.7, best[:, :k], rng.integers(0, V, (n, k))).astype(np.int32)
    wanted = np.array([published(x[b].tolist(), best[b].tolist()) for b in range(n)])
    done = greedy_speculative_accept(x, z, impl=impl)
    assert np.array_equal(done.output_token_ids, wanted)
    assert done.output_token_ids.dtype == np.int32
    for op in CHAINS:
        cold = op(None, x, Logits(z, temperature=0.0), seed=13, impl=impl)
        assert np.array_equal(cold.output_token_ids, wanted)
        assert np.array_equal(cold.num_accepted, done.num_accepted)
        # Greedy and random requests in one batch, by a temperature each.
        mixed = op(None, x, Logits(z, temperature=np.arange(n) % 2 * 1.0), seed=13, impl=impl)
        assert np.array_equal(mixed.output_token_ids[::2], wanted[::2])
        assert not np.array_equal(mixed.output_token_ids[1::2], wanted[1::2])


@by_impl
def test_tree_of_draft_tokens(impl: str) -> None:
    """Root - 1 - 3, root - 2 - {4, 5}: the target wants 2, 5, 9; the path's nodes say which rows of a cache to keep."""
    x = np.array([[1, 2, 3, 4, 5]], np.int32)
    parents = np.array([[-1, -1, 0, 1, 1]], np.int32)
    target = one_hot([[2, 0, 5, 0, 0, 9]])
    done = tree_speculative_verify(x, parents, target, max_depth=2, seed=14, impl=impl)
    assert done.output_token_ids.tolist() == [[2, 5, 9]]
    assert done.output_token_ids.dtype == np.int32
    assert done.accepted_nodes.tolist() == [[1, 4]]
    assert done.num_accepted.tolist() == [2]
    target = one_hot([[2, 0, 7, 0, 0, 9]])
    done = tree_speculative_verify(x, parents, target, seed=14, impl=impl)
    assert done.output_token_ids.tolist() == [[2, 7, -1, -1, -1, -1]]
    assert done.accepted_nodes.tolist() == [[1, -1, -1, -1, -1]]
    target = one_hot([[8, 0, 7, 0, 0, 9]])
    done = tree_speculative_verify(x, parents, target, max_depth=1, seed=14, impl=impl)
    assert done.output_token_ids.tolist() == [[8, -1]]


def test_logprobs_are_those_of_the_target() -> None:
    q, x, p, _ = sampled(200, 3, 4)
    z = p.values.astype(np.float64)
    exact = z - np.log(np.exp(z).sum(-1, keepdims=True))
    for op in CHAINS:
        done = op(q, x, p, seed=15)
        ids = done.output_token_ids
        own = np.take_along_axis(exact, np.maximum(ids, 0)[..., None], -1)[..., 0]
        np.testing.assert_allclose(done.logprobs, np.where(ids >= 0, own, 0.0), atol=2e-6)
