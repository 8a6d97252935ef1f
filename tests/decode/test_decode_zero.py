# SPDX-License-Identifier: Apache-2.0
"""A token the target rules out is never emitted, whatever the draft proposes and however extreme the draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from decode_cases import SAMPLING, VERIFICATION, uniforms
from hotloop.decode import (
    Logits,
    Probs,
    block_speculative_sampling,
    chain_speculative_sampling,
    greedy_speculative_accept,
    lantern_relaxed_accept,
    sample,
    speculative_streaming_verify,
    top_logprobs,
    tree_speculative_verify,
    typical_accept,
)

V = 7
# Ruled out at both ends, where a draw at an extreme would land, and in the middle.
OUT = np.array([0, 3, 6])
IN = np.array([1, 2, 4, 5])
DTYPES = ("float32", "float64", "float16", "bfloat16")

# Seeds whose draws at position 0, for request 0, are extreme: found by search, and checked below.
LEAST, MOST = 3e-8, 1 - 1e-7
SAMPLE_LEAST, SAMPLE_MOST = 23065942, 12118387
ACCEPT_LEAST, ACCEPT_MOST = 16936298, 13261120
PICK_LEAST, PICK_MOST = 5286364, 1473287
EXTREME = (SAMPLE_LEAST, SAMPLE_MOST, ACCEPT_LEAST, ACCEPT_MOST, PICK_LEAST, PICK_MOST)


def test_the_seeds_are_extreme() -> None:
    assert uniforms(SAMPLE_LEAST, 1, 0, SAMPLING)[1] < LEAST
    assert uniforms(SAMPLE_MOST, 1, 0, SAMPLING)[1] > MOST
    assert uniforms(ACCEPT_LEAST, 1, 0, VERIFICATION)[0] < LEAST
    assert uniforms(ACCEPT_MOST, 1, 0, VERIFICATION)[0] > MOST
    assert uniforms(PICK_LEAST, 1, 0, VERIFICATION)[1] < LEAST
    assert uniforms(PICK_MOST, 1, 0, VERIFICATION)[1] > MOST


def as_array(x: np.ndarray, dtype: str) -> Any:
    return torch.from_numpy(np.ascontiguousarray(x)).to(getattr(torch, dtype))


def seeds() -> np.ndarray:
    """The extreme ones and others; an array of seeds makes each the seed of its own request 0."""
    return np.concatenate((EXTREME, np.random.default_rng(0).integers(0, 2**62, 500)))


def laws(form: str, rows: int, dtype: str, batch: int) -> tuple[Any, Any]:
    """A target with three tokens ruled out, and a draft that proposes nothing else."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(batch, rows, V))
    z[..., OUT] = 40.0  # the most likely ones, were they not ruled out
    if form == "-inf":
        z[..., OUT] = -np.inf
        target = Logits(as_array(z, dtype))
    elif form == "far below":
        z[..., OUT] = -35.0
        target = Logits(as_array(z, dtype))
    elif form == "bias":
        ids = torch.from_numpy(np.tile(OUT, (batch, 1)))
        bias = torch.full(ids.shape, -torch.inf)
        target = Logits(as_array(z, dtype), bias_ids=ids, bias=bias)
    elif form == "mixture":
        other = np.zeros_like(z)
        other[..., OUT] = -np.inf
        target = Logits(as_array(z, dtype), reference=as_array(other, dtype))
    elif form == "top-k":
        z[..., OUT] = -5.0
        target = Logits(as_array(z, dtype), top_k=4)
    elif form == "min-p":
        z[..., OUT] = -9.0
        target = Logits(as_array(z, dtype), min_p=1e-3)
    else:
        z[..., OUT] = -np.inf
        p = np.exp(z)
        p = as_array(p / p.sum(-1, keepdims=True), dtype)
        target = Probs(p, top_p=0.999) if form == "top-p" else p
    q = np.zeros((batch, rows, V))
    q[..., OUT] = 1 / 3
    return target, as_array(q, dtype)


FORMS = ("-inf", "far below", "bias", "mixture", "top-k", "min-p", "top-p", "probabilities")


def torch_seeds() -> Any:
    return torch.from_numpy(seeds())


def chain_like(op: Callable[..., Any], certain: bool) -> Callable[..., Any]:
    def run(form: str, dtype: str) -> Any:
        batch, k = len(seeds()), 2
        target, q = laws(form, k + 1, dtype, batch)
        x = torch.from_numpy(np.random.default_rng(2).choice(OUT, (batch, k)))
        draft = None if certain else q[:, :k]
        return op(draft, x, target, seed=torch_seeds())

    return run


def run_streams(form: str, dtype: str) -> Any:
    batch = len(seeds())
    target, q = laws(form, 3, dtype, batch)
    x = torch.from_numpy(np.random.default_rng(2).choice(OUT, (batch, 2)))
    return speculative_streaming_verify(q[:, None, :2], x, target, seed=torch_seeds())


def run_tree(certain: bool, replacement: bool) -> Callable[..., Any]:
    def run(form: str, dtype: str) -> Any:
        batch, m = len(seeds()), 3
        target, q = laws(form, m + 1, dtype, batch)
        x = torch.from_numpy(np.tile(OUT, (batch, 1)))
        parents = torch.full((batch, m), -1)
        return tree_speculative_verify(
            x, parents, target, None if certain else q, replacement=replacement, seed=torch_seeds()
        )

    return run


def run_lantern(certain: bool) -> Callable[..., Any]:
    def run(form: str, dtype: str) -> Any:
        batch, k = len(seeds()), 2
        target, q = laws(form, k + 1, dtype, batch)
        x = torch.from_numpy(np.random.default_rng(2).choice(OUT, (batch, k)))
        near = torch.tensor([[v for v in range(V) if v != w] for w in range(V)], dtype=torch.int32)
        draft = None if certain else q[:, :k]
        return lantern_relaxed_accept(draft, x, target, near, delta=0.9, seed=torch_seeds())

    return run


def run_typical(form: str, dtype: str) -> Any:
    batch = len(seeds())
    target, _ = laws(form, 3, dtype, batch)
    values = target.values[:, None] if isinstance(target, Logits) else target[:, None]
    if isinstance(target, Logits):
        reference = None if target.reference is None else target.reference[:, None]
        target = Logits(values, bias_ids=target.bias_ids, bias=target.bias, reference=reference)
    else:
        target = values
    x = torch.from_numpy(np.random.default_rng(2).choice(OUT, (batch, 1, 3)))
    return typical_accept(x, target, alpha=0.0, seed=torch_seeds())


RUNS: dict[str, Callable[..., Any]] = {
    "chain": chain_like(chain_speculative_sampling, False),
    "chain, certain": chain_like(chain_speculative_sampling, True),
    "block": chain_like(block_speculative_sampling, False),
    "block, certain": chain_like(block_speculative_sampling, True),
    "streams": run_streams,
    "tree, certain": run_tree(True, False),
    "tree, with replacement": run_tree(False, True),
    "tree, without": run_tree(False, False),
    "lantern": run_lantern(False),
    "lantern, certain": run_lantern(True),
    "typical": run_typical,
}


# A token is typical, or not, under the law before truncation.
CASES = [
    (run, form)
    for run in RUNS
    for form in FORMS
    if run != "typical" or form not in ("top-k", "min-p", "top-p")
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("run", "form"), CASES)
def test_never_emitted(run: str, form: str, dtype: str) -> None:
    done = RUNS[run](form, dtype)
    ids = done.output_token_ids
    assert set(np.unique(ids)) <= {-1, *IN}
    assert (ids[:, 0] >= 0).all()
    assert not done.num_accepted.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_never_sampled(form: str, dtype: str) -> None:
    target, _ = laws(form, 3, dtype, len(seeds()))
    ids = sample(target, seed=torch_seeds()).token_ids
    assert set(np.unique(ids)) == set(IN)
    named = top_logprobs(target, V).token_ids
    if form != "far below":
        assert set(np.unique(named)) == {-1, *IN}
    assert not np.isin(named[..., :4], OUT).any()


def test_the_ends_of_the_law_are_drawn_at_the_extremes() -> None:
    """u near 0 draws the first token that has mass, u near 1 the last: 1 and 5, not 0 and 6."""
    z = np.full((1, 2, V), 0.0, np.float32)
    z[..., OUT] = -np.inf
    rows = {"law": Logits(z[:, 0])}
    for seed, token in ((SAMPLE_LEAST, 1), (SAMPLE_MOST, 5)):
        for impl in ("cpu", "reference"):
            assert sample(**rows, seed=seed, impl=impl).token_ids.tolist() == [token]
    # Everything is rejected: the draft's only tokens are 0 and 6.
    q = np.zeros((1, 1, V), np.float32)
    q[..., [0, 6]] = 0.5
    for op in (chain_speculative_sampling, block_speculative_sampling):
        for seed, token in ((PICK_LEAST, 1), (PICK_MOST, 5)):
            for impl in ("cpu", "reference"):
                done = op(q, np.array([[6]]), Logits(z), seed=seed, impl=impl)
                assert done.output_token_ids.tolist() == [[token, -1]]


def test_the_least_draw_does_not_accept_what_has_no_mass() -> None:
    """u q <= p holds at p = 0 only for u = 0, which is never drawn; a token with some mass is accepted."""
    for p_token, accepted in ((0.0, 0), (1e-7, 1)):
        p = np.array([[[p_token, 1 - p_token, 0.0]] * 2])
        q = np.array([[[1.0, 0.0, 0.0]]])
        for op in (chain_speculative_sampling, block_speculative_sampling):
            for draft in (q, None):
                for impl in ("cpu", "reference"):
                    done = op(draft, np.array([[0]]), p, seed=ACCEPT_LEAST, impl=impl)
                    assert done.num_accepted.tolist() == [accepted]
        tree = tree_speculative_verify(np.array([[0]]), np.array([[-1]]), p, seed=ACCEPT_LEAST)
        assert tree.num_accepted.tolist() == [accepted]


def test_the_largest_draw_accepts_what_the_laws_agree_on() -> None:
    """u = 1 included, p = q accepts; p a little below q does not at u near 1."""
    p = np.array([[[0.25, 0.75]] * 2])
    for draft, accepted in (([[[0.25, 0.75]]], 1), ([[[0.251, 0.749]]], 0)):
        done = chain_speculative_sampling(np.array(draft), np.array([[0]]), p, seed=ACCEPT_MOST)
        assert done.num_accepted.tolist() == [accepted]


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_never_takes_what_is_ruled_out(dtype: str) -> None:
    target, _ = laws("bias", 3, dtype, 50)
    x = torch.from_numpy(np.random.default_rng(3).choice(OUT, (50, 2)))
    done = greedy_speculative_accept(x, target)
    assert not done.num_accepted.any()
    assert np.isin(done.output_token_ids[:, 0], IN).all()


def test_one_token_has_all_the_mass() -> None:
    """Rounding may not move any of it elsewhere: 20 000 draws each of sampling, residual and bonus."""
    n = 20_000
    z = np.full((n, 2, 300), -np.inf, np.float32)
    z[:, :, 217] = -3.0
    assert (sample(Logits(z), seed=1).token_ids == 217).all()
    q = np.full((n, 1, 300), 1 / 300, np.float32)
    x = np.random.default_rng(4).integers(0, 300, (n, 1))
    for op in (chain_speculative_sampling, block_speculative_sampling):
        done = op(q, x, Logits(z), seed=2)
        assert (done.output_token_ids[:, 0] == 217).all()
        assert np.array_equal(done.num_accepted == 1, x[:, 0] == 217)
